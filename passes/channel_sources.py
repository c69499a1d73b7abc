"""What can take a transform of the channels of its output into its own constants: norms, products with a
constant vector, linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph.passes.base import GraphPass, add_initializer, attribute, constant, describe, is_op
from qgraph.passes.channel_flow import Flow, Tracer
from qgraph.passes.select_layers import DECISION, DECISIONS


@dataclass(frozen=True, eq=False)
class Source:
    """A node whose output channels follow from constants."""

    node: ir.Node
    indices: tuple[int, ...]  # of the inputs that are constants [.., C]: scale and bias, or the weight [K, C]
    flow: Flow

    @property
    def is_linear(self) -> bool:
        """Whether it mixes no channels after its weight, so that linear maps of channels fold into it too."""
        return self.node.op_type == "MatMul"

    def obstacle(self) -> str:
        """Why its constants may not change; empty when they may."""
        if not self.is_linear:
            return ""
        weight = self.node.inputs[1]
        assert weight is not None
        if len(weight.uses()) > 1 or weight.is_graph_output():
            return f"{describe(self.node)} shares its weight"
        return ""


def sources(graph: ir.Graph) -> Iterator[Source]:
    """The nodes of `graph` from which a constant weight can be reached, in order, and what they reach."""
    tracer = Tracer(graph)
    for node in graph:
        indices = _indices(node)
        if not indices or tracer.shape(node.outputs[0]) is None:
            continue
        flow = tracer.flow(node.outputs[0])
        if flow.sinks:
            yield Source(node, indices, flow)


def chosen_matmuls(model: ir.Model) -> list[ir.Node]:
    """The MatMuls that `SelectLayers` chose, in graph order."""
    return [n for n in model.graph if is_op(n, "MatMul") and DECISION in n.meta and n.meta[DECISION].quantize]


def require_selected_once(step: GraphPass, model: ir.Model, mark: str) -> None:
    """For `GraphPass.requires`: `SelectLayers` has run, and `step`, which leaves `mark` in model.meta, has
    not."""
    name = type(step).__name__
    if DECISIONS not in model.meta:
        raise ir.passes.PreconditionError(f"{name} runs after SelectLayers")
    if mark in model.meta:
        raise ir.passes.PreconditionError(f"{name} runs once")


def operand(node: ir.Node, index: int) -> ir.Value:
    """An input that is there."""
    value = node.inputs[index]
    assert value is not None
    return value


def floats(node: ir.Node, index: int) -> npt.NDArray[np.float32]:
    """The array of an input that is a constant."""
    array = constant(node.inputs[index])
    assert array is not None
    return array


def change_constant(node: ir.Node, index: int, array: npt.NDArray[np.float32]) -> None:
    """Input `index` of `node` becomes `array`; what else reads the old constant keeps it."""
    old = node.inputs[index]
    assert old is not None and isinstance(node.graph, ir.Graph)
    before = constant(old)
    if before is not None and np.array_equal(before, array):
        return
    if len(old.uses()) > 1 or old.is_graph_output():
        node.replace_input_with(index, add_initializer(node.graph, array, f"{old.name}.{node.name}"))
    else:
        old.const_value = ir.Tensor(array, name=old.name)


def _indices(node: ir.Node) -> tuple[int, ...]:
    """The inputs of `node` whose channels are those of its output; none where it is no source."""
    if is_op(node, "LayerNormalization", "RMSNormalization"):
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        indices = tuple(i for i in (1, 2) if i < len(node.inputs) and node.inputs[i] is not None)
        if shape is None or attribute(node, "axis", -1) not in (-1, len(shape) - 1):
            return ()
        return indices if all(_is_vector(node, i) for i in indices) else ()
    if is_op(node, "Mul"):
        return (1,) if _is_vector(node, 1) else ()
    if is_op(node, "MatMul"):
        array = node.inputs[1]
        floats = array is not None and array.dtype == ir.DataType.FLOAT and array.is_initializer()
        is_matrix = floats and array is not None and array.shape is not None and len(array.shape) == 2
        return (1,) if is_matrix and array is not None and not array.is_graph_input() else ()
    return ()


def _is_vector(node: ir.Node, index: int) -> bool:
    """Whether an input is a constant float32 with one number for each channel of the output."""
    value, shape = node.inputs[index], node.outputs[0].shape
    if value is None or not value.is_initializer() or value.is_graph_input() or not shape:
        return False
    return (
        value.dtype == ir.DataType.FLOAT
        and value.shape is not None
        and 0 < len(value.shape) <= len(shape)
        and value.shape[-1] == shape[-1]
        and all(dim == 1 for dim in value.shape[:-1])
    )
