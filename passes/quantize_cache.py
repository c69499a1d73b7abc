"""Stores keys and values of a cache in 8 bits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.errors import UsageError
from qgraph.passes.base import (
    GraphPass,
    add_initializer,
    attribute,
    is_op,
    make_node,
    replace_node,
    shape_of,
)
from qgraph.passes.quantize_activations import quantize_input


class QuantizeCache(GraphPass):
    """Rounds what goes into a cache to int8, with a scale for every token and head.

    Rules: `k` and `v` of every Attention with a past go through a `DynamicQDQInt8` (along head_dim) first.
    What comes back as past has gone through it already. Codegen stores the codes and scales instead of the
    values that they stand for. Where the heads of q, k and v lie side by side in one axis, as an Attention of
    three dims has them, they get an axis of their own first.

    Raises UsageError for a graph without such an Attention.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in model.graph if is_op(node, "Attention") and _past(node)]
        if not found:
            raise UsageError(
                "kv_cache 'int8': the model has no cache of keys and values (inputs past_key_values.*, "
                "outputs present.*): export it with one"
            )
        for node in [_with_heads_apart(node) for node in found]:
            for index in (1, 2):
                value = node.inputs[index]
                assert value is not None
                node.replace_input_with(index, quantize_input(value, "int8", None))
        return ir.passes.PassResult(model, True)


def _with_heads_apart(attention: ir.Node) -> ir.Node:
    """The same Attention, or in its place one of [batch, heads, length, width]. Shapes are known."""
    if attribute(attention, "q_num_heads", None) is None:
        return attention
    graph = attention.graph
    assert isinstance(graph, ir.Graph)
    added, apart = [], []
    for value, heads in zip(attention.inputs[:3], ("q", "kv", "kv"), strict=True):
        count = attribute(attention, f"{heads}_num_heads", None)
        shape = shape_of(value)
        assert value is not None and shape is not None
        batch, length, width = shape
        split = make_node("Reshape", [value, _shape(graph, [0, 0, count, -1], f"{value.name}/heads")])
        turned = make_node("Transpose", [split.outputs[0]], {"perm": [0, 2, 1, 3]})
        turned.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        turned.outputs[0].shape = ir.Shape([batch, count, length, int(width) // count])  # type: ignore[arg-type]
        turned.outputs[0].name = f"{attention.name}/{value.name}"
        added += [split, turned]
        apart.append(turned.outputs[0])
    options = {
        name: a.value
        for name, a in attention.attributes.items()
        if name not in ("q_num_heads", "kv_num_heads")
    }
    node = ir.node(
        "Attention",
        [*apart, *attention.inputs[3:]],
        options,
        num_outputs=len(attention.outputs),
        name=attention.name,
    )
    back = make_node("Transpose", [node.outputs[0]], {"perm": [0, 2, 1, 3]})
    joined = make_node("Reshape", [back.outputs[0], _shape(graph, [0, 0, -1], f"{attention.name}/joined")])
    replace_node(attention, [*added, node, back, joined], [joined.outputs[0], *node.outputs[1:]])
    return node


def _shape(graph: ir.Graph, dims: list[int], name: str) -> ir.Value:
    return add_initializer(graph, np.array(dims, np.int64), name)


def _past(attention: ir.Node) -> bool:
    return len(attention.inputs) > 5 and attention.inputs[4] is not None
