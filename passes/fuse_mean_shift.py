"""Folds the Adds that set the mean right into constants that are there, or may as well be."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph.passes.base import (
    GraphPass,
    add_behind,
    add_initializer,
    constant,
    describe,
    is_op,
    remove_dead,
    replace_value,
)
from qgraph.passes.channel_sources import change_constant
from qgraph.passes.lowbit_functions import DOMAIN
from qgraph.passes.lowbit_weights import from_node
from qgraph.passes.mean_shift import is_linear, marked, width

Vector = npt.NDArray[np.float32]


class FuseMeanShift(GraphPass):
    """norm(x) + d, d constant, at every site of InsertMeanShift: D2Quant (arXiv 2602.02546), exact.

    Rules: behind a LayerNormalization, its bias B becomes B + d, made if there is none, and a copy if others
    read it too. An RMSNormalization has no bias: where nothing but linear layers reads the sum, their own
    biases b become b + d W, with W as it is now, dequantized if it is quantized; made where there are none.
    Else, as where activations are rounded in between, the Add stays. Without effect (d = 0) it always goes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for add in tuple(marked(model.graph)):
            reason = _fold(add)
            modified |= not reason
            if reason:
                self.refuse(add, f"stays: {reason}")
        return ir.passes.PassResult(model, modified)


def _fold(add: ir.Node) -> str:
    """Folds the Add and removes it. Returns why that cannot be; nothing is changed then."""
    value, operand = add.inputs
    total, shift = add.outputs[0], constant(operand)
    norm = value.producer() if value is not None else None
    if value is None or norm is None or shift is None or width(norm) != shift.size:
        return "it is no longer the sum of a norm and a constant"
    if len(value.uses()) > 1 or value.is_graph_output():
        return f"{describe(value)} is read without it too"
    if shift.any():
        if is_op(norm, "LayerNormalization"):
            reason = _into_norm(norm, shift)
        else:
            reason = _into_layers(total, shift)
        if reason:
            return reason
    _remove(add)
    return ""


def _into_norm(norm: ir.Node, shift: Vector) -> str:
    bias = norm.inputs[2] if len(norm.inputs) > 2 else None
    graph = norm.graph
    assert isinstance(graph, ir.Graph)
    if bias is None:
        norm.resize_inputs(3)
        norm.replace_input_with(2, add_initializer(graph, shift, f"{norm.name}.bias"))
        return ""
    array = constant(bias)
    if array is None:
        return f"the bias {describe(bias)} of {describe(norm)} is no constant"
    change_constant(norm, 2, array + shift)
    return ""


def _into_layers(total: ir.Value, shift: Vector) -> str:
    readers = list(total.uses())
    if total.is_graph_output():
        return f"{describe(total)} is an output"
    for reader, index in readers:
        if index != 0 or not is_linear(reader):
            return f"{describe(reader)} reads it, and is no linear layer"
    for reader, _ in readers:
        _add_bias(reader, _product(shift, _weight(reader)))
    return ""


def _product(shift: Vector, W: Vector) -> Vector:
    """shift [K] times W [K, N], in float64: no BLAS, whose order of additions depends on its threads, and no
    float64 copy of W."""
    total = np.zeros(W.shape[1], np.float64)
    for d, row in zip(shift.astype(np.float64), W, strict=True):
        total += d * row
    return total.astype(np.float32)


def _weight(node: ir.Node) -> Vector:
    """[K, N]"""
    if node.domain == DOMAIN:
        return from_node(node).dequantize()
    weight = constant(node.inputs[1])
    assert weight is not None
    return weight


def _add_bias(layer: ir.Node, bias: Vector) -> None:
    """Adds a vector [N] to the output of a linear layer: to its bias, where it has one of its own."""
    y, graph = layer.outputs[0], layer.graph
    assert isinstance(graph, ir.Graph)
    uses = list(y.uses())
    if len(uses) == 1 and not y.is_graph_output():
        add, index = uses[0]
        old = constant(add.inputs[1]) if is_op(add, "Add") and index == 0 else None
        if old is not None and old.shape == bias.shape:
            change_constant(add, 1, old + bias)
            return
    held = add_initializer(graph, bias, f"{layer.name}.bias")
    add_behind(y, held, f"{layer.name}/bias", "unbiased")


def _remove(add: ir.Node) -> None:
    """Takes the Add out, which adds nothing any more: what it was added to has the name of the sum again."""
    value, shift, graph = add.inputs[0], add.inputs[1], add.graph
    total = add.outputs[0]
    assert value is not None and shift is not None and isinstance(graph, ir.Graph)
    name = total.name
    replace_value(total, value)
    remove_dead([total])
    value.name = name
    if not shift.uses() and not shift.is_graph_output():
        del graph.initializers[str(shift.name)]
