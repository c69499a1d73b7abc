"""`python -m qgraph.models`: lists the models, exports one."""

from __future__ import annotations

import contextlib
import inspect
import sys
from typing import Any

import click

from qgraph.errors import InputError, QGraphError, UsageError
from qgraph.models import get_model, model_names, open_model

_DEFAULTS = {"cache": True, "mask": False, "opset": None}


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
@click.option(
    "--no-cache",
    "cache",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Leave out the inputs and outputs that hold keys and values: every run reads a text from its start.",
)
@click.option(
    "--mask", is_flag=True, help="Add attention_mask and position_ids, for batches padded on the left."
)
@click.option("--opset", type=click.IntRange(18), help="Version of ONNX's operators.  [default: 23]")
@click.option("-v", "--verbose", is_flag=True, help="Show what the exporter says.")
def export(name: str, path: str, verbose: bool, **options: Any) -> None:
    """Writes MODEL as a float ONNX file to PATH. MODEL is a name that `list` knows, or a local folder with a
    causal language model of Hugging Face's (config.json, weights, tokenizer.json). Such a model is written
    with its cache; --no-cache, --mask and --opset are for these alone."""
    model = open_model(name)
    given = {option: value for option, value in options.items() if value != _DEFAULTS[option]}
    unknown = sorted(given.keys() - inspect.signature(model.export).parameters.keys())
    if unknown:
        flags = ", ".join("--no-cache" if option == "cache" else f"--{option}" for option in unknown)
        raise UsageError(f"{name} is no causal language model: it is exported without {flags}")
    click.echo(f"exporting {model.title} ...", err=True)
    written = model.export(path, verbose=verbose, **given)
    click.echo(f"{written}: {written.stat().st_size / 1e6:.1f} MB")
    with contextlib.suppress(InputError):  # a folder may have none
        click.echo(f"its tokenizer: {model.tokenizer_path()}")


def run() -> None:
    """The command line with errors as one line and their exit codes."""
    try:
        main()
    except QGraphError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    run()
