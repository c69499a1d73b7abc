"""Where the mean of a quantized model is set right: D2Quant's deviation-aware correction (DAC), arXiv
2602.02546.

    InsertMeanShift     an Add of zeros behind norms
    QuantizeWeights     walks through groups of layers and these sites, measures, and puts the shifts in
    FuseMeanShift       folds them into the norm's bias, or the biases of the layers that read it

A shift is the mean, over calibration tokens, of what the float model has behind the norm less what the
quantized one has: with all before it quantized, and set right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph.passes.base import attribute, is_op
from qgraph.passes.linear_groups import Arrays, LinearGroup, MeanShiftSite, Stage
from qgraph.passes.lowbit_functions import DOMAIN
from qgraph.passes.lowbit_weights import LINEARS

MARK = "qgraph.mean_shift"  # key of metadata_props: the Add of a shift
SHIFTS = "qgraph.mean_shifts"  # key of model.meta: list[MeanShift], in the order of the walk


@dataclass(frozen=True)
class MeanShift:
    """What was found at one site."""

    node: str  # the Add
    relative_error: float  # E|x_float - x|^2 / E|x_float|^2 before it
    share: float  # of that error, which the shift takes away
    tokens: int  # of calibration data


def stages(graph: ir.Graph, groups: Sequence[LinearGroup]) -> list[Stage]:
    """The groups in their order, and each site of the graph as soon as all groups before it are done."""
    group_of = {name: i + 1 for i, group in enumerate(groups) for name in group.nodes}
    after: dict[ir.Value, int] = {}  # how many of the groups a value has to wait for
    sites: list[tuple[int, MeanShiftSite]] = []
    for node in graph:
        rank = max((after.get(value, 0) for value in node.inputs if value is not None), default=0)
        rank = max(rank, group_of.get(str(node.name), 0))
        after.update(dict.fromkeys(node.outputs, rank))
        if MARK in node.metadata_props:
            sites.append((rank, site_of(node)))
    found: list[Stage] = []
    for i in range(len(groups) + 1):
        found += [site for rank, site in sites if rank == i]
        found += groups[i : i + 1]
    return found


def site_of(add: ir.Node) -> MeanShiftSite:
    """The site of a marked Add."""
    value, shift = add.inputs
    assert value is not None and shift is not None and shift.shape is not None
    K = shift.shape[0]
    assert isinstance(K, int)
    return MeanShiftSite(str(value.name), str(add.name), str(shift.name), K)


def install(model: ir.Model, site: MeanShiftSite, record: Arrays) -> dict[str, npt.NDArray[np.float32]]:
    """Put the record of a site into the model: what `GroupHandler.apply` does with it."""
    shift = record["shift"]
    model.graph.initializers[site.shift].const_value = ir.Tensor(shift, name=site.shift)
    error, signal = (float(square) for square in record["error"])
    found = MeanShift(
        node=site.node,
        relative_error=error / signal if signal else 0.0,
        share=float(np.square(shift, dtype=np.float64).sum()) / error if error else 0.0,
        tokens=int(record["tokens"][0]),
    )
    model.meta.setdefault(SHIFTS, []).append(found)
    return {site.shift: shift}


def marked(graph: ir.Graph) -> Iterator[ir.Node]:
    """The Adds of shifts, in graph order."""
    return (node for node in graph if MARK in node.metadata_props)


def is_linear(node: ir.Node) -> bool:
    """Whether it multiplies by a constant weight [K, N], float or quantized."""
    if node.domain == DOMAIN:
        return node.op_type in LINEARS
    weight = node.inputs[1] if is_op(node, "MatMul") else None
    is_constant = weight is not None and weight.is_initializer() and not weight.is_graph_input()
    return is_constant and weight is not None and weight.shape is not None and len(weight.shape) == 2


def width(norm: ir.Node) -> int:
    """How many channels a LayerNormalization or RMSNormalization over the last axis alone has; 0 for any
    other node."""
    shape = norm.outputs[0].shape
    if not is_op(norm, "LayerNormalization", "RMSNormalization") or not shape:
        return 0
    last = attribute(norm, "axis", -1) in (-1, len(shape) - 1)
    K = shape[-1]
    return K if last and isinstance(K, int) and norm.outputs[0].dtype == ir.DataType.FLOAT else 0
