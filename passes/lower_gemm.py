"""Gemm becomes MatMul and Add."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.passes.base import (
    GraphPass,
    add_initializer,
    attribute,
    constant,
    is_op,
    make_node,
    replace_node,
    used_once,
)


class LowerGemm(GraphPass):
    """Gemm(A, B, C) = alpha * A' B' + beta * C  ->  Add(MatMul(A', B'), C).

    Rules: transposes become Transpose nodes (`orient_weights` then turns constant weights); alpha is
    multiplied into a constant B that nobody else reads, else it is a Mul; beta likewise into C; C disappears
    with beta = 0. The MatMul keeps the node's name.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in tuple(model.graph):
            if is_op(node, "Gemm"):
                self._lower(model.graph, node)
                modified = True
        return ir.passes.PassResult(model, modified)

    def _lower(self, graph: ir.Graph, node: ir.Node) -> None:
        a, b = node.inputs[0], node.inputs[1]
        c = node.inputs[2] if len(node.inputs) > 2 else None
        assert a is not None and b is not None
        alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
        nodes: list[ir.Node] = []
        if alpha != 1.0:
            b, scaled = _scaled(graph, b, alpha, f"{node.name}.alpha")
            nodes += scaled
        for flag, side in (("transA", 0), ("transB", 1)):
            if attribute(node, flag, 0):
                turned = make_node(
                    "Transpose", [a if side == 0 else b], {"perm": [1, 0]}, name=f"{node.name}/{flag}"
                )
                nodes.append(turned)
                if side == 0:
                    a = turned.outputs[0]
                else:
                    b = turned.outputs[0]
        nodes.append(make_node("MatMul", [a, b], name=node.name))
        if c is not None and beta != 0.0:
            product = nodes[-1].outputs[0]
            if beta != 1.0:
                c, scaled = _scaled(graph, c, beta, f"{node.name}.beta")
                nodes += scaled
            nodes.append(make_node("Add", [product, c], name=f"{node.name}/bias"))
        replace_node(node, nodes)


def _scaled(graph: ir.Graph, value: ir.Value, factor: float, name: str) -> tuple[ir.Value, list[ir.Node]]:
    """`factor * value`: a new constant where nobody else needs the old one, else a Mul node."""
    array = constant(value)
    if array is not None and used_once(value):
        return add_initializer(
            graph, np.asarray(array * array.dtype.type(factor)), f"{value.name}.scaled"
        ), []
    dtype = (value.dtype or ir.DataType.FLOAT).numpy()
    node = make_node(
        "Mul", [value, add_initializer(graph, np.array(factor, dtype), name)], name=f"{name}/mul"
    )
    return node.outputs[0], [node]
