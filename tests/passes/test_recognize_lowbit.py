"""NVFP4 in standard operators comes back as low-bit layers; everything near it stays, with a reason."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from qgraph.passes import prepare_model
from qgraph.passes.lowbit_functions import AddLowbitFunctions, InlineLowbitFunctions
from qgraph.passes.quantize_weights import QuantizeWeights
from qgraph.passes.recognize_lowbit import RecognizeLowbit
from qgraph.passes.select_layers import SelectLayers

K, N = 40, 17  # a shorter last block, an odd number of outputs


def quantized() -> ir.Model:
    model = onnx.parser.parse_model(
        '<ir_version: 11, opset_import: ["" : 23]> net (float[B, 40] x) => (float[B, 17] y) {'
        " [up] h = MatMul(x, w) [relu] y = Relu(h) }"
    )
    weight = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    model = ir.from_proto(model)
    for step in (SelectLayers(), QuantizeWeights("nvfp4", "sweep"), AddLowbitFunctions()):
        step(model)
    return model


def written_out() -> ir.Model:
    model = quantized()
    InlineLowbitFunctions()(model)
    assert [n.op_type for n in model.graph] == ["DequantizeLinear", "DequantizeLinear", "MatMul", "Relu"]
    return ir.from_proto(ir.to_proto(model))  # as read from a file


def test_the_inverse_of_writing_out():
    model, want = written_out(), quantized()
    before = ir.to_proto(model)
    assert RecognizeLowbit()(model).modified
    assert [(n.op_type, n.name) for n in model.graph] == [(n.op_type, n.name) for n in want.graph]
    node = next(iter(model.graph))
    assert node.metadata_props["qgraph.scheme"] == "nvfp4"
    x = np.random.default_rng(1).standard_normal((3, K)).astype(np.float32)
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    np.testing.assert_array_equal(
        ReferenceEvaluator(after).run(None, {"x": x})[0], ReferenceEvaluator(before).run(None, {"x": x})[0]
    )
    assert not RecognizeLowbit()(model).modified


def test_prepare_recognises():
    model = prepare_model(written_out())
    assert [n.op_type for n in model.graph] == ["QLinearNVFP4", "Relu"]


def spoil_zero_point(outer: ir.Node, inner: ir.Node, graph: ir.Graph) -> None:
    zero = ir.Value(name="zero", const_value=ir.tensor(np.zeros((), ml_dtypes.float8_e4m3fn)))
    graph.register_initializer(zero)
    inner.resize_inputs(3)
    inner.replace_input_with(2, zero)


def spoil_block(outer: ir.Node, inner: ir.Node, graph: ir.Graph) -> None:
    outer.attributes.add(ir.AttrInt64("block_size", 32))


def spoil_axis(outer: ir.Node, inner: ir.Node, graph: ir.Graph) -> None:
    outer.attributes.add(ir.AttrInt64("axis", 1))


def spoil_type(outer: ir.Node, inner: ir.Node, graph: ir.Graph) -> None:
    outer.attributes.add(ir.AttrInt64("output_dtype", int(ir.DataType.FLOAT16)))


def spoil_scale(outer: ir.Node, inner: ir.Node, graph: ir.Graph) -> None:
    scale = ir.Value(name="s", const_value=ir.tensor(np.ones((3, N), np.float32)))
    graph.register_initializer(scale)
    outer.replace_input_with(1, scale)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_zero_point, "zero point"),
        (spoil_block, "not of 16"),
        (spoil_axis, "along the first axis"),
        (spoil_type, "not dequantized to float32"),
        (spoil_scale, "not a dequantized E4M3"),
    ],
)
def test_what_is_not_the_pattern_stays(spoil, reason):
    model = written_out()
    inner, outer = list(model.graph)[:2]
    spoil(outer, inner, model.graph)
    recognise = RecognizeLowbit()
    assert not recognise(model).modified
    assert len(recognise.refusals) == 1 and reason in recognise.refusals[0].reason
    assert [n.op_type for n in model.graph] == ["DequantizeLinear", "DequantizeLinear", "MatMul", "Relu"]
