"""`qgraph quantize`: the first half of `compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qgraph.cli.compile_options import compile_options, make_config, saved_config, show
from qgraph.cli.console import make_progress


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@compile_options(artifact=False)
def command(model: Path, **options: Any) -> None:
    """Quantize the ONNX file MODEL: writes PREFIX.onnx, the low-bit model in standard operators, and
    PREFIX.report.json. `qgraph build` makes the same artifact of it as `qgraph compile` does."""
    from qgraph.pipeline import quantize

    config = make_config(options)
    with saved_config(config, model, options), make_progress(options["quiet"]) as progress:
        result = quantize(
            model,
            config,
            output=options["output"],
            dump=options["dump"],
            dry_run=options["dry_run"],
            progress=progress,
        )
    show(result.report, options)
