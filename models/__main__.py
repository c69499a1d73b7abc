"""`python -m qgraph.models`: lists the models, exports one."""

from __future__ import annotations

import sys

import click

from qgraph.errors import QGraphError
from qgraph.models import get_model, model_names, open_model


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Real models, as code."""


@main.command("list")
def list_() -> None:
    """Names the models."""
    for name in model_names():
        click.echo(f"{name}  {get_model(name).title}")


@main.command()
@click.argument("name", metavar="MODEL")
@click.argument("path", type=click.Path(dir_okay=False))
@click.option("-v", "--verbose", is_flag=True, help="Show what the exporter says.")
def export(name: str, path: str, verbose: bool) -> None:
    """Writes MODEL as a float ONNX file to PATH. MODEL is a name that `list` knows, or a local folder with a
    causal language model of Hugging Face's (config.json, weights, tokenizer.json)."""
    model = open_model(name)
    click.echo(f"exporting {model.title} ...", err=True)
    written = model.export(path, verbose=verbose)
    click.echo(f"{written}: {written.stat().st_size / 1e6:.1f} MB")


def run() -> None:
    """The command line with errors as one line and their exit codes."""
    try:
        main()
    except QGraphError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    run()
