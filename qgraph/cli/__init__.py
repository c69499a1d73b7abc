"""The command line: one module a verb, imported only when that verb is called.

A verb module defines `command`, parses options, calls the Python API and prints. It holds no logic of its
own.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Any

import click

from qgraph import __version__
from qgraph.cli.failure import guard

# verb -> one line of help. Listed here so that `qgraph --help` imports no verb.
VERBS = {
    "compile": "ONNX model -> low-bit ONNX, artifact and report.",
    "quantize": "ONNX model -> low-bit ONNX and report.",
    "build": "Low-bit ONNX -> artifact.",
    "run": "Run an artifact on given or seeded inputs.",
    "generate": "Generate text with a causal language model.",
    "bench": "Measure an artifact's latency, beside ONNX Runtime's on the float model.",
    "profile": "Show where the time of an artifact goes.",
    "inspect": "Show what an artifact or an ONNX file holds.",
    "check": "Compare an artifact with its low-bit ONNX file and its original.",
    "eval": "Measure an artifact or an ONNX file on a task.",
    "keygen": "Make a key pair to sign artifacts with.",
    "sign": "Sign an artifact.",
    "verify": "Check that an artifact is signed by a key.",
    "view": "Open an ONNX file in Netron.",
    "sdk": "Write what C and C++ programs are built against.",
    "schemes": "List the schemes.",
    "doctor": "Check this machine: versions, CPU, compiler, runtime.",
}


class VerbGroup(click.Group):
    """A click group whose commands live in `qgraph.cli.<verb>`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"qgraph.cli.{cmd_name}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f": did you mean '{near[0]}'?" if near else f": choose from {', '.join(VERBS)}"
            raise click.UsageError(f"unknown command '{args[0]}'{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=VerbGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 ok, 2 usage, 3 bad input, 4 unsupported, 5 budget missed, 6 resources, "
    "7 signature, 70 defect.",
)
@click.version_option(__version__, prog_name="qgraph")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def qgraph(debug: bool) -> None:
    """The low-bit ONNX compiler."""


def run(argv: list[str]) -> int:
    """Run the command line `argv` (without the program's name) and return the exit code. Never raises."""
    # Read from argv and not from click: it must hold for errors in parsing, too.
    return guard(
        lambda: qgraph.main(argv, prog_name="qgraph", standalone_mode=False), debug="--debug" in argv
    )
