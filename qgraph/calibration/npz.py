"""Calibration samples from a `.npz` file: one array an input, whose first axis counts samples."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph.calibration.data import Batch, Data, fixed_batch, require_feeds, spread
from qgraph.errors import InputError, ResourceError
from qgraph.evaluate.files import existing_file
from qgraph.evaluate.samples import InputSpec

_BATCH = 8
_NPY = b"\x93NUMPY"  # how a file of a single array begins


def read_npz(path: Path, model_inputs: Sequence[InputSpec], samples: int, batch: int | None) -> Data:
    """See `open_data`. One array after the other is read whole; of each the chosen samples stay."""
    optional = {spec.name for spec in model_inputs if spec.past}
    chosen, arrays = _load(path, {spec.name for spec in model_inputs}, optional, samples)
    fixed = fixed_batch(model_inputs)
    size = fixed or batch or _BATCH
    end = len(chosen) - len(chosen) % size if fixed else len(chosen)
    if not end:
        raise InputError(
            f"{path}: {len(chosen)} samples are fewer than the {size} that the model runs at once"
        )
    batches = []
    for start in range(0, end, size):
        part = slice(start, min(start + size, end))
        feeds = require_feeds({name: array[part] for name, array in arrays.items()}, model_inputs, str(path))
        batches.append(Batch(feeds, tuple(f"sample {i}" for i in chosen[part])))
    return Data(str(path), batches)


def _load(
    path: Path, names: set[str], optional: set[str], samples: int
) -> tuple[list[int], dict[str, npt.NDArray]]:
    """Which samples, and these of every array. The file has arrays of `names`, maybe without `optional`."""
    chosen: list[int] = []
    arrays, lengths = {}, {}
    try:
        with existing_file(path).open("rb") as start:
            magic = start.read(len(_NPY))
        if magic == _NPY:
            raise InputError(f"{path}: not an .npz file, but a single array: save it with np.savez")
        if not zipfile.is_zipfile(path):
            raise InputError(f"{path}: not an .npz file, or truncated: make it with np.savez")
        with np.load(path, allow_pickle=False) as file:
            if not optional.intersection(file.files):
                names = names - optional
            if odd := sorted(names.symmetric_difference(file.files)):
                what = "lacks an array for" if odd[0] in names else "has an array that is not"
                known = ", ".join(sorted(names))
                raise InputError(f"{path} {what} an input of the model: '{odd[0]}'; the inputs are {known}")
            for name in file.files:
                array = _read(file, name, path)
                if array.ndim == 0 or len(array) == 0:
                    raise InputError(f"{path}: array '{name}' holds no samples: its first axis counts them")
                lengths[name] = len(array)
                if len(set(lengths.values())) > 1:
                    told = ", ".join(f"{count} of '{name}'" for name, count in lengths.items())
                    raise InputError(f"{path}: arrays do not agree on the number of samples: {told}")
                chosen = chosen or spread(len(array), samples)
                arrays[name] = array[chosen]
    except PermissionError as error:
        raise ResourceError(f"{path}: cannot be read ({error.strerror})") from error
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not an .npz file of plain arrays: {error}") from error
    return chosen, arrays


def _read(file: Any, name: str, path: Path) -> npt.NDArray:
    try:
        array = file[name]
    except ValueError as error:  # of Python objects, which would have to be unpickled
        raise InputError(f"{path}: '{name}' is no array of numbers, or damaged: {error}") from error
    except MemoryError:
        raise InputError(f"{path}: '{name}' is larger than the memory of this machine, or damaged") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: '{name}' is no array: make the file with np.savez")
    return array
