"""Runs a graph over the calibration data, stage by stage, and gathers moments of what it taps on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qgraph.calibration.border import Border
from qgraph.calibration.data import MASK, Batch, Data
from qgraph.calibration.moments import MeanDifference, Moments, Peaks, accumulate
from qgraph.calibration.segments import (
    FrozenGraph,
    Segment,
    Weight,
    leading_dims_match,
    masked_rows,
    rounded,
)
from qgraph.calibration.session import first_line
from qgraph.errors import InputError, UsageError

if TYPE_CHECKING:
    import onnx_ir as ir

Array = npt.NDArray[Any]
Elementwise = Callable[[Array], Array]
Measure = Moments | MeanDifference | Peaks


@dataclass(frozen=True)
class Tap:
    """Values [.., K] that are measured together: the inputs of a group of layers."""

    values: tuple[str, ...]
    K: int
    masked: frozenset[str]  # those whose rows are the tokens of the input `attention_mask`
    # Values [.., N] whose difference to the float model counts beside these, by name. Rows as of `values`.
    beside: Mapping[str, int] = field(default_factory=dict)


def make_taps(
    model: ir.Model, groups: Iterable[Sequence[str]], beside: Iterable[Iterable[str]] = ()
) -> list[Tap]:
    """A tap for each group of values of the prepared model; `beside`: further values of each.

    Raises UsageError for a value that the model does not have, or that is no float32 [.., K].
    """
    import onnx_ir as ir

    from qgraph.passes.cache import find_cache

    cache = find_cache(model.graph)
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
        masked = frozenset(name for name in names if leading_dims_match(known[name], mask, cache))
        taps.append(Tap(tuple(names), sizes.pop(), masked))
    for i, others in enumerate(beside):
        widths = {name: shape[-1] for name in others if name and (shape := known[name].shape)}
        taps[i] = replace(taps[i], beside={name: N for name, N in widths.items() if isinstance(N, int)})
    return taps


def partition(taps: Sequence[Tap], memory: int, *, cross: bool = False) -> Iterator[tuple[int, int]]:
    """Consecutive taps, as (first, last), whose sums take at most `memory` bytes together; at least one."""
    first, used = 0, 0
    for i, tap in enumerate(taps):
        used += Moments.nbytes(tap.K, cross=cross)
        if i > first and used > memory:
            yield first, i - 1
            first, used = i, Moments.nbytes(tap.K, cross=cross)
    if taps:
        yield first, len(taps) - 1


class Stream:
    """One way of running the graph: with the float weights, or with those that have been quantized so far.

    What it computes for a stage and what it leaves at the border follow from the graph: nothing runs that no
    tap needs, and nothing is kept that no later tap needs. A value is left at the border only once it is
    final, that is when no weight above it is to change any more; what is needed before (where layers far
    apart share a weight) is computed again by later stages.

    name: tells its values from those of another stream at the same border.
    taps: one a stage; without values where the stream has nothing to show.
    groups: the weights that will change, group i after stage i.
    start: the first stage that will be run.
    """

    def __init__(
        self,
        name: str,
        graph: FrozenGraph,
        taps: Sequence[Tap],
        border: Border,
        groups: Sequence[Iterable[str]] = (),
        start: int = 0,
    ) -> None:
        self.name, self._graph, self._taps, self._border = name, graph, taps, border
        self._ranks = graph.ranks(groups)
        self._segment: Segment | None = None
        self._weights: dict[str, Weight | Array] = dict(graph.weights)
        self._arrays: dict[str, Array] = {}  # those of the segment
        self._taps_now: set[str] = set()
        self._forget(graph.needed(self._values(start, len(taps)), self._have())[0])

    @property
    def idle(self) -> bool:
        """Whether the stage needs nothing computed."""
        return self._segment is None or self._segment.session is None

    def taps(self, value: str) -> bool:
        """Whether the stage taps it here."""
        return value in self._taps_now

    def key(self, value: str) -> str:
        """Of the value, at the border."""
        return f"{self.name}:{value}"

    def is_float(self, values: Iterable[str]) -> bool:
        """Whether these do not depend on any weight that changes."""
        return not any(self._ranks.get(value, 0) for value in values)

    def replace(self, weights: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """These weights [K, N] from now on."""
        self._weights.update((name, array) for name, array in weights.items() if name in self._weights)

    def prepare(self, first: int, last: int, *, keep_taps: bool, rounds: bool) -> set[str]:
        """Opens what computes the taps of stages [first, last]. Returns the values that are to be at the
        border afterwards.

        keep_taps: the taps shall be got again from the border.
        rounds: the roundings of the taps are made in this stage.
        """
        graph, have = self._graph, self._have()
        self._taps_now = self._values(first, last + 1)
        nodes, _ = graph.needed(self._taps_now, have)
        computed = {name for i in nodes for name in graph.nodes[i].output if name}
        final = have | {name for name in computed if self._ranks[name] <= last}
        if rounds:
            tapped = {name for tap in self._taps[first : last + 1] for name in tap.values}
            final |= {rounded(name) for name in tapped if self._ranks.get(name, 0) <= last}
        later = self._values(last + 1, len(self._taps)) | (self._taps_now if keep_taps else set())
        pending, alive = graph.needed(later, final)
        where = f"the graph up to '{''.join(self._taps[last].values[-1:])}'"
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
        return {value for tap in self._taps[first:end] for value in (*tap.values, *tap.beside)}

    def _have(self) -> set[str]:
        prefix = self.key("")
        return {key.removeprefix(prefix) for key in self._border if key.startswith(prefix)}

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

    def stage(
        self,
        first: int,
        last: int,
        measures: Sequence[Measure],
        *,
        keep_taps: bool = False,
        roundings: Sequence[Elementwise] = (),
        complete: bool = True,
    ) -> None:
        """Runs stages [first, last] as one. Afterwards the border is at position 2 last + 1.

        Args:
            measures: one a stage, to take in what is tapped. Without any, only the border moves.
            keep_taps: leave the taps at the border too.
            roundings: of the taps x [.., K], one a stage, if they are rounded: measured is x rounded, against
                x of the float stream or else x itself; layers to come read the rounded x.
            complete: if not, the same stages will be run once more: the border is at position 2 last.

        Raises InputError naming value and sample where a tapped value is not finite.
        """
        taps = self._taps[first : last + 1]
        assert len(measures) in (0, len(taps)) and len(roundings) in (0, len(taps))
        each = {name: r for tap, r in zip(taps, roundings, strict=False) for name in tap.values}
        keys = {}
        for i, stream in enumerate(self._streams):
            alive = stream.prepare(first, last, keep_taps=keep_taps, rounds=bool(each))
            keys.update({stream.key(name): (i, name) for name in alive})
        idle = not measures and not each and all(stream.idle for stream in self._streams)
        batches = iter(() if idle else enumerate(self._data))
        position = 2 * last + (1 if complete else 0)
        with self._border.write(position, keys) as border, ThreadPoolExecutor(self._threads) as pool:
            while chunk := list(islice(batches, self._threads)):
                for (_, batch), values in zip(chunk, pool.map(partial(self._run, each), chunk), strict=True):
                    for key in border.keys:
                        i, name = keys[key]
                        border.put(key, values[i][name])
                    for tap, measure in zip(taps, measures, strict=False):
                        self._measure(tap, measure, batch, values)
                accumulate((m for m in measures if isinstance(m, Moments)), pool)
        for stream in self._streams:
            stream.close()

    def _run(self, roundings: Mapping[str, Elementwise], item: tuple[int, Batch]) -> list[dict[str, Array]]:
        """What every stream computes for one batch, and the roundings of the first."""
        index, batch = item
        try:
            values = [stream.run(index, batch) for stream in self._streams]
        except Exception as error:  # ONNX Runtime's classes share no base
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            raise InputError(f"{self._where(batch)}: the model cannot be run: {first_line(error)}") from error
        values[0].update({rounded(name): round_(values[0][name]) for name, round_ in roundings.items()})
        return values

    def _measure(self, tap: Tap, measure: Measure, batch: Batch, values: list[dict[str, Array]]) -> None:
        tokens = batch.tokens
        for name in tap.values:
            mask = tokens if name in tap.masked else None
            tapped = [found for found, s in zip(values, self._streams, strict=True) if s.taps(name)]
            rows = [masked_rows(found[name], mask) for found in tapped]
            if not all(np.isfinite(r).all() for r in rows):
                raise InputError(
                    f"value '{name}' is not finite for {self._bad_sample(name, mask, batch, tapped)}: remove "
                    "the sample, or repair the model"
                )
            x, reference = rows[0], rows[-1]
            if rounded(name) in values[0]:
                x = masked_rows(values[0][rounded(name)], mask)
            beside = []
            for other in measure.beside:
                now, then = masked_rows(values[0][other], mask), masked_rows(values[-1][other], mask)
                if not (np.isfinite(now).all() and np.isfinite(then).all()):
                    raise InputError(
                        f"value '{other}' is not finite for {self._bad_sample(other, mask, batch, values)}: "
                        "remove the sample, or repair the model"
                    )
                beside.append((now, then))
            measure.add(x, reference if measure.cross else None, beside)

    def _bad_sample(
        self, name: str, mask: npt.NDArray[np.bool_] | None, batch: Batch, values: list[dict[str, Array]]
    ) -> str:
        """The first sample of the batch for which a stream's value is not finite, as far as rows tell."""
        for found in values:
            x = found[name]
            for i, label in enumerate(batch.labels if len(x) == len(batch.labels) else ()):
                rows = masked_rows(x[i : i + 1], None if mask is None else mask[i : i + 1])
                if not np.isfinite(rows).all():
                    return f"{label} of {self._data.name}"
        return self._where(batch)

    def _where(self, batch: Batch) -> str:
        first, last = batch.labels[0], batch.labels[-1]
        return f"{first if first == last else f'one of {first} to {last}'} of {self._data.name}"


def _array(weight: Weight | Array) -> Array:
    return weight if isinstance(weight, np.ndarray) else weight.numpy()
