"""Linear layers between two Reshapes lose both, where that changes nothing."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from prepare_harness import check_pass, ops, parse

from qgraph.passes.infer_shapes import InferShapes
from qgraph.passes.unflatten_linear import UnflattenLinear

LAYER = """
        sizes = Shape<start = 0, end = 2>(x)
        flat = Reshape(x, matrix)
        product = MatMul(flat, w)"""
BEHIND = """
        target = Concat<axis = 0>(sizes, width)
        y = Reshape({}, target)"""


def graph(
    body: str, outputs: str = "", bias: tuple[int, ...] = (6,), matrix: tuple[int, ...] = (-1, 4)
) -> ir.Model:
    rng = np.random.default_rng(0)
    constants = {
        "matrix": np.array(matrix, np.int64),
        "width": np.array([6], np.int64),
        "w": rng.standard_normal((matrix[1], 6)).astype(np.float32),
    }
    if "bias" in body:
        constants["bias"] = rng.standard_normal(bias).astype(np.float32)
    return parse(f"(float[b, s, 4] x) => (float[b, s, 6] y{outputs}) {{{body}}}", **constants)


@pytest.mark.parametrize(
    ("sum_", "last"), [("", "product"), (" z = Add(product, bias)", "z"), (" z = Add(bias, product)", "z")]
)
def test_layer(sum_: str, last: str) -> None:
    model = check_pass(graph(LAYER + sum_ + BEHIND.format(last)), UnflattenLinear(), b=2, s=5)
    assert [op for op in ops(model) if op in ("MatMul", "Add", "Reshape")] == [
        "MatMul",
        *["Add"] * bool(sum_),
    ]
    assert model.graph.outputs[0].producer().op_type == ("Add" if sum_ else "MatMul")


def test_heads_are_merged() -> None:
    body = LAYER.replace("Reshape(x, matrix)", "Reshape(heads, matrix)") + BEHIND.format("product")
    model = graph(" heads = Unsqueeze(x, width)" + body)
    split = ir.Value(name="split", const_value=ir.tensor(np.array([0, 0, 2, 2])))
    model.graph.register_initializer(split)
    first = model.graph[0]
    first.op_type = "Reshape"
    first.replace_input_with(1, split)
    model = check_pass(model, UnflattenLinear(), b=2, s=5)
    assert [op for op in ops(model) if op in ("MatMul", "Reshape")] == ["Reshape", "Reshape", "MatMul"]
    assert [str(d) for d in model.graph.outputs[0].producer().inputs[0].shape] == ["b", "s", "4"]


def test_input_that_others_read() -> None:
    """The first Reshape stays for them."""
    body = LAYER + BEHIND.format("product") + " other = Neg(flat)"
    model = check_pass(graph(body, ", float[rows, 4] other"), UnflattenLinear(), b=2, s=5)
    assert ops(model).count("Reshape") == 1


@pytest.mark.parametrize(
    "model",
    [
        graph(LAYER + BEHIND.format("product") + " other = Neg(product)", ", float[rows, 6] other"),
        graph(LAYER + " z = Add(product, bias)" + BEHIND.format("z"), bias=(1, 6)),
        graph(LAYER + " z = Mul(product, bias)" + BEHIND.format("z")),
        graph(LAYER.replace("MatMul(flat, w)", "MatMul(flat, v)").replace("flat =", "v = Neg(w) flat =")
              + BEHIND.format("product")),
    ],
    ids=["result read twice", "bias of two axes", "another operator", "computed weights"],
)  # fmt: skip
def test_left_alone(model: ir.Model) -> None:
    InferShapes()(model)
    assert not UnflattenLinear()(model).modified


def test_other_rows() -> None:
    """Two tokens side by side are one row of the matrix."""
    body = LAYER.replace("sizes = Shape<start = 0, end = 2>(x)", "") + "y = Reshape(product, target)"
    model = graph(body, matrix=(-1, 8))
    target = ir.Value(name="target", const_value=ir.tensor(np.array([-1, 1, 6])))
    model.graph.register_initializer(target)
    model.graph.node("n2").replace_input_with(1, target)
    model.graph.inputs[0].shape = ir.Shape(["b", 2, 4])
    model.graph.outputs[0].shape = ir.Shape(["b", 1, 6])
    InferShapes()(model)
    assert not UnflattenLinear()(model).modified
