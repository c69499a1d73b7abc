"""Statistics of values of a float model, without quantizing anything."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qgraph.calibration.border import Border
from qgraph.calibration.data import Data, Feeds, model_inputs, open_data
from qgraph.calibration.moments import Moments, Peaks
from qgraph.calibration.segments import FrozenGraph
from qgraph.calibration.walk import Stream, Tap, Walk, make_taps, partition
from qgraph.calibration.workspace import scratch_folder
from qgraph.solvers._tiles import thread_count
from qgraph.solvers.statistics import Statistics

if TYPE_CHECKING:
    import onnx_ir as ir

MEMORY = 1 << 30  # bytes of sums at a time


def collect(
    model: ir.Model | str | os.PathLike[str],
    data: Data | str | os.PathLike[str] | Iterable[Feeds],
    values: Sequence[str] | None = None,
    *,
    threads: int | None = None,
    memory: int = MEMORY,
) -> dict[str, Statistics]:
    """Statistics of `values`, by name: of each by itself.

    Args:
        model: a prepared model, which is not changed, or an ONNX file, which is prepared.
        data: from `open_data`, or what that takes without options.
        values: float32 [.., K]; None: the inputs of all linear layers that `SelectLayers` chooses.
        threads: None is one for every CPU; the result does not depend on it.
        memory: bytes of sums at a time (8 K^2 a value): where more are asked for, the model runs in segments.
            All statistics together are in memory in the end, whatever this says.

    Raises:
        UsageError: an unknown value, or one that is not float32 [.., K].
        InputError: the model, the data, or values that are not finite; UnsupportedError: the model.
        ResourceError: no disk space for the values between two segments.
    """
    if isinstance(model, str | os.PathLike):
        from qgraph.passes import load_model, prepare_model

        model = prepare_model(load_model(model))
    data = open_data(data, model_inputs(model))
    names = list(dict.fromkeys(linear_inputs(model) if values is None else values))
    found: dict[str, Statistics] = {}

    def stage(walk: Walk, first: int, last: int, taps: Sequence[Tap]) -> None:
        moments = [Moments(tap.values[0], tap.K) for tap in taps]
        walk.stage(first, last, moments)
        found.update((moment.name, moment.finish()) for moment in moments)

    _walk(model, data, names, threads, memory, stage)
    return {name: found[name] for name in names}


def channel_amax(
    model: ir.Model, data: Data, *, threads: int | None = None, memory: int = MEMORY
) -> dict[str, npt.NDArray[np.float32]]:
    """The largest |x| of every channel, float32 [K], of the inputs of all linear layers that `SelectLayers`
    chose: `Statistics.amax` without the K^2 sums. Arguments and errors as of `collect`."""
    found: dict[str, npt.NDArray[np.float32]] = {}

    def stage(walk: Walk, first: int, last: int, taps: Sequence[Tap]) -> None:
        peaks = [Peaks(tap.K) for tap in taps]
        walk.stage(first, last, peaks)
        found.update((tap.values[0], peak.amax) for tap, peak in zip(taps, peaks, strict=True))

    _walk(model, data, linear_inputs(model), threads, memory, stage)
    return found


def _walk(
    model: ir.Model,
    data: Data,
    names: Iterable[str],
    threads: int | None,
    memory: int,
    stage: Callable[[Walk, int, int, Sequence[Tap]], None],
) -> None:
    """Leads `stage(walk, first, last, their taps)` through the float model, to each of `names` once."""
    graph = FrozenGraph(model)
    order = sorted(names, key=lambda name: graph.producer.get(name, -1))
    taps = make_taps(model, [(name,) for name in order])
    with scratch_folder() as folder:
        border = Border(folder)
        walk = Walk(data, taps, [Stream("float", graph, taps, border)], border, thread_count(threads))
        for first, last in partition(taps, memory):
            stage(walk, first, last, taps[first : last + 1])


def linear_inputs(model: ir.Model) -> list[str]:
    """The left operands of the layers that `SelectLayers` chose, or would choose as it is, in graph order."""
    from qgraph.passes.select_layers import DECISIONS, SelectLayers

    if DECISIONS not in model.meta:
        model = model.clone()
        SelectLayers()(model)
    chosen = {decision.node_name for decision in model.meta[DECISIONS] if decision.quantize}
    nodes = [n for n in model.graph if n.op_type == "MatMul" and n.name in chosen]
    return list(dict.fromkeys(str(n.inputs[0].name) for n in nodes if n.inputs[0] is not None))
