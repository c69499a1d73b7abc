"""Linear layers keep the axes of their input."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qgraph.passes.base import (
    GraphPass,
    add_initializer,
    constant,
    is_op,
    make_node,
    remove_dead,
    replace_value,
    shape_of,
    used_once,
)


class UnflattenLinear(GraphPass):
    """x W + b for Reshape(x -> [rows, K]) W + b, reshaped to the first axes of x. Runs on inferred shapes.

    Exporters write the linear layers of GPT-2 (`Conv1D`) as Gemm, which takes matrices only. Rules:
    1. Nothing else reads what is between the two Reshapes, and W and b are constants, b a vector.
    2. Where the last axis of W's input was several axes of x, such as heads, a Reshape still merges these.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in tuple(model.graph):
            if is_op(node, "Reshape") and node.inputs[0] is not None:
                modified |= _unflatten(node, node.inputs[0])
        return ir.passes.PassResult(model, modified)


def _unflatten(behind: ir.Node, result: ir.Value) -> bool:
    add = result.producer()
    product = result if add is None or not is_op(add, "Add") else _unbiased(add)
    layer = product.producer() if product is not None else None
    if product is None or layer is None or not is_op(layer, "MatMul") or not used_once(product):
        return False
    flat, weight = layer.inputs
    before = flat.producer() if flat is not None else None
    if before is None or flat is None or not is_op(before, "Reshape") or constant(weight) is None:
        return False
    x = before.inputs[0]
    source, matrix, target = shape_of(x), shape_of(flat), shape_of(behind.outputs[0])
    if x is None or source is None or matrix is None or target is None or not used_once(result):
        return False
    kept = len(target) - 1
    merged = [dim for dim in source[kept:] if isinstance(dim, int)]
    if len(matrix) != 2 or not merged or len(merged) < len(source) - kept or source[:kept] != target[:-1]:
        return False
    size = math.prod(merged)
    if size != matrix[1] or shape_of(result) != (matrix[0], target[-1]):
        return False
    if len(merged) > 1:
        x = _merge(before, x, kept, size)
    layer.replace_input_with(0, x)
    product.shape = result.shape = behind.outputs[0].shape
    if not replace_value(behind.outputs[0], result):
        raise AssertionError("a result that one node reads is no output of the graph")
    assert behind.graph is not None
    behind.graph.remove(behind, safe=True)
    remove_dead([flat])
    return True


def _merge(before: ir.Node, x: ir.Value, kept: int, size: int) -> ir.Value:
    """`x` with all its axes from `kept` on as one."""
    graph = before.graph
    assert isinstance(graph, ir.Graph) and x.shape is not None
    target = add_initializer(graph, np.array([*[0] * kept, size], np.int64), f"{before.name}.shape")
    node = make_node("Reshape", [x, target], name=before.name)
    graph.insert_before(before, node)
    node.outputs[0].type, node.outputs[0].shape = x.type, ir.Shape([*x.shape.dims[:kept], size])
    return node.outputs[0]


def _unbiased(add: ir.Node) -> ir.Value | None:
    """The other term of a sum with a constant vector."""
    for value, other in (add.inputs, add.inputs[::-1]):
        if constant(other) is not None and len(shape_of(other) or (0, 0)) == 1:
            return value
    return None
