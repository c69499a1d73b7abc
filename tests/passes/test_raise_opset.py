"""Files of older opsets mean the same at opset 23: run before and after by ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper
from prepare_harness import check_pass, feeds_for, ops, parse, parse_proto, run_ort

from qgraph.errors import UnsupportedError
from qgraph.passes import prepare_model
from qgraph.passes.raise_opset import _ADAPTERS, _ONLY_WIDENED, RaiseOpset

I64 = np.int64
CASES = {
    "reduce_axes": (13, "y = ReduceMean<axes=[-1],keepdims=0>(x)", {}),
    "reduce_all": (11, "y = ReduceMax(x)", {}),
    "reduce_sum_11": (11, "y = ReduceSum<axes=[0]>(x)", {}),
    "squeeze": (11, "a = Unsqueeze<axes=[0,3]>(x) b = Squeeze<axes=[0]>(a) y = Relu(b)", {}),
    "split_attribute": (11, "y, z = Split<axis=1,split=[1,3]>(x)", {}),
    "split_even": (13, "y, z = Split<axis=1>(x)", {}),
    "split_input": (13, "y, z = Split<axis=1>(x, s)", {"s": np.array([1, 3], I64)}),
    "softmax_last": (11, "y = Softmax<axis=1>(x)", {}),
    "log_softmax_default": (11, "y = LogSoftmax(x)", {}),
    "softmax_13": (13, "y = Softmax<axis=0>(x)", {}),
    "slice_9": (9, "y = Slice<starts=[0,1],ends=[2,3]>(x)", {}),
    "slice_axes_9": (9, "y = Slice<starts=[1],ends=[3],axes=[1]>(x)", {}),
    "clip_9": (9, "y = Clip<min=-0.5,max=0.5>(x)", {}),
    "clip_max_9": (9, "y = Clip<max=0.5>(x)", {}),
    "pad_9": (9, "y = Pad<pads=[0,1,0,2],value=1.5>(x)", {}),
    "dropout_11": (11, "y = Dropout<ratio=0.3>(x)", {}),
    "topk_10": (10, "y, i = TopK(x, k)", {"k": np.array([2], I64)}),
    "topk_9": (9, "y, i = TopK<k=2>(x)", {}),
    "arithmetic": (
        9,
        "a = Add(x, x) b = Mul(a, x) c = Erf(b) d = Pow(c, two) y = Gemm(d, w, v)",
        {"two": np.float32(2), "w": np.ones((4, 2), np.float32), "v": np.ones(2, np.float32)},
    ),
    "layout": (
        11,
        "s = Shape(x) r = Reshape(x, s) t = Transpose(r) f = Flatten(t) y = Concat<axis=0>(f, f)",
        {},
    ),
    "gather": (10, "g = Gather<axis=1>(x, i) y = Cast<to=11>(g)", {"i": np.array([0, 2], I64)}),
    "where": (9, "z = Neg(x) c = Greater(x, z) y = Where(c, x, z)", {}),
    "batch_norm": (9, "y = BatchNormalization(x, w, w, w, w)", {"w": np.ones(4, np.float32)}),
    "layer_norm_17": (17, "y = LayerNormalization(x, w)", {"w": np.ones(4, np.float32)}),
    "gelu_20": (20, "y = Gelu(x)", {}),
    "quantize_13": (
        13,
        "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)",
        {"s": np.float32(0.1), "z": np.uint8(3)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_old_opsets(name: str) -> None:
    opset, body, weights = CASES[name]
    model = parse(f"(float[3,4] x) => (float[n] y) {{ {body} }}", opset, **weights)
    model.graph.outputs[0].shape = None
    for value in model.graph.outputs:
        value.type = None if name == "gather" else value.type
    feeds = feeds_for(model)
    before = parse_proto(f"(float[3,4] x) => (float[n] y) {{ {body} }}", opset, **weights)
    before.graph.output[0].type.tensor_type.ClearField("shape")
    if name == "gather":
        before.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    expected = run_ort(before, feeds)
    assert RaiseOpset()(model).modified
    assert (model.graph.opset_imports, model.ir_version) == ({"": 23}, 11)
    assert not RaiseOpset()(model).modified
    prepare_model(model)
    for a, b in zip(expected, run_ort(model, feeds), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("opset", "body"),
    [
        (11, "y = Softmax<axis=0>(x)"),
        (9, "y = Upsample(x, s)"),
        (19, "y = GroupNormalization<num_groups=2>(x, s, s)"),
        (11, "y = Resize(x, s, s)"),
    ],
)
def test_what_changed_its_meaning_is_refused(opset: int, body: str) -> None:
    model = parse(f"(float[1,4] x) => (float[n] y) {{ {body} }}", opset, s=np.ones(2, np.float32))
    with pytest.raises(UnsupportedError, match=r"node 'n0' \(.*re-export with opset 23"):
        RaiseOpset()(model)


@pytest.mark.parametrize("opset", [23, 24, 25, 26])
def test_newer_opsets_stay(opset: int) -> None:
    model = parse("(float[n,4] x) => (float[n,4] y) { y = Relu(x) }", opset)
    model.ir_version = 11
    check_pass(model, RaiseOpset(), expect_modified=False)
    assert model.graph.opset_imports[""] == opset


def test_swish_of_opset_24() -> None:
    model = parse("(float[n,4] x) => (float[n,4] y) { y = Swish(x) }", 24)
    prepare_model(model)
    assert ops(model) == ["Swish"]


def test_ai_onnx_is_the_default_domain() -> None:
    proto = parse_proto("(float[n,4] x) => (float[n,4] y) { y = Relu(x) }", 18)
    proto.opset_import[0].domain = "ai.onnx"
    proto.graph.node[0].domain = "ai.onnx"
    import onnx_ir as ir

    model = ir.from_proto(proto)
    prepare_model(model)
    assert model.graph.opset_imports == {"": 23}


def test_functions_are_raised_with_the_graph() -> None:
    import onnx_ir as ir

    proto = parse_proto("(float[n,4] x) => (float[n,1] y) { y = f.mean(x) }", 18, imports=', "f" : 1')
    body = [helper.make_node("ReduceMean", ["x"], ["y"], axes=[1])]
    proto.functions.append(
        helper.make_function("f", "mean", ["x"], ["y"], body, [helper.make_opsetid("", 13)])
    )
    model = ir.from_proto(proto)
    prepare_model(model)
    assert ops(model) == ["ReduceMean"]
    assert run_ort(model, feeds_for(model))[0].shape == (3, 1)


def test_tables_name_real_operators_once() -> None:
    """No operator is both adapted and called harmless; all exist; none changed its attributes in between."""
    widened = set(_ONLY_WIDENED.split())
    assert not widened & set(_ADAPTERS)
    for name in widened:
        new = onnx.defs.get_schema(name, 23, "")
        for old_version in range(9, 23):
            try:
                old = onnx.defs.get_schema(name, old_version, "")
            except onnx.defs.SchemaError:
                continue
            lost = set(old.attributes) - set(new.attributes)
            assert not lost, f"{name} lost {lost} since opset {old_version}"
            assert old.min_input == new.min_input or new.min_input < old.min_input, name
            for attribute, old_attribute in old.attributes.items():
                before, after = old_attribute.default_value, new.attributes[attribute].default_value
                assert not before.name or before == after, f"{name}.{attribute} changed its default"
            added = {a for a in set(new.attributes) - set(old.attributes) if new.attributes[a].required}
            assert not added, f"{name} needs {added} since opset {old_version}"


def test_old_softmax_keeps_its_default_axis() -> None:
    """Before opset 13 the default was axis 1, now it is the last."""
    model = parse("(float[b,8,1] x) => (float[b,8,1] y) { y = Softmax(x) }", 12)
    check_pass(model, RaiseOpset(), infer=False)
