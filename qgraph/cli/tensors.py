"""Tensors on the command line: `--input name=file.npy`, `--input file.npz`, `--dim batch=2`, or seeded
ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qgraph.cli.options import F, seed_option
from qgraph.errors import InputError, UsageError
from qgraph.evaluate.files import existing_file

if TYPE_CHECKING:
    import numpy as np

    from qgraph.runtime import Model


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


def make_feeds(model: Model, inputs: Sequence[str], dims: Sequence[str], seed: int) -> dict[str, np.ndarray]:
    """The tensors for `model` that the options of `tensor_options` ask for."""
    from qgraph.evaluate.samples import artifact_ranges, first_run_dims, input_specs, make_inputs

    if inputs:
        if dims:
            raise UsageError("--dim is for seeded inputs: it cannot go with --input")
        return _read(inputs)
    given = _parse_dims(dims)
    chosen = first_run_dims(model, given)
    for dim in model.dims:
        if dim.name in given and not dim.min <= given[dim.name] <= dim.max:
            raise UsageError(f"--dim {dim.name}={given[dim.name]}: the model takes {dim.min} to {dim.max}")
    return make_inputs(input_specs(model), artifact_ranges(model), chosen, seed)


def _parse_dims(dims: Sequence[str]) -> dict[str, int]:
    parsed: dict[str, int] = {}
    for text in dims:
        name, equals, size = text.partition("=")
        if not equals or not size.isdecimal() or len(size) > 19:
            raise UsageError(f"--dim {text}: expected NAME=SIZE, e.g. --dim batch=2")
        if name in parsed:
            raise UsageError(f"--dim gives '{name}' twice")
        parsed[name] = int(size)
    return parsed


def _read(inputs: Sequence[str]) -> dict[str, np.ndarray]:
    feeds: dict[str, np.ndarray] = {}
    for text in inputs:
        name, equals, file = text.partition("=")
        if not text or (equals and not (name and file)):
            raise UsageError(f"--input {text}: expected NAME=FILE or FILE.npz")
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
    except Exception as error:  # as in _open
        raise InputError(
            f"{path}: damaged, or not an .npz file of plain arrays that fit in memory"
        ) from error


def _open(path: Path) -> np.ndarray | Mapping[str, np.ndarray]:
    import numpy as np

    existing_file(path)
    try:
        loaded: np.ndarray | Mapping[str, np.ndarray] = np.load(path, allow_pickle=False)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read as a .npy or .npz file: {error.strerror or error}"
        ) from error
    except Exception as error:  # numpy's, zipfile's and, for a header that lies, MemoryError share no base
        raise InputError(f"{path}: not a .npy or .npz file of plain arrays that fit in memory") from error
    return loaded


def input_files(inputs: Sequence[str]) -> list[Path]:
    """The files that `--input` names."""
    return [Path(file if equals else name) for name, equals, file in (text.partition("=") for text in inputs)]
