"""Where the statistics of the stages come from: two ways to walk a model, and none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from qgraph.calibration.border import Border
from qgraph.calibration.data import Data
from qgraph.calibration.moments import MeanDifference, Moments, Peaks
from qgraph.calibration.segments import FrozenGraph, own
from qgraph.calibration.walk import Elementwise, Stream, Tap, Walk, make_taps, partition
from qgraph.passes.linear_groups import LinearGroup, MeanShiftSite
from qgraph.solvers.statistics import Statistics

if TYPE_CHECKING:
    import onnx_ir as ir

    from qgraph.passes.linear_groups import Arrays, Stage

Weights = Mapping[str, npt.NDArray[np.float32]]

# (x float32 [n, K], the largest |x| over all data) -> x as a layer with rounded inputs sees it
Rounding = Callable[[npt.NDArray[np.float32], float], npt.NDArray[np.float32]]


class Source(Protocol):
    """Knows the statistics of stages, asked for in order."""

    def statistics(self, index: int) -> Statistics:
        """Of the inputs of a group."""

    def shift(self, index: int) -> Arrays:
        """The record of a site."""

    def skip(self, index: int) -> None:
        """Those of this stage are not needed."""

    def replace(self, weights: Weights) -> None:
        """The initializers of the stage that was asked for or skipped last are these from now on."""


class Nothing:
    """For a walk whose records are all there: nothing is to be measured."""

    def statistics(self, index: int) -> Statistics:
        """See Source."""
        raise AssertionError("all records are there")

    def shift(self, index: int) -> Arrays:
        """See Source."""
        raise AssertionError("all records are there")

    def skip(self, index: int) -> None:
        """See Source."""

    def replace(self, weights: Weights) -> None:
        """See Source."""


class FloatModel:
    """Statistics of the float model, of as many groups at a time as fit in `memory`.

    missing: the groups that will be asked for.
    """

    def __init__(
        self,
        model: ir.Model,
        groups: Sequence[LinearGroup],
        missing: Sequence[int],
        data: Data,
        border: Border,
        rounding: Rounding | None,
        threads: int,
        memory: int,
    ) -> None:
        self._taps = make_taps(model, [groups[i].values for i in missing])
        self._missing, self._rounding = list(missing), rounding
        stream = Stream("float", FrozenGraph(model), self._taps, border)
        self._walk = Walk(data, self._taps, [stream], border, threads)
        self._parts = partition(self._taps, memory, cross=rounding is not None)
        self._measured: dict[int, Statistics] = {}

    def statistics(self, index: int) -> Statistics:
        """See Source."""
        if index not in self._measured:
            first, last = next(self._parts)
            statistics = _measure(self._walk, self._taps, first, last, self._rounding, cross=False)
            self._measured = dict(zip(self._missing[first : last + 1], statistics, strict=True))
        return self._measured.pop(index)

    def shift(self, index: int) -> Arrays:
        """See Source: there are no sites."""
        raise AssertionError("the float model has no quantized one to be compared to")

    def skip(self, index: int) -> None:
        """See Source."""

    def replace(self, weights: Weights) -> None:
        """See Source: the float model stays as it is."""


class QuantizedSoFar:
    """Statistics of the model with the groups before quantized, and the sites before set right, one stage
    after the other.

    corrected: a second stream carries what the float model computes, for `Statistics.cross`. Sites alone need
        it too, but from site to site only.
    missing: the stages that will be asked for. `border` may be that of an earlier run, which is taken up
        where it stands, unless it stands behind the first of these.
    """

    def __init__(
        self,
        model: ir.Model,
        stages: Sequence[Stage],
        missing: Sequence[int],
        data: Data,
        border: Border,
        rounding: Rounding | None,
        threads: int,
        *,
        corrected: bool,
    ) -> None:
        if border.position > 2 * missing[0] + 1:
            border.clear()
        groups = [stage if isinstance(stage, LinearGroup) else None for stage in stages]
        self._is_site = [group is None for group in groups]
        beside = [group.residuals if group and len(group.values) == 1 else () for group in groups]
        self._taps = make_taps(model, [stage.values for stage in stages], beside if corrected else ())
        self._last_missing, self._rounding, self._border = missing[-1], rounding, border
        graph = FrozenGraph(model)
        graph.separate(
            (name for group in groups if group for name in group.nodes), rounds=rounding is not None
        )
        sites = (stage for stage in stages if isinstance(stage, MeanShiftSite))
        graph.separate((site.node for site in sites), rounds=False)
        start = max(border.position, 0) // 2
        weights = [[own(name) for name in stage.weights] for stage in stages]
        self._stream = Stream("quantized", graph, self._taps, border, weights, start=start)
        streams = [self._stream]
        if corrected or any(self._is_site):
            compared = zip(self._taps, self._is_site, strict=True)
            taps = [tap if corrected or site else Tap((), tap.K, frozenset()) for tap, site in compared]
            streams.append(Stream("float", FrozenGraph(model), taps, border, start=start))
        self._walk = Walk(data, self._taps, streams, border, threads)
        self._corrected = corrected

    def statistics(self, index: int) -> Statistics:
        """See Source."""
        # Above the first quantized layer both streams are the same.
        cross = self._corrected and index > 0 and not self._stream.is_float(self._taps[index].values)
        return _measure(self._walk, self._taps, index, index, self._rounding, cross=cross, keep_taps=True)[0]

    def shift(self, index: int) -> Arrays:
        """See Source."""
        tap = self._taps[index]
        measure = MeanDifference(tap.values[0], tap.K)
        self._walk.stage(index, index, [measure], keep_taps=True)
        return measure.finish()

    def skip(self, index: int) -> None:
        """See Source. Brings the border here, if it is behind and anything follows that needs it."""
        if not _done(self._border) < index < self._last_missing:
            return
        if self._rounding is None or self._is_site[index]:
            self._walk.stage(index, index, [], keep_taps=True)
        else:
            _, roundings = _peaks(self._walk, self._taps, index, index, self._rounding)
            self._walk.stage(index, index, [], keep_taps=True, roundings=roundings)

    def replace(self, weights: Weights) -> None:
        """See Source."""
        self._stream.replace({own(name): array for name, array in weights.items()})


def _done(border: Border) -> int:
    """The last stage that the border has behind it."""
    return (border.position - 1) // 2


def _measure(
    walk: Walk,
    taps: Sequence[Tap],
    first: int,
    last: int,
    rounding: Rounding | None,
    *,
    cross: bool,
    keep_taps: bool = False,
) -> list[Statistics]:
    """The statistics of stages [first, last]."""
    peaks: list[Peaks] = []
    roundings: Sequence[Elementwise] = ()
    if rounding is not None:
        peaks, roundings = _peaks(walk, taps, first, last, rounding)
    here = taps[first : last + 1]
    moments = [
        Moments(tap.values[0], tap.K, cross=cross or rounding is not None, beside=tap.beside if cross else {})
        for tap in here
    ]
    walk.stage(first, last, moments, keep_taps=keep_taps, roundings=roundings)
    found = []
    while moments:  # each goes as soon as it is over: with its statistics it is twice in memory
        found.append(moments.pop(0).finish())
    return [replace(s, amax=peak.amax) for s, peak in zip(found, peaks, strict=True)] if peaks else found


def _peaks(
    walk: Walk, taps: Sequence[Tap], first: int, last: int, rounding: Rounding
) -> tuple[list[Peaks], list[Elementwise]]:
    """The largest inputs of stages [first, last], which rounding starts from, and the roundings."""
    peaks = [Peaks(tap.K) for tap in taps[first : last + 1]]
    walk.stage(first, last, peaks, keep_taps=True, complete=False)
    return peaks, [partial(_rounded, rounding, float(peak.amax.max())) for peak in peaks]


def _rounded(rounding: Rounding, largest: float, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """x [.., K], rounded."""
    return np.asarray(rounding(x.reshape(-1, x.shape[-1]), largest), np.float32).reshape(x.shape)
