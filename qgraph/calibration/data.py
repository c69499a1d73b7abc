"""Calibration data: what the model is fed, in batches that can be read again and again.

Whatever the source, the chosen samples are held in memory as the model takes them. That is small beside a
model: a text of 128 windows of 2048 tokens is 2 MiB.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qgraph.errors import InputError, UsageError
from qgraph.evaluate.samples import InputSpec

if TYPE_CHECKING:
    import onnx_ir as ir

Feeds = Mapping[str, npt.NDArray]

# Samples used where nothing is said; windows of a text are long.
SAMPLES, WINDOWS = 512, 128
MASK = "attention_mask"  # the input that says which tokens are padding
_SUFFIXES = (".npz", ".txt", ".jsonl")


@dataclass(frozen=True, eq=False)
class Batch:
    """What one run of the model is given."""

    feeds: dict[str, npt.NDArray]
    labels: tuple[str, ...]  # of its samples, for messages: "line 3"

    @property
    def tokens(self) -> npt.NDArray[np.bool_] | None:
        """bool [batch, sequence]: what is no padding. None when nothing is known to be padding.

        Read from the input `attention_mask`, where that holds but 0 and 1. The rows of a value count for its
        statistics only where this is true; see `segments.Tap`.
        """
        mask = self.feeds.get(MASK)
        if mask is None or mask.ndim != 2 or mask.all() or not np.isin(mask, (0, 1)).all():
            return None
        return mask != 0


class Data:
    """Batches of samples. Iterating gives the same batches every time.

    Raises InputError when there are none.
    """

    def __init__(self, name: str, batches: Iterable[Batch]) -> None:
        self.name = name  # of the source, for messages and reports
        self._batches = tuple(batches)
        if not self._batches:
            raise InputError(f"{name}: no calibration samples")

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._batches)

    @property
    def samples(self) -> int:
        """The number of samples."""
        return sum(len(batch.labels) for batch in self._batches)

    def fingerprint(self) -> str:
        """SHA-256 of all that the model is fed, batch by batch: all that statistics can depend on."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for batch in self._batches:
            for name, array in sorted(batch.feeds.items()):
                digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
                digest.update(np.ascontiguousarray(array).data)
            digest.update(b"\n")
        return digest.hexdigest()


def open_data(
    source: str | os.PathLike[str] | Data | Iterable[Feeds],
    model_inputs: Sequence[InputSpec],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    samples: int | None = None,
    batch: int | None = None,
    length: int | None = None,
) -> Data:
    """The calibration data in `source`.

    Args:
        source: a file, by its suffix: `.npz` (an array an input, the first axis counts samples), `.txt` (a
            sample a line) or `.jsonl` (a sample an object); or from Python any iterable of feeds, which is
            read once, or `Data`. A decoder's cache may be left out: it is empty then.
        model_inputs: from `model_inputs`.
        tokenizer: the `tokenizer.json` that goes with a text.
        samples: at most so many, evenly spread over a file; of an iterable the first. None: 128 windows of a
            text, else 512. `Data` are used whole.
        batch: samples a run; None: as many as make about 2048 tokens, at most 8; a fixed first dimension of
            the inputs decides instead.
        length: of a text: cut it, as a whole, into windows of so many tokens, which is what decoders want;
            None: every line by itself, padded to the longest of its batch.

    Raises:
        UsageError: options that do not fit together or the source.
        InputError: a file that is missing, empty or not what it claims to be; feeds that the model does not
            take.
        ResourceError: the package `tokenizers` is missing.
    """
    for name, value in (("samples", samples), ("batch", batch), ("length", length)):
        if value is not None and value < 1:
            raise UsageError(f"calibration: {name} must be at least 1, got {value}")
    if isinstance(source, Data):
        for name, value in (("samples", samples), ("batch", batch), ("length", length)):
            if value is not None:
                raise UsageError(f"{source.name} is open: {name} is for data that are to be opened")
        return source
    samples = samples or (SAMPLES if length is None else WINDOWS)
    if not isinstance(source, str | os.PathLike):
        if tokenizer is not None or length is not None:
            raise UsageError("calibration data: a tokenizer or a length go with a text, not with feeds")
        return _from_iterable(source, model_inputs, samples)
    path = Path(source)
    if path.suffix not in _SUFFIXES:
        raise UsageError(
            f"calibration data {path}: unknown kind of file '{path.suffix}'; known: {', '.join(_SUFFIXES)}"
        )
    if path.suffix == ".npz":
        if tokenizer is not None or length is not None:
            raise UsageError(
                f"calibration data {path}: a tokenizer or a length go with a text, not with .npz"
            )
        from qgraph.calibration.npz import read_npz

        return read_npz(path, model_inputs, samples, batch)
    if tokenizer is None:
        raise UsageError(
            f"calibration data {path}: a text needs the model's tokenizer.json: give a tokenizer"
        )
    from qgraph.calibration.text import read_text

    return read_text(path, model_inputs, tokenizer, samples, batch, length)


def model_inputs(model: ir.Model) -> list[InputSpec]:
    """What a prepared model is to be fed: its inputs but for those that have a default.

    Raises UnsupportedError for a cache that `find_cache` refuses.
    """
    from qgraph.passes.cache import find_cache

    cache = find_cache(model.graph)
    pasts = set() if cache is None else {pair.past for pair in cache.pairs}
    specs = []
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        if value.dtype is None or value.shape is None:
            raise InputError(f"the model's input '{value.name}' has no data type or shape")
        shape = tuple(dim if isinstance(dim, int) else str(dim.value or "?") for dim in value.shape)
        specs.append(InputSpec(str(value.name), value.dtype.numpy().name, shape, value in pasts))
    return specs


def spread(total: int, samples: int) -> list[int]:
    """At most `samples` of the indices below `total`, evenly spread."""
    count = min(total, samples)
    return [i * total // count for i in range(count)]


def fixed_batch(model_inputs: Sequence[InputSpec]) -> int | None:
    """The first dimension, where the model fixes it."""
    return next(
        (spec.shape[0] for spec in model_inputs if spec.shape and isinstance(spec.shape[0], int)), None
    )


def require_feeds(
    feeds: Mapping[str, Any], model_inputs: Sequence[InputSpec], where: str
) -> dict[str, npt.NDArray]:
    """`feeds` as arrays that the model takes, with an empty cache where they have none. InputError names the
    input, what it should be and is."""
    known = [spec.name for spec in model_inputs]
    feeds = with_empty_cache(feeds, model_inputs)
    for label, names in (
        ("lacks the model's input", [name for name in known if name not in feeds]),
        ("has what is no input of the model:", [str(name) for name in feeds if name not in known]),
    ):
        if names:
            raise InputError(f"{where} {label} '{names[0]}'; the model's inputs are {', '.join(known)}")
    sizes: dict[str, tuple[int, str]] = {}
    checked = {}
    for spec in model_inputs:
        array = _array(feeds[spec.name], spec.name, where)
        wanted = np.dtype(spec.dtype)
        if array.dtype.kind != wanted.kind or not np.can_cast(array.dtype, wanted, "safe"):
            raise InputError(f"{where}: input '{spec.name}' is {array.dtype}; the model takes {wanted}")
        if array.ndim != len(spec.shape):
            raise InputError(
                f"{where}: input '{spec.name}' has the shape {list(array.shape)}; the model takes "
                f"{_shown(spec.shape)}"
            )
        for axis, (size, dim) in enumerate(zip(array.shape, spec.shape, strict=True)):
            if isinstance(dim, int):
                if size != dim:
                    raise InputError(
                        f"{where}: input '{spec.name}' has the shape {list(array.shape)}; the model takes "
                        f"{_shown(spec.shape)}"
                    )
            elif dim.isidentifier():
                other, name = sizes.setdefault(dim, (size, spec.name))
                if other != size:
                    raise InputError(
                        f"{where}: axis {axis} of input '{spec.name}' is {size}, but {other} in '{name}': "
                        f"both are the model's '{dim}'"
                    )
        checked[spec.name] = np.ascontiguousarray(array, wanted).reshape(array.shape)
    return checked


def with_empty_cache(feeds: Mapping[str, Any], model_inputs: Sequence[InputSpec]) -> Mapping[str, Any]:
    """`feeds`, and where they have none of a decoder's cache an empty one: a text from its start."""
    from qgraph.evaluate.text_ports import empty_cache

    pasts = [spec for spec in model_inputs if spec.past]
    if not pasts or any(spec.name in feeds for spec in pasts):
        return feeds
    return {**feeds, **empty_cache(pasts, {name: np.asarray(value) for name, value in feeds.items()})}


def require_indices(data: Data, tables: Mapping[str, int]) -> None:
    """InputError for an index that is outside of its table: input name -> rows of the table, as
    `evaluate.samples.table_sizes` finds them. ONNX counts negative ones from the end."""
    for batch in data:
        for name, rows in tables.items():
            array = batch.feeds.get(name)
            wrong = None if array is None else np.argwhere((array < -rows) | (array >= rows))
            if array is not None and wrong is not None and len(wrong):
                index = tuple(wrong[0])
                by_sample = array.ndim > 0 and len(array) == len(batch.labels)
                label = batch.labels[index[0] if by_sample else 0]
                raise InputError(
                    f"{data.name}: {label} holds {array[index]} in '{name}', but the model's table for it "
                    f"has {rows} rows: use the tokenizer that belongs to the model"
                )


def _array(value: Any, name: str, where: str) -> npt.NDArray:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists; tensors on other devices
        raise InputError(f"{where}: input '{name}' is no array: {error}") from None


def _shown(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(str(dim) for dim in shape)}]"


def _from_iterable(source: Iterable[Feeds], model_inputs: Sequence[InputSpec], samples: int) -> Data:
    name = "calibration data"
    if not isinstance(source, Iterable) or isinstance(source, Mapping | bytes):
        raise UsageError(
            f"calibration data: expected a file, or an iterable of feeds, not a {type(source).__name__}"
        )
    batches = []
    for i, feeds in enumerate(islice(source, samples)):
        label = f"sample {i}"
        if not isinstance(feeds, Mapping):
            raise InputError(
                f"{name}, {label}: expected feeds (input name -> array), not a {type(feeds).__name__}"
            )
        batches.append(Batch(require_feeds(feeds, model_inputs, f"{name}, {label}"), (label,)))
    return Data(name, batches)
