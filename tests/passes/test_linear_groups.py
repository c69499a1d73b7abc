"""Groups of linear layers: who shares an input, in which order, and what a product is added to."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.passes.linear_groups import linear_groups

HEADER = '<ir_version: 10, opset_import: ["" : 23]>\n'


def groups(text: str, weights: dict[str, tuple[int, ...]]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Weights -> residuals of the groups of all MatMuls by a weight."""
    model = ir.from_onnx_text(HEADER + text)
    graph = model.graph
    for name, shape in weights.items():
        value = next(i for n in graph for i in n.inputs if i is not None and i.name == name)
        value.const_value = ir.Tensor(np.ones(shape, np.float32), name=name)
        value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        if value in graph.inputs:
            graph.inputs.remove(value)
        graph.register_initializer(value)
    for node in graph:  # what shape inference would say
        for value in node.outputs:
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["b", 32])
    nodes = [n for n in graph if n.op_type == "MatMul" and n.inputs[1].is_initializer()]
    return {group.weights: group.residuals for group in linear_groups(nodes)}


def test_layers_that_share_an_input_and_what_they_are_added_to():
    found = groups(
        """
        g (float[b, 32] x, float[32, 32] q, float[32, 32] k, float[32, 32] o, float[32] bias)
            => (float[b, 32] y) {
            a = MatMul(x, q)
            c = MatMul(x, k)
            m = Mul(a, c)
            p = MatMul(m, o)
            d = Add(p, bias)
            y = Add(x, d)
        }
        """,
        {"q": (32, 32), "k": (32, 32), "o": (32, 32), "bias": (32,)},
    )
    assert found == {("q", "k"): ("", ""), ("o",): ("x",)}


def test_a_product_that_something_else_reads_has_no_residual():
    found = groups(
        """
        g (float[b, 32] x, float[32, 32] w) => (float[b, 32] y, float[b, 32] z) {
            p = MatMul(x, w)
            y = Add(x, p)
            z = Relu(p)
        }
        """,
        {"w": (32, 32)},
    )
    assert found == {("w",): ("",)}


def test_what_is_only_known_after_the_layer_is_no_residual():
    """Parallel branches: the sum of the two, and then the residual."""
    found = groups(
        """
        g (float[b, 32] x, float[32, 32] w, float[32, 32] v) => (float[b, 32] y) {
            p = MatMul(x, w)
            r = Relu(x)
            s = MatMul(r, v)
            t = Add(p, s)
            y = Add(x, t)
        }
        """,
        {"w": (32, 32), "v": (32, 32)},
    )
    assert found == {("w",): ("",), ("v",): ("p",)}


def test_another_shape_is_no_residual():
    model = """
        g (float[1, 32] one, float[b, 32] x, float[32, 32] w) => (float[b, 32] y) {
            p = MatMul(x, w)
            y = Add(one, p)
        }
        """
    assert groups(model, {"w": (32, 32)}) == {("w",): ("",)}


def test_a_weight_of_two_layers_waits_for_the_last():
    found = groups(
        """
        g (float[b, 32] x, float[32, 32] w, float[32, 32] v) => (float[b, 32] y) {
            p = MatMul(x, w)
            q = MatMul(p, v)
            y = MatMul(q, w)
        }
        """,
        {"w": (32, 32), "v": (32, 32)},
    )
    assert list(found) == [("v",), ("w",)]
