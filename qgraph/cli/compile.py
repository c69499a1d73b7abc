"""`qgraph compile`: the whole way from a model to an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qgraph.cli.compile_options import compile_options, make_config, saved_config, show
from qgraph.cli.console import make_progress


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@compile_options(artifact=True)
def command(model: Path, **options: Any) -> None:
    """Compile the ONNX file MODEL.

    Writes PREFIX.onnx (the low-bit model in standard operators), PREFIX.qg (the artifact that the runtime
    loads) and PREFIX.report.json. They appear only when everything has succeeded, the comparison of the
    artifact with ONNX's reference evaluator included.
    """
    from qgraph.pipeline import compile

    config = make_config(options)
    with saved_config(config, model, options), make_progress(options["quiet"]) as progress:
        result = compile(
            model,
            config,
            output=options["output"],
            dump=options["dump"],
            dry_run=options["dry_run"],
            progress=progress,
        )
    show(result.report, options)
