"""Tensors on the command line: `--input name=file.npy`, `--input file.npz`, `--dim batch=2`, or seeded
ones."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qgraph.cli.options import F, seed_option
from qgraph.errors import InputError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from qgraph.evaluate.samples import InputSpec


def tensor_options(function: F) -> F:
    """`--input`, `--dim` and `--seed`."""
    for option in (
        seed_option,
        click.option(
            "--dim", "dims", multiple=True, metavar="NAME=SIZE",
            help="Size of a dim of seeded inputs. Repeatable.  [default: 1 for a batch, else 16]",
        ),
        click.option(
            "--input", "inputs", multiple=True, metavar="NAME=FILE",
            help="An input from a .npy file, or FILE.npz with all of them; without any, inputs are seeded.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def make_feeds(
    specs: Sequence[InputSpec],
    ranges: Mapping[str, tuple[int, int]],
    inputs: Sequence[str],
    dims: Sequence[str],
    seed: int,
) -> dict[str, np.ndarray]:
    """The tensors that the options of `tensor_options` ask for."""
    from qgraph.evaluate.samples import choose_dims, make_inputs

    if inputs:
        if dims:
            raise UsageError("--dim is for seeded inputs: it cannot go with --input")
        return _read(inputs)
    return make_inputs(specs, ranges, choose_dims(specs, _parse_dims(dims)), seed)


def _parse_dims(dims: Sequence[str]) -> dict[str, int]:
    parsed = {}
    for text in dims:
        name, equals, size = text.partition("=")
        if not equals or not size.isdecimal():
            raise UsageError(f"--dim {text}: expected NAME=SIZE, e.g. --dim batch=2")
        parsed[name] = int(size)
    return parsed


def _read(inputs: Sequence[str]) -> dict[str, np.ndarray]:
    feeds: dict[str, np.ndarray] = {}
    for text in inputs:
        name, equals, file = text.partition("=")
        found = {name: _load(Path(file))} if equals else _load_all(Path(text))
        for key, array in found.items():
            if key in feeds:
                raise UsageError(f"--input gives '{key}' twice")
            feeds[key] = array
    return feeds


def _load(path: Path) -> np.ndarray:
    import numpy as np

    loaded = _open(path)
    if not isinstance(loaded, np.ndarray):
        raise InputError(f"{path}: holds several arrays: give the file alone, --input {path}")
    return loaded


def _load_all(path: Path) -> dict[str, np.ndarray]:
    import numpy as np

    loaded = _open(path)
    if isinstance(loaded, np.ndarray):
        raise UsageError(f"--input {path}: a .npy file needs the input's name: --input NAME={path}")
    try:
        return dict(loaded.items())
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: damaged .npz file: {error}") from error


def _open(path: Path) -> np.ndarray | Mapping[str, np.ndarray]:
    import numpy as np

    try:
        loaded: np.ndarray | Mapping[str, np.ndarray] = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a .npy or .npz file of plain arrays: {error}") from error
    return loaded
