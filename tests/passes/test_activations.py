"""Activations in low precision: the bodies, the numpy functions and a readable reference agree bit for bit;
the nodes stand where they should; both styles of file say the same."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from qgraph.errors import InputError, UnsupportedError
from qgraph.formats import nvfp4
from qgraph.formats.activations import dynamic_int8, dynamic_nvfp4
from qgraph.passes import prepare_model
from qgraph.passes.infer_shapes import InferShapes
from qgraph.passes.lowbit_functions import AddLowbitFunctions, InlineLowbitFunctions
from qgraph.passes.match_body import match_body
from qgraph.passes.quantize_activations import quantize_input
from qgraph.passes.recognize_lowbit import RecognizeLowbit
from qgraph.report import layers_of

FORMATS = ("nvfp4", "int8")
SIZES = (1, 15, 16, 17, 31, 172, 384)
A = np.float32(0.003)


def awkward(K: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """[12, K]: rows of every magnitude, zeros of both signs, ties, one huge element, NaN and infinity."""
    rng = np.random.default_rng(seed + K)
    x = rng.standard_normal((12, K)) * np.exp(4 * rng.standard_normal((12, 1)))
    x[0], x[1] = 0.0, -0.0
    x[2] = rng.integers(-24, 25, K) / 4 * np.float64(A)  # ties of E2M1 where the block scale is 1
    x[2, 0] = 6 * np.float64(A)
    x[3] *= 1e-42 / np.abs(x[3]).max()
    x[4] *= 3e38 / np.abs(x[4]).max()
    x[5, K // 2] = 1e6
    x[6] = 6 * np.float64(A) * np.linspace(0.0005, 460, K)  # block scales from below 2^-9 to beyond 448
    x[7, :] = -np.abs(x[7])
    x[8, -1] = np.nan
    x[9, 0] = -np.inf
    return x.astype(np.float32)


def reference(x: npt.NDArray[np.float32], activation_format: str) -> npt.NDArray[np.float32]:
    """One block and one element at a time, by the casts of ml_dtypes."""
    y = np.empty_like(x)
    with np.errstate(all="ignore"):
        for row, out in zip(x, y, strict=True):
            if activation_format == "int8":
                s = np.maximum(np.abs(row).max() / np.float32(127), np.float32(2.0**-126))
                out[:] = [np.rint(v / s) * s for v in row]
                continue
            for start in range(0, len(row), 16):
                block = row[start : start + 16]
                wanted = np.abs(block).max() / (np.float32(6) * A)
                d = np.clip(wanted, np.float32(2.0**-9), np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
                s = np.float32(d) * A
                codes = (block / s).astype(ml_dtypes.float4_e2m1fn)
                out[start : start + 16] = codes.astype(np.float32) * s
    return y


def assert_same_bits(got: npt.NDArray[np.float32], want: npt.NDArray[np.float32]) -> None:
    """Equal, signs of zeros included; any NaN equals any other."""
    assert got.dtype == want.dtype == np.float32 and got.shape == want.shape
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got[~nan].view(np.int32), want[~nan].view(np.int32))


def numpy_function(x: npt.NDArray[np.float32], activation_format: str) -> npt.NDArray[np.float32]:
    return dynamic_nvfp4(x, A) if activation_format == "nvfp4" else dynamic_int8(x)


def model_of(activation_format: str, shape: str, opset: int = 23) -> ir.Model:
    """x -> y = rounded x, the node placed by `quantize_input`."""
    header = f'<ir_version: 11, opset_import: ["" : {opset}]>'
    text = f"net (float[{shape}] x) => (float[{shape}] y) {{ y = Relu(x) }}"
    model = ir.from_proto(onnx.parser.parse_model(f"{header} {text}"))
    x, relu = model.graph.inputs[0], model.graph[0]
    rounded = quantize_input(x, activation_format, float(A) * 6 * 448)
    relu.replace_input_with(0, rounded)
    ir.convenience.replace_nodes_and_values(model.graph, relu, [relu], [], relu.outputs, [rounded])
    AddLowbitFunctions()(model)
    return model


def evaluate(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    """By ONNX's reference, after all of its checks."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(proto).run(None, feeds)


def test_the_global_scale_is_the_calibrated_one():
    scale = next(iter(model_of("nvfp4", "B,16").graph.initializers.values()))
    assert scale.name == "x.act_scale"
    assert scale.const_value.numpy() == nvfp4.global_scale(float(A) * 6 * 448) == A


@pytest.mark.parametrize("activation_format", FORMATS)
@pytest.mark.parametrize("K", SIZES)
def test_numpy_is_the_reference(activation_format, K):
    x = awkward(K)
    before = x.copy()
    assert_same_bits(numpy_function(x, activation_format), reference(x, activation_format))
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("activation_format", FORMATS)
@pytest.mark.parametrize("K", SIZES)
@pytest.mark.parametrize("opset", [23, 25])
def test_both_styles_are_the_numpy_function(activation_format, K, opset):
    x = awkward(K)
    want = numpy_function(x, activation_format)
    model = model_of(activation_format, f"B,{K}", opset)
    assert [node.domain for node in model.graph] == ["ai.qgraph"]
    assert_same_bits(evaluate(model, x=x)[0], want)
    InlineLowbitFunctions()(model)
    assert not model.functions and all(node.domain == "" for node in model.graph)
    assert_same_bits(evaluate(model, x=x)[0], want)


@pytest.mark.parametrize("activation_format", FORMATS)
@pytest.mark.parametrize("shape", [(40,), (2, 3, 40), (2, 1, 2, 17)])
def test_any_rank(activation_format, shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    want = reference(x.reshape(-1, shape[-1]), activation_format).reshape(shape)
    assert_same_bits(numpy_function(x, activation_format), want)
    model = model_of(activation_format, ",".join(map(str, shape)))
    assert_same_bits(evaluate(model, x=x)[0], want)


def test_every_e4m3_boundary_of_the_block_scale():
    """Block scales at, just below and just above every tie of E4M3, from below the smallest to beyond the
    largest."""
    values = np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = np.concatenate([values, (values[1:] + values[:-1]) / 2, [2.0**-10, 2.0**-11, 449, 464, 480]])
    amax = (ties * 6).astype(np.float32)
    x = np.stack([np.nextafter(amax, 0), amax, np.nextafter(amax, np.float32(np.inf))])[..., None]
    with np.errstate(all="ignore"):
        d = np.clip(x / np.float32(6), 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        want = (x / d).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * d
    assert_same_bits(dynamic_nvfp4(x, 1.0), want.astype(np.float32))


def test_rounding_in_chunks_of_rows_changes_nothing():
    x = np.random.default_rng(0).standard_normal((700, 172)).astype(np.float32)
    for activation_format in FORMATS:
        whole = numpy_function(x, activation_format)
        rows = np.concatenate([numpy_function(x[i : i + 100], activation_format) for i in range(0, 700, 100)])
        assert_same_bits(whole, rows)
        assert_same_bits(numpy_function(np.asfortranarray(x), activation_format), whole)
    assert dynamic_int8(x[:0]).shape == dynamic_nvfp4(x[:0], A).shape == (0, 172)


def test_it_is_as_close_as_the_formats_allow():
    x = np.random.default_rng(0).standard_normal((256, 384)).astype(np.float32)
    a = nvfp4.global_scale(float(np.abs(x).max()))
    assert np.square(dynamic_nvfp4(x, a) - x).sum() / np.square(x).sum() < 0.011
    assert np.square(dynamic_int8(x) - x).sum() / np.square(x).sum() < 1e-4


@pytest.mark.parametrize("bad", [np.zeros(4), np.zeros((2, 0), np.float32), np.array(1.0, np.float32)])
def test_what_is_no_rows_of_float32(bad):
    with pytest.raises(InputError, match="float32"):
        dynamic_nvfp4(bad, A)
    with pytest.raises(InputError, match="float32"):
        dynamic_int8(bad)


@pytest.mark.parametrize("a", [0.0, -1.0, 1e-40, np.inf, np.nan])
def test_what_is_no_scale(a):
    with pytest.raises(InputError, match="global scale"):
        dynamic_nvfp4(np.ones((1, 16), np.float32), a)


# Where the nodes stand


def layers() -> ir.Model:
    """h feeds two products and a residual, the input x one product."""
    text = """<ir_version: 11, opset_import: ["" : 23]> net (float[B, 40] x) => (float[B, 40] y) {
      [up] h = MatMul(x, w) [q] a = MatMul(h, w) [k] b = MatMul(h, w)
      [sum] c = Add(a, b) [rest] y = Add(c, h) }"""
    proto = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    model = ir.from_proto(proto)
    InferShapes()(model)
    return model


def quantize_all(model: ir.Model, activation_format: str, amax: float = 2.0) -> None:
    for node in tuple(model.graph):
        if node.op_type == "MatMul":
            node.replace_input_with(0, quantize_input(node.inputs[0], activation_format, amax))
    AddLowbitFunctions()(model)


@pytest.mark.parametrize("activation_format", FORMATS)
def test_layers_share_a_node(activation_format):
    model = layers()
    quantize_all(model, activation_format)
    op_type = {"nvfp4": "DynamicQDQNVFP4", "int8": "DynamicQDQInt8"}[activation_format]
    assert [node.name for node in model.graph] == [
        f"x/{activation_format}", "up", f"h/{activation_format}", "q", "k", "sum", "rest",
    ]  # fmt: skip
    by_name = {node.name: node for node in model.graph}
    rounded = by_name[f"h/{activation_format}"]
    assert rounded.op_identifier() == ("ai.qgraph", op_type, "")
    assert by_name["q"].inputs[0] is by_name["k"].inputs[0] is rounded.outputs[0]
    assert by_name["rest"].inputs[1].name == "h"  # the residual is not rounded
    assert layers_of(layers())[0].activations == "float32"
    assert rounded.outputs[0].shape == by_name["up"].outputs[0].shape
    assert rounded.outputs[0].dtype == ir.DataType.FLOAT
    assert set(model.graph.initializers) == {"w"} | (
        {"x.act_scale", "h.act_scale"} if activation_format == "nvfp4" else set()
    )
    x = np.random.default_rng(1).standard_normal((3, 40)).astype(np.float32)
    w = model.graph.initializers["w"].const_value.numpy()
    half = {"nvfp4": lambda v: dynamic_nvfp4(v, nvfp4.global_scale(2.0)), "int8": dynamic_int8}[
        activation_format
    ]
    h = half(x) @ w
    a = half(h) @ w
    np.testing.assert_allclose(evaluate(model, x=x)[0], a + a + h, rtol=1e-5, atol=1e-5)


def test_another_scale_is_another_node():
    model = layers()
    h = model.graph[0].outputs[0]
    first, second = quantize_input(h, "nvfp4", 2.0), quantize_input(h, "nvfp4", 4.0)
    third = quantize_input(h, "int8", 2.0)
    assert [first.name, second.name, third.name] == ["h/nvfp4", "h/nvfp4_2", "h/int8"]
    assert quantize_input(h, "nvfp4", 2.0) is first and quantize_input(h, "nvfp4", 4.0) is second
    assert quantize_input(h, "int8", None) is third
    assert {"h.act_scale", "h.act_scale_2"} <= set(model.graph.initializers)


def test_a_value_that_was_always_zero():
    rounded = quantize_input(layers().graph[0].outputs[0], "nvfp4", 0.0)
    assert rounded.producer().inputs[1].const_value.numpy() == 1.0


@pytest.mark.parametrize("amax", [None, math.nan, math.inf, -1.0])
def test_no_calibration_no_node(amax):
    model = layers()
    with pytest.raises(InputError, match="'h': NVFP4 activations need the largest magnitude"):
        quantize_input(model.graph[0].outputs[0], "nvfp4", amax)
    assert len(model.graph) == 5 and list(model.graph.initializers) == ["w"]


def test_only_float32():
    value = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64))
    with pytest.raises(InputError, match="'ids' is INT64"):
        quantize_input(value, "int8", None)


# Written out and found again


def reported(model: ir.Model) -> dict[str, str]:
    return {layer.name: layer.activations for layer in layers_of(model)}


@pytest.mark.parametrize("activation_format", FORMATS)
def test_written_out_and_found_again(activation_format):
    model = layers()
    quantize_all(model, activation_format)
    want = [(n.op_type, n.name, [v.name for v in n.inputs]) for n in model.graph]
    InlineLowbitFunctions()(model)
    assert all(node.domain == "" for node in model.graph)
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names) and f"h/{activation_format}/scale" in names
    model = ir.from_proto(ir.to_proto(model))  # as read from a file
    assert reported(model) == dict.fromkeys(("up", "q", "k"), activation_format)
    assert RecognizeLowbit()(model).modified
    assert reported(model) == dict.fromkeys(("up", "q", "k"), activation_format)
    assert [(n.op_type, n.name, [v.name for v in n.inputs]) for n in model.graph] == want
    assert not RecognizeLowbit()(model).modified
    x = np.random.default_rng(1).standard_normal((3, 40)).astype(np.float32)
    expected = layers()
    quantize_all(expected, activation_format)
    np.testing.assert_array_equal(evaluate(model, x=x)[0], evaluate(expected, x=x)[0])


@pytest.mark.parametrize("activation_format", FORMATS)
def test_prepare_keeps_and_finds_them(activation_format):
    kept, found = layers(), layers()
    quantize_all(kept, activation_format)
    quantize_all(found, activation_format)
    InlineLowbitFunctions()(found)
    shown = [
        [(n.op_type, n.name, n.outputs[0].shape) for n in prepare_model(ir.from_proto(ir.to_proto(m))).graph]
        for m in (kept, found)
    ]
    assert shown[0] == shown[1] and sum(op.startswith("DynamicQDQ") for op, _, _ in shown[0]) == 2


def part(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == f"h/nvfp4/{name}")


def other_number(model: ir.Model, name: str, array: np.ndarray) -> None:
    part(model, name).attributes.add(ir.AttrTensor("value", ir.Tensor(array)))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda m: other_number(m, "largest_code", np.float32(4)), "'h/nvfp4/largest_code' is not its"),
        (lambda m: other_number(m, "block", np.array([32])), "'h/nvfp4/block' is not its block"),
        (lambda m: other_number(m, "smallest_scale", np.float32(0)), "is not its smallest_scale"),
        (lambda m: part(m, "codes").attributes.add(ir.AttrInt64("block_size", 32)), "is not its codes"),
        (lambda m: part(m, "block_scale").attributes.add(ir.AttrInt64("saturate", 0)), "its block_scale"),
        (lambda m: part(m, "amax").attributes.add(ir.AttrInt64("keepdims", 1)), "is not its amax"),
        (lambda m: part(m, "codes").replace_input_with(0, m.graph.inputs[0]), "'h' is not its x"),
        (lambda m: part(m, "scale").replace_input_with(1, m.graph.initializers["x.act_scale"]), "its global"),
    ],
)  # fmt: skip
def test_what_is_not_the_body_stays(spoil, reason):
    model = layers()
    quantize_all(model, "nvfp4")
    InlineLowbitFunctions()(model)
    spoil(model)
    recognise = RecognizeLowbit()
    recognise(model)  # the other one, of x, is found
    assert [n.name for n in model.graph if n.domain] == ["x/nvfp4"]
    (refusal,) = recognise.refusals
    assert reason in refusal.reason and "not as DynamicQDQNVFP4 does" in refusal.reason


def test_an_attribute_left_out_has_its_default():
    model = layers()
    quantize_all(model, "nvfp4")
    InlineLowbitFunctions()(model)
    del part(model, "block_scale").attributes["saturate"]
    del part(model, "lead").attributes["start"]
    last = next(n for n in model.graph if n.name == "h/nvfp4")
    inputs = match_body(last, "DynamicQDQNVFP4", 23)
    assert not isinstance(inputs, str) and [v.name for v in inputs] == ["h", "h.act_scale"]


def test_a_rounding_of_somebody_else_runs_as_it_is_written():
    """Static int8: no body of ours, but every operator of it has a kernel."""
    model = ir.from_proto(onnx.parser.parse_model(
        '<ir_version: 11, opset_import: ["" : 23]> net (float[B, 8] x, float s) => (float[B, 8] y) {'
        " q = Div(x, s) r = Round(q) y = Mul(r, s) }"
    ))  # fmt: skip
    recognise = RecognizeLowbit()
    assert not recognise(model).modified and not recognise.refusals


def test_a_scale_that_is_no_constant_is_refused():
    model = layers()
    quantize_all(model, "nvfp4")
    InlineLowbitFunctions()(model)
    scale = model.graph.initializers.pop("h.act_scale")
    scale.const_value = None
    model.graph.inputs.append(scale)
    recognise = RecognizeLowbit()
    recognise(model)
    assert [r.reason for r in recognise.refusals] == [
        "the global scale of DynamicQDQNVFP4 is not one constant float32"
    ]


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-40, math.inf, math.nan])
def test_prepare_refuses_a_scale_that_no_kernel_takes(scale):
    model = layers()
    quantize_all(model, "nvfp4")
    model.graph.initializers["h.act_scale"].const_value = ir.tensor(np.array(scale, np.float32))
    with pytest.raises(UnsupportedError, match=r"'h/nvfp4'.*its global scale is"):
        prepare_model(ir.from_proto(ir.to_proto(model)))


def test_a_scale_that_is_a_vector():
    model = layers()
    rounded = quantize_input(model.graph[0].outputs[0], "nvfp4", 1.0)
    rounded.producer().inputs[1].const_value = ir.tensor(np.ones(2, np.float32))
    with pytest.raises(InputError, match="not one float32"):
        InferShapes()(model)


def test_integers_are_not_rounded():
    model = layers()
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["B", 40]))
    model.graph.inputs.append(ids)
    quantize_input(model.graph[0].outputs[0], "int8", None).producer().replace_input_with(0, ids)
    with pytest.raises(InputError, match="not rows of float32"):
        InferShapes()(model)
