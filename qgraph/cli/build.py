"""`qgraph build`: the second half of `compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qgraph.cli.compile_options import build_options, make_config, saved_config, show
from qgraph.cli.console import make_progress


@click.command()
@click.argument("lowbit", type=click.Path(path_type=Path))
@build_options
def command(lowbit: Path, **options: Any) -> None:
    """Build an artifact from the ONNX file LOWBIT, as `qgraph quantize` wrote it (or any prepared float
    model): writes PREFIX.qg and PREFIX.report.json."""
    from qgraph.pipeline import build

    config = make_config(options)
    with saved_config(config, lowbit, options), make_progress(options["quiet"]) as progress:
        result = build(
            lowbit, config, output=options["output"], dry_run=options["dry_run"], progress=progress
        )
    show(result.report, options)
