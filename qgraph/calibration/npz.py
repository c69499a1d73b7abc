"""Calibration samples from a `.npz` file: one array an input, whose first axis counts samples."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qgraph.calibration.data import Batch, Data, fixed_batch, require_feeds, spread
from qgraph.errors import InputError, ResourceError
from qgraph.evaluate.files import existing_file
from qgraph.evaluate.samples import InputSpec

_BATCH = 8


def read_npz(path: Path, model_inputs: Sequence[InputSpec], samples: int, batch: int | None) -> Data:
    """See `open_data`. One array after the other is read whole; of each the chosen samples stay."""
    try:
        with np.load(existing_file(path), allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise InputError(f"{path}: not an .npz file")
            # A name that is wrong is told before anything is read.
            known = {spec.name for spec in model_inputs}
            odd = sorted(known.symmetric_difference(file.files))
            if odd:
                what = "lacks an array for" if odd[0] in known else "has an array that is not"
                raise InputError(
                    f"{path} {what} an input of the model: '{odd[0]}'; the inputs are "
                    f"{', '.join(sorted(known))}"
                )
            chosen: list[int] | None = None
            arrays, lengths = {}, {}
            for name in file.files:
                array = file[name]
                if array.ndim == 0 or len(array) == 0:
                    raise InputError(f"{path}: array '{name}' holds no samples: its first axis counts them")
                lengths[name] = len(array)
                chosen = chosen or spread(len(array), samples)
                if len(set(lengths.values())) > 1:
                    told = ", ".join(f"{count} of '{name}'" for name, count in lengths.items())
                    raise InputError(f"{path}: arrays do not agree on the number of samples: {told}")
                arrays[name] = array[chosen]
    except PermissionError as error:
        raise ResourceError(f"{path}: cannot be read ({error.strerror})") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{path}: not an .npz file of plain arrays: {error}") from error
    assert chosen is not None
    size = fixed_batch(model_inputs) or batch or _BATCH
    whole = len(chosen) - len(chosen) % size if fixed_batch(model_inputs) else len(chosen)
    if not whole:
        raise InputError(
            f"{path}: {len(chosen)} samples are fewer than the {size} that the model runs at once"
        )
    batches = []
    for start in range(0, whole, size):
        part = slice(start, min(start + size, whole))
        feeds = require_feeds({name: array[part] for name, array in arrays.items()}, model_inputs, str(path))
        batches.append(Batch(feeds, tuple(f"sample {i}" for i in chosen[part])))
    return Data(str(path), batches)
