"""The linear layers that are to be quantized, grouped by what they read.

Layers with the same input (query, key and value; gate and up) have the same statistics: calibration measures
them once. `Calibrator` and `GroupHandler` are the two sides of that meeting: calibration knows data and how
to run a model, `QuantizeWeights` knows what to do with a layer once its statistics are there. Between the
groups there may be places where the mean is set right (mean_shift.py): the stages of a walk are both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph.passes.base import is_op
from qgraph.solvers.statistics import Statistics

Arrays = dict[str, npt.NDArray]


@dataclass(frozen=True)
class LinearGroup:
    """Weights that are multiplied by the same values. Names only, so that it means the same in a copy of the
    model."""

    values: tuple[str, ...]  # the left operands, [.., K] each; several where layers share a weight
    nodes: tuple[str, ...]  # the MatMuls, in graph order
    weights: tuple[str, ...]  # their initializers [K, N], each once, in graph order
    K: int
    # For each weight the value that its product is added to (a residual connection), empty where there is
    # none that is known before the layer runs.
    residuals: tuple[str, ...] = ()


@dataclass(frozen=True)
class MeanShiftSite:
    """A vector that is added to every token of a value: to become the mean of what the float model has there
    and the quantized one lacks. Names, as of a group."""

    value: str  # [.., K]
    node: str  # the Add
    shift: str  # its second operand, an initializer [K]
    K: int

    @property
    def values(self) -> tuple[str, ...]:
        """What is measured."""
        return (self.value,)

    @property
    def nodes(self) -> tuple[str, ...]:
        """What reads the vector."""
        return (self.node,)

    @property
    def weights(self) -> tuple[str, ...]:
        """The initializers that change."""
        return (self.shift,)


Stage = LinearGroup | MeanShiftSite


class GroupHandler(Protocol):
    """What happens to a group once its statistics are known."""

    def solve(self, group: LinearGroup, statistics: Statistics) -> Arrays:
        """Quantize; the result as named arrays, of data types that safetensors has, enough for `apply` to go
        on from.

        Reads the model, does not change it. The same arguments give the same arrays.
        """

    def apply(self, stage: Stage, record: Arrays) -> Mapping[str, npt.NDArray[np.float32]]:
        """Put the record of `solve`, or of what was measured at a site, into effect, be it fresh or from an
        earlier run that was interrupted.

        record: of a site: `shift` float32 [K], the mean of x_float - x; `error` float64 [2], the means of
            |x_float - x|^2 and of |x_float|^2; `tokens` int64 [1].

        Returns the initializers of the stage as they are from now on, weights dequantized [K, N], by name.
        """


class Calibrator(Protocol):
    """Something that knows the statistics of every group."""

    def walk(self, model: ir.Model, stages: Sequence[Stage], handler: GroupHandler) -> None:
        """For every group, in order, `handler.solve` and `handler.apply`; for every site `handler.apply`.

        Args:
            model: the prepared float model; `handler` changes it as the walk goes on, so that what is needed
                of it is copied before the first call.
            stages: the groups from `linear_groups`, and `mean_shift.stages` with them.
        """


def linear_groups(nodes: Sequence[ir.Node]) -> list[LinearGroup]:
    """The groups of these MatMuls by constant weights; `nodes` is in graph order.

    Ordered by the last node of each: when that is reached, all that a group needs has been computed.
    """
    readers: dict[ir.Value, list[int]] = {}  # weight -> positions in `nodes`
    for i, node in enumerate(nodes):
        assert node.inputs[1] is not None
        readers.setdefault(node.inputs[1], []).append(i)
    members: dict[tuple[str, ...], list[ir.Value]] = {}  # values -> weights
    for weight, positions in readers.items():
        read = dict.fromkeys(_input_name(nodes[i]) for i in positions)
        members.setdefault(tuple(read), []).append(weight)
    graph = nodes[0].graph if nodes else None
    order = {node: i for i, node in enumerate(graph)} if graph is not None else {}
    found = []
    for values, weights in members.items():
        positions = sorted(i for weight in weights for i in readers[weight])
        K = weights[0].shape[0] if weights[0].shape is not None else None
        assert isinstance(K, int)
        names = tuple(str(weight.name) for weight in weights)
        residuals = tuple(
            _residual(nodes[readers[weight][0]], order) if len(readers[weight]) == 1 else ""
            for weight in weights
        )
        found.append(
            (
                positions[-1],
                LinearGroup(values, tuple(str(nodes[i].name) for i in positions), names, K, residuals),
            )
        )
    return [group for _, group in sorted(found, key=lambda item: item[0])]


def _residual(node: ir.Node, order: Mapping[ir.Node, int]) -> str:
    """What the product of this MatMul, with or without a bias, is added to; empty if to nothing."""
    value = node.outputs[0]
    for _ in range(2):
        uses = list(value.uses())
        if len(uses) != 1 or value.is_graph_output() or not is_op(uses[0][0], "Add"):
            return ""
        add, index = uses[0]
        other = add.inputs[1 - index]
        if other is None or other is value:
            return ""
        if not other.is_initializer():
            producer = other.producer()
            known = producer is None or order.get(producer, len(order)) < order.get(node, -1)
            same = other.shape is not None and other.shape == value.shape
            return str(other.name) if known and same and other.dtype == ir.DataType.FLOAT else ""
        value = add.outputs[0]
    return ""


def _input_name(node: ir.Node) -> str:
    assert node.inputs[0] is not None
    return str(node.inputs[0].name)
