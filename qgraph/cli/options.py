"""Options that several verbs share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from qgraph.config import MAX_THREADS
from qgraph.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print no progress.")
threads_option = click.option(
    "--threads",
    type=click.IntRange(0, MAX_THREADS),
    default=0,
    metavar="N",
    help="Threads to compute with; 0 is one a core.  [default: 0]",
)


def _device(context: click.Context, option: click.Parameter, name: str | None) -> str | None:
    if name is not None and not re.fullmatch(r"cpu|cuda(:[0-9]+)?", name):
        raise UsageError(f"unknown device '{name}': give cpu, cuda, or cuda:1 and so on")
    return name


device_option = click.option(
    "--device",
    metavar="NAME",
    callback=_device,
    help="Where an artifact runs: cpu, cuda (the first GPU), cuda:1.  [default: cpu if there is code for it]",
)


def _public_key(context: click.Context, option: click.Parameter, path: Path | None) -> bytes | None:
    from qgraph.signing import read_public_key

    return None if path is None else read_public_key(path)


public_key_option = click.option(
    "--public-key",
    type=click.Path(path_type=Path),
    callback=_public_key,
    help="Refuse an artifact that is not signed by this key, a PEM file, before any of it is loaded.",
)
seed_option = click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of generated inputs."
)


def standard_options(function: F) -> F:
    """`--debug`, which `qgraph.cli.run` reads from the arguments itself, so that it holds for parsing,
    too."""
    return click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")(
        function
    )


def refuse_overwrite(option: str, target: Path, others: Iterable[Path]) -> None:
    """UsageError when `target`, which `option` asks to write, is one of the files that must stay."""
    if any(os.path.realpath(target) == os.path.realpath(other) for other in others):
        raise UsageError(f"{option} {target} would overwrite a file that this command reads or writes")
