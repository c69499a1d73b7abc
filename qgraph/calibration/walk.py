"""Runs a graph over the calibration data, stage by stage, and gathers moments of what it taps on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qgraph.calibration.border import Border
from qgraph.calibration.data import MASK, Batch, Data
from qgraph.calibration.moments import Moments, accumulate
from qgraph.calibration.segments import FrozenGraph, Segment, leading_dims_match, masked_rows
from qgraph.calibration.session import first_line
from qgraph.errors import InputError, UsageError

if TYPE_CHECKING:
    import onnx_ir as ir

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Tap:
    """Values [.., K] that are measured together: the inputs of a group of layers."""

    values: tuple[str, ...]
    K: int
    masked: frozenset[str]  # those whose rows are the tokens of the input `attention_mask`


def make_taps(model: ir.Model, groups: Iterable[Sequence[str]]) -> list[Tap]:
    """A tap for each group of values of the prepared model.

    Raises UsageError for a value that the model does not have, or that is no float32 [.., K].
    """
    import onnx_ir as ir

    known = {str(v.name): v for node in model.graph for v in node.outputs if v.name}
    known |= {str(v.name): v for v in model.graph.inputs if not v.is_initializer()}
    mask = next((v for v in model.graph.inputs if v.name == MASK), None)
    taps = []
    for names in groups:
        sizes = set()
        for name in names:
            value = known.get(name)
            K = value.shape[-1] if value is not None and value.shape else None
            if value is None or value.dtype != ir.DataType.FLOAT or not isinstance(K, int):
                what = "has no value" if value is None else "cannot be measured at"
                raise UsageError(f"the model {what} '{name}': calibration measures float32 [.., K]")
            sizes.add(K)
        if len(sizes) != 1:
            raise UsageError(f"values of different sizes cannot be measured together: {', '.join(names)}")
        masked = frozenset(name for name in names if leading_dims_match(known[name], mask))
        taps.append(Tap(tuple(names), sizes.pop(), masked))
    return taps


class Stream:
    """One way of running the graph: with the float weights, or with those that have been quantized so far.

    What it computes for a stage and what it leaves at the border follow from the graph: nothing runs that no
    tap needs, and nothing is kept that no later tap needs. A value is left at the border only once it is
    final, that is when no weight above it is to change any more; what is needed before (where layers far
    apart share a weight) is computed again by later stages.

    name: tells its values from those of another stream at the same border.
    groups: the weights that will change, group i after stage i.
    """

    def __init__(
        self,
        name: str,
        graph: FrozenGraph,
        taps: Sequence[Tap],
        border: Border,
        groups: Sequence[Iterable[str]] = (),
    ) -> None:
        self.name, self._graph, self._taps, self._border = name, graph, taps, border
        self._ranks = graph.ranks(groups)
        self._segment: Segment | None = None
        self._weights: dict[str, ir.TensorProtocol | Array] = dict(graph.weights)
        self._arrays: dict[str, Array] = {}  # those of the segment
        self._taps_now: set[str] = set()
        self._forget(graph.needed(self._values(0, len(taps)), self._have())[0])

    @property
    def idle(self) -> bool:
        """Whether the stage needs nothing computed."""
        return self._segment is None or self._segment.session is None

    def key(self, value: str) -> str:
        """Of the value, at the border."""
        return f"{self.name}:{value}"

    def is_float(self, values: Iterable[str]) -> bool:
        """Whether these do not depend on any weight that changes."""
        return not any(self._ranks.get(value, 0) for value in values)

    def replace(self, weights: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """These weights [K, N] from now on."""
        self._weights.update((name, array) for name, array in weights.items() if name in self._weights)

    def prepare(self, first: int, last: int, *, keep_taps: bool) -> set[str]:
        """Opens what computes the taps of stages [first, last]. Returns the values that are to be at the
        border afterwards.

        keep_taps: the taps shall be got again from the border.
        """
        graph, have = self._graph, self._have()
        self._taps_now = self._values(first, last + 1)
        nodes, _ = graph.needed(self._taps_now, have)
        computed = {name for i in nodes for name in graph.nodes[i].output if name}
        final = {name for name in have | computed if self._ranks[name] <= last}
        later = self._values(last + 1, len(self._taps)) | (self._taps_now if keep_taps else set())
        pending, alive = graph.needed(later, final)
        where = f"the graph up to '{self._taps[last].values[-1]}'"
        self._segment = graph.segment(self._taps_now | alive, have, where)
        self._arrays = {name: _array(self._weights[name]) for name in self._segment.weights}
        self._forget(pending)
        return alive

    def run(self, index: int, batch: Batch) -> dict[str, Array]:
        """All taps of the stage, and what of its border is new, for one batch. Many threads may run at
        once."""
        assert self._segment is not None
        borders = {name: self._border.read(self.key(name), index) for name in self._segment.borders}
        values = self._segment.run(batch.feeds, borders, self._arrays)
        for name in self._taps_now - values.keys():
            known = name in batch.feeds
            values[name] = batch.feeds[name] if known else self._border.read(self.key(name), index)
        return values

    def close(self) -> None:
        """The stage is over."""
        self._segment, self._arrays = None, {}

    def _values(self, first: int, end: int) -> set[str]:
        return {value for tap in self._taps[first:end] for value in tap.values}

    def _have(self) -> set[str]:
        return {name for name in self._graph.producer if self.key(name) in self._border}

    def _forget(self, pending: Iterable[int]) -> None:
        """Lets go of the weights that no node to come reads."""
        needed = self._graph.weights_of(pending)
        self._weights = {name: weight for name, weight in self._weights.items() if name in needed}


class Walk:
    """The stages in turn, over all batches, on `threads` threads.

    `streams`: the one that is measured, and where differences count the float one after it. The results, to
    the last bit, are the same for any number of threads.
    """

    def __init__(
        self, data: Data, taps: Sequence[Tap], streams: Sequence[Stream], border: Border, threads: int
    ) -> None:
        self._data, self._taps, self._streams = data, taps, streams
        self._border, self._threads = border, threads

    def stage(self, first: int, last: int, moments: Sequence[Moments], *, keep_taps: bool = False) -> None:
        """Runs stages [first, last] as one; `moments`, one a stage, take in what is tapped. Without any, the
        border moves and nothing is measured.

        Raises InputError naming value and sample where a tapped value is not finite.
        """
        keys = {}
        for i, stream in enumerate(self._streams):
            alive = stream.prepare(first, last, keep_taps=keep_taps)
            keys.update({stream.key(name): (i, name) for name in alive})
        idle = not moments and all(stream.idle for stream in self._streams)
        batches = iter(() if idle else enumerate(self._data))
        with self._border.write(last, keys) as border, ThreadPoolExecutor(self._threads) as pool:
            while chunk := list(islice(batches, self._threads)):
                for (_, batch), values in zip(chunk, pool.map(self._run, chunk), strict=True):
                    for key in border.keys:
                        i, name = keys[key]
                        border.put(key, values[i][name])
                    for tap, moment in zip(
                        self._taps[first : last + 1] if moments else (), moments, strict=True
                    ):
                        self._measure(tap, moment, batch, values)
                accumulate(moments, pool)
        for stream in self._streams:
            stream.close()

    def _run(self, item: tuple[int, Batch]) -> list[dict[str, Array]]:
        index, batch = item
        try:
            return [stream.run(index, batch) for stream in self._streams]
        except Exception as error:  # ONNX Runtime's classes share no base
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            raise InputError(f"{self._where(batch)}: the model cannot be run: {first_line(error)}") from error

    def _measure(self, tap: Tap, moment: Moments, batch: Batch, values: list[dict[str, Array]]) -> None:
        tokens = batch.tokens
        for name in tap.values:
            mask = tokens if name in tap.masked else None
            rows = [masked_rows(found[name], mask) for found in values]
            if not all(np.isfinite(r).all() for r in rows):
                raise InputError(
                    f"value '{name}' is not finite for {self._bad_sample(name, mask, batch, values)}: remove "
                    "the sample, or repair the model"
                )
            moment.add(rows[0], rows[1] if len(rows) > 1 else None)

    def _bad_sample(
        self, name: str, mask: npt.NDArray[np.bool_] | None, batch: Batch, values: list[dict[str, Array]]
    ) -> str:
        count = len(batch.labels)
        for found in values:
            x = found[name]
            for i, label in enumerate(batch.labels if len(x) == count else ()):
                if not np.isfinite(
                    masked_rows(x[i : i + 1], None if mask is None else mask[i : i + 1])
                ).all():
                    return f"{label} of {self._data.name}"
        return self._where(batch)

    def _where(self, batch: Batch) -> str:
        first, last = batch.labels[0], batch.labels[-1]
        return f"{first if first == last else f'one of {first} to {last}'} of {self._data.name}"


def _array(weight: ir.TensorProtocol | Array) -> Array:
    return weight if isinstance(weight, np.ndarray) else weight.numpy()
