"""`qgraph view`: Netron on this machine's own address."""

from __future__ import annotations

from pathlib import Path

import click

from qgraph.cli.options import standard_options
from qgraph.errors import InputError, ResourceError


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port to serve on; 0 is any free one.")
@click.option("--browser/--no-browser", default=True, help="Open a browser window.  [default: do]")
@standard_options
def command(model: Path, port: int, browser: bool) -> None:
    """Serve the ONNX file MODEL in Netron on 127.0.0.1, until interrupted. Needs the `netron` package."""
    if not model.is_file():
        raise InputError(f"{model}: no such file")
    if model.suffix == ".qg":
        raise InputError(
            f"{model}: an artifact has no graph: give {model.with_suffix('.onnx')}, its low-bit ONNX file; "
            "'qgraph inspect' shows what the artifact holds"
        )
    try:
        import netron
    except ImportError:
        raise ResourceError(
            f"the netron package is not installed: pip install 'qgraph[view]', or open {model} at https://netron.app"
        ) from None
    host, bound = netron.start(str(model), address=("127.0.0.1", port), browse=browser)
    click.echo(f"http://{host}:{bound} shows {model.name}; Ctrl-C ends it")
    netron.wait()
