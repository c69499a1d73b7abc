# ruff: noqa: E501 (one graph a line is easier to read)
"""Outputs: what the file declares, what inference finds, and what the passes leave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from prepare_harness import feeds_for, parse, parse_proto, run_ort

from qgraph.errors import InputError, QGraphError
from qgraph.passes import load_model, prepare_model
from qgraph.passes.base import Refusal
from qgraph.passes.hold_outputs import DeclareOutputs, HoldOutputs
from qgraph.passes.infer_shapes import InferShapes

W = np.ones((4, 6), np.float32)
BODY = "{ y = MatMul(x, w) }"


@pytest.mark.parametrize(
    ("declared", "shown"),
    [
        ("int64[b,6]", "INT64 [b, 6]"),
        ("float[b,99]", "FLOAT [b, 99]"),
        ("float[b,6,1]", "FLOAT [b, 6, 1]"),
        ("float[6]", "FLOAT [6]"),
        ("float[0,0]", "FLOAT [0, 0]"),
        ("double", "DOUBLE"),
        ("seq(float)", "Sequence(Tensor(FLOAT))"),
    ],
)
def test_a_lying_declaration_is_refused(declared: str, shown: str) -> None:
    model = parse(f"(float[b,4] x) => ({declared} y) {BODY}", w=W)
    with pytest.raises(InputError) as caught:
        prepare_model(model)
    assert f"output 'y' is declared as {shown}" in str(caught.value)
    assert "computes FLOAT [b, 6]" in str(caught.value)


@pytest.mark.parametrize(
    "declared", ["float[b,6]", "float[other,name]", "float[]", "float[?,?]", "float[2,6]"]
)
def test_an_open_or_traced_declaration_is_accepted(declared: str) -> None:
    """Names are made up by exporters; a traced size stands where only the input was said to be dynamic."""
    refusals: list[Refusal] = []
    model = parse(f"(float[b,4] x) => ({declared} y) {BODY}", w=W)
    prepare_model(model, refusals=refusals)
    assert str(model.graph.outputs[0].shape) == "[b,6]"
    assert ("axis 0 is declared 2 but is 'b'" in str(refusals[0]) if refusals else False) == ("2" in declared)


def test_minus_one_is_an_open_dimension() -> None:
    proto = parse_proto(f"(float[b,4] x) => (float[b,6] y) {BODY}", w=W)
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = -1
    prepare_model(ir.from_proto(proto))


def test_the_first_declaration_counts_when_prepared_again() -> None:
    model = parse(f"(float[b,4] x) => (float[c,d] y) {BODY}", w=W)
    prepare_model(prepare_model(model))


def passthrough(tmp_path: Path, output: onnx.ValueInfoProto) -> Path:
    proto = parse_proto("(float[b,4] x) => (float[b,4] y) { y = Relu(x) }")
    proto.graph.output.append(output)
    onnx.save(proto, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_an_input_that_is_an_output_keeps_its_declaration(tmp_path: Path) -> None:
    path = passthrough(tmp_path, helper.make_tensor_value_info("x", TensorProto.FLOAT, None))
    model = prepare_model(load_model(path))
    assert str(model.graph.inputs[0].shape) == "[b,4]"


@pytest.mark.parametrize(("kind", "dims"), [(TensorProto.INT64, ["b", 4]), (TensorProto.FLOAT, [9])])
def test_an_input_that_is_an_output_is_declared_once(tmp_path: Path, kind: int, dims: list) -> None:
    path = passthrough(tmp_path, helper.make_tensor_value_info("x", kind, dims))
    with pytest.raises(InputError, match="output 'x' is declared as"):
        load_model(path)


# -- a pass with a defect ------------------------------------------------------------------------------------


def held(text: str) -> ir.Model:
    model = parse(text)
    for step in (DeclareOutputs(), InferShapes(), HoldOutputs()):
        step(model)
    return model


def swap(model: ir.Model, node: ir.Node) -> None:
    """Lets another node compute the output, as a wrong pass would."""
    old = model.graph.outputs[0]
    model.graph.append(node)
    model.graph.outputs[0] = node.outputs[0]
    node.outputs[0].name, old.name = old.name, None
    InferShapes()(model)


WRONG = {
    "rank": (
        lambda x: ir.node("Unsqueeze", [x, _axes(x, 0)]),
        r"was FLOAT \[b, s\] and a pass made it FLOAT \[1, b, s\]",
    ),
    "dtype": (lambda x: ir.node("Cast", [x], {"to": int(ir.DataType.INT64)}), r"made it INT64 \[b, s\]"),
    "order": (lambda x: ir.node("Transpose", [x], {"perm": [1, 0]}), r"made it FLOAT \[s, b\]"),
    "size": (lambda x: ir.node("Concat", [x, x], {"axis": 1}), r"made it FLOAT \[b, 2\*s\]"),
}


def _axes(x: ir.Value, axis: int) -> ir.Value:
    value = ir.Value(name="axes", const_value=ir.tensor(np.array([axis], np.int64)))
    value.shape, value.type = ir.Shape([1]), ir.TensorType(ir.DataType.INT64)
    x.graph.register_initializer(value)
    return value


@pytest.mark.parametrize("name", WRONG)
def test_a_pass_that_changes_an_output_is_a_defect(name: str) -> None:
    change, message = WRONG[name]
    model = held("(float[b,s] x) => (float[b,s] y) { y = Relu(x) }")
    swap(model, change(model.graph.inputs[0]))
    with pytest.raises(QGraphError, match=message) as caught:
        HoldOutputs()(model)
    assert type(caught.value) is QGraphError


def test_a_pass_that_renames_an_output_is_a_defect() -> None:
    model = held("(float[b,s] x) => (float[b,s] y) { y = Relu(x) }")
    model.graph.outputs[0].name = "z"
    with pytest.raises(QGraphError, match="output 'y' was"):
        HoldOutputs()(model)


def test_the_same_size_written_differently_is_kept() -> None:
    """A later inference may learn that two dimensions are one, or write a size in another way."""
    model = held("(float[b,s] x, float[b,t] z) => (float[b,n] y) { y = Concat<axis=1>(x, z) }")
    other = model.graph.inputs[1]
    other.shape = model.graph.inputs[0].shape
    InferShapes()(model)
    assert str(model.graph.outputs[0].shape) == "[b,2*s]"
    HoldOutputs()(model)


def test_prepare_runs_the_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fusion that loses an axis does not get out of `prepare`."""
    from qgraph.passes import fuse_gelu

    monkeypatch.setattr(fuse_gelu, "same_shape", lambda a, b: True)
    model = parse(GELU, **gelu_constants((1, 1, 1)))
    with pytest.raises(QGraphError, match=r"was FLOAT \[1, b, 8\] and a pass made it FLOAT \[b, 8\]"):
        prepare_model(model)


GELU = "(float[b,8] x) => (float[i,j,k] y) { a = Div(x, r) e = Erf(a) f = Add(e, o) g = Mul(x, f) y = Mul(g, h) }"


def gelu_constants(shape: tuple[int, ...], where: str = "r") -> dict[str, np.ndarray]:
    numbers = {"r": np.sqrt(2), "o": 1.0, "h": 0.5}
    return {k: np.full(shape if k == where else (), v, np.float32) for k, v in numbers.items()}


@pytest.mark.parametrize("where", ["r", "o", "h"])
def test_prepared_gelu_keeps_the_rank(where: str) -> None:
    model = parse(GELU, **gelu_constants((1, 1, 1), where))
    feeds = feeds_for(model, b=2)
    (expected,) = run_ort(model, feeds)
    prepare_model(model)
    (found,) = run_ort(model, feeds)
    assert found.shape == expected.shape == (1, 2, 8)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert str(model.graph.outputs[0].shape) == "[1,b,8]"
