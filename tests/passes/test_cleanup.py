# ruff: noqa: E501 (one graph a line is easier to read)
"""Passes that lift, fold, and remove: each against ONNX Runtime, with the cases they must leave alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from prepare_harness import check_pass, feeds_for, ops, parse, parse_proto, run_ort

from qgraph.errors import InputError
from qgraph.passes.eliminate_identity import EliminateIdentity
from qgraph.passes.expand_contrib import ExpandContrib
from qgraph.passes.fold_constants import FoldConstants
from qgraph.passes.infer_shapes import InferShapes
from qgraph.passes.inline_functions import InlineFunctions
from qgraph.passes.lift_constants import LiftConstants
from qgraph.passes.remove_unused import RemoveUnused
from qgraph.passes.simplify_reshape import SimplifyReshape
from qgraph.passes.tie_initializers import TieInitializers, equal_initializers

I64 = np.int64
rng = np.random.default_rng(0)


def f32(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


# -- LiftConstants ------------------------------------------------------------------------------------------


def test_lift_every_kind_of_constant() -> None:
    model = parse(
        "(float[n,2] x) => (float[n,2] y) { a = Constant<value=float[2]{1,2}>() b = Constant<value_float=3.0>()"
        " c = Constant<value_floats=[4.0,5.0]>() i = Constant<value_ints=[0,1]>() j = Constant<value_int=1>()"
        " d = Add(x, a) e = Mul(d, b) f = Add(e, c) g = Gather<axis=1>(f, i) k = Gather<axis=0>(i, j)"
        " l = Cast<to=1>(k) y = Add(g, l) }"
    )
    check_pass(model, LiftConstants(), infer=False)
    assert "Constant" not in ops(model)
    assert set(model.graph.initializers) == {"a", "b", "c", "i", "j"}


def test_lift_a_constant_that_is_an_output() -> None:
    model = parse(
        "(float[n] x) => (float[n] y, float[2] z) { y = Neg(x) z = Constant<value=float[2]{1,2}>() }"
    )
    check_pass(model, LiftConstants(), infer=False)
    assert ops(model) == ["Neg", "Identity"]
    assert [v.name for v in model.graph.outputs] == ["y", "z"]


def test_initializer_that_is_an_input_becomes_a_constant() -> None:
    proto = parse_proto("(float[n,4] x) => (float[n,4] y) { y = Add(x, w) }", w=f32(4))
    proto.graph.input.append(helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [4]))
    model = ir.from_proto(proto)
    step = LiftConstants()
    check_pass(model, step, infer=False)
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert "has a default value" in step.refusals[0].reason


# -- RemoveUnused -------------------------------------------------------------------------------------------


def test_dead_code() -> None:
    model = parse(
        "(float[n,4] x) => (float[n,4] y) { dead = Neg(x) deader = Neg(dead) y, m, i = LayerNormalization(x, w) }",
        w=f32(4),
        unused=f32(9),
    )
    model.opset_imports["com.acme"] = 1
    check_pass(model, RemoveUnused())
    assert ops(model) == ["LayerNormalization"]
    assert len(model.graph[0].outputs) == 1
    assert set(model.graph.initializers) == {"w"}
    assert set(model.opset_imports) == {""}


def test_nothing_to_remove() -> None:
    check_pass(parse("(float[n] x) => (float[n] y) { y = Neg(x) }"), RemoveUnused(), expect_modified=False)


# -- EliminateIdentity --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("h = Identity(x)", {}),
        ("h, m = Dropout(x)", {}),
        ("h = Dropout(x, ratio, off)", {"ratio": np.float32(0.5), "off": np.bool_(False)}),
        ("h = Cast<to=1>(x)", {}),
        ("h = Reshape(x, t)", {"t": np.array([0, -1], I64)}),
        ("h = Expand(x, t)", {"t": np.array([1, 4], I64)}),
        ("h = Tile(x, t)", {"t": np.array([1, 1], I64)}),
        ("h = Transpose<perm=[0,1]>(x)", {}),
        ("h = Slice(x, a, b)", {"a": np.array([0, 0], I64), "b": np.array([2**62, 9], I64)}),
        ("h = Pad(x, p)", {"p": np.zeros(4, I64)}),
        ("h = Flatten(x)", {}),
        ("h = Concat<axis=0>(x)", {}),
        ("h = Sum(x)", {}),
        ("h = Add(x, z)", {"z": np.float32(0)}),
        ("h = Add(z, x)", {"z": np.zeros((1, 1), np.float32)}),
        ("h = Sub(x, z)", {"z": np.float32(0)}),
        ("h = Mul(o, x)", {"o": np.float32(1)}),
        ("h = Div(x, o)", {"o": np.float32(1)}),
        ("h = Pow(x, o)", {"o": np.float32(1)}),
    ],
)
def test_no_ops_go(body: str, weights: dict) -> None:
    model = parse(f"(float[n,4] x) => (float[n,4] y) {{ {body} y = Neg(h) }}", **weights)
    check_pass(model, EliminateIdentity())
    assert ops(model) == ["Neg"]


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("h = Cast<to=11>(x) g = Cast<to=1>(h)", {}),
        ("h = Transpose<perm=[1,0]>(x) g = Transpose(h)", {}),
        (
            "g = Slice(x, a, b, c, s)",
            {
                "a": np.array([-1], I64),
                "b": np.array([-(2**62)], I64),
                "c": np.array([1], I64),
                "s": np.array([-1], I64),
            },
        ),
        ("g = Pad(x, p)", {"p": np.array([0, 1, 0, -1], I64)}),
        ("g = Sub(z, x)", {"z": np.float32(0)}),
        ("g = Div(o, x)", {"o": np.float32(1)}),
        ("g = Add(x, z)", {"z": np.zeros(4, np.float32)}),
        ("h = Shape(x) i = Cast<to=6>(h) j = Cast<to=1>(i) k = ReduceSum(j) g = Add(x, k)", {}),
    ],
)
def test_what_is_no_no_op_stays(body: str, weights: dict) -> None:
    model = parse(f"(float[n,4] x) => (float[n,4] y) {{ {body} y = Neg(g) }}", **weights)
    check_pass(model, EliminateIdentity(), expect_modified=False)


def test_broadcasting_neutral_element_stays() -> None:
    """x + zeros[5, 1, 1] has the rank of the zeros."""
    model = parse(
        "(float[n,4] x) => (float[5,n,4] y) { h = Add(x, z) y = Neg(h) }", z=np.zeros((1, 1, 1), np.float32)
    )
    check_pass(model, EliminateIdentity(), expect_modified=False)


def test_output_names_are_kept() -> None:
    model = parse("(float[n] x) => (float[n] y) { h = Neg(x) y = Identity(h) }")
    check_pass(model, EliminateIdentity())
    assert ops(model) == ["Neg"]
    assert [v.name for v in model.graph.outputs] == ["y"]


def test_identity_from_input_to_output_stays() -> None:
    model = parse("(float[n] x) => (float[n] y, float[n] z) { y = Identity(x) h = Neg(x) z = Identity(h) }")
    check_pass(model, EliminateIdentity())
    assert ops(model) == ["Identity", "Neg"]


def test_one_value_for_two_outputs_keeps_an_identity() -> None:
    model = parse("(float[n] x) => (float[n] y, float[n] z) { y = Neg(x) z = Identity(y) }")
    check_pass(model, EliminateIdentity(), expect_modified=False)


# -- FoldConstants ------------------------------------------------------------------------------------------


def test_constants_are_computed() -> None:
    model = parse(
        "(float[n,4] x) => (float[n,4] y) { a = Add(w, w) b = Unsqueeze(a, zero) c = Squeeze(b, zero) d = Sqrt(e) y = Mul(x, c) z = Mul(y, d) }",
        w=f32(4),
        e=np.float32(2),
        zero=np.array([0], I64),
    )
    check_pass(model, FoldConstants())
    assert ops(model) == ["Mul", "Mul"]


def test_known_contents_become_constants() -> None:
    """The width of a dynamic input is a number."""
    model = parse(
        "(float[n,4] x) => (float[n,4] y) { s = Shape(x) g = Gather(s, one) c = Cast<to=1>(g) y = Div(x, c) }",
        one=np.array([1], I64),
    )
    check_pass(model, FoldConstants())
    assert ops(model) == ["Shape", "Div"]  # the shape is dead now


def test_large_results_are_not_stored() -> None:
    model = parse(
        "(float[n,1024] x) => (float[512,n,1024] y) { big = Expand(w, t) y = Add(x, big) }",
        w=f32(512, 1, 1),
        t=np.array([512, 1, 1024], I64),
    )
    step = FoldConstants()
    check_pass(model, step, expect_modified=False, n=1)
    assert "has 2097152 bytes, too many to store" in step.refusals[0].reason


def test_doubling_chain_stays_within_budget() -> None:
    """Forty times x = Concat(x, x) of a constant must not make a petabyte."""
    body = " ".join(f"c{i + 1} = Concat<axis=0>(c{i}, c{i})" for i in range(40))
    model = parse(
        f"(float[n] x) => (int64[1] y) {{ {body} s = Shape(c40) y = Identity(s) z = Neg(x) }}",
        c0=f32(1 << 10),
    )
    for _ in range(50):
        InferShapes()(model)
        if not FoldConstants()(model).modified:
            break
    assert sum(v.const_value.nbytes for v in model.graph.initializers.values()) < 300 << 20


def test_quantized_weights_and_random_numbers_are_not_folded() -> None:
    model = parse(
        "(float[n,4] x) => (float[n,4] y) { w = DequantizeLinear(q, s) y = Add(x, w) }",
        q=np.arange(4, dtype=np.int8),
        s=np.float32(0.5),
    )
    check_pass(model, FoldConstants(), expect_modified=False)
    model = parse("(float[n,4] x) => (float[n,4] y) { r = RandomNormal<shape=[4]>() y = Add(x, r) }")
    assert not FoldConstants()(model).modified


def test_weight_transposes_are_left_to_orient_weights() -> None:
    model = parse("(float[n,4] x) => (float[n,3] y) { t = Transpose(w) y = MatMul(x, t) }", w=f32(3, 4))
    check_pass(model, FoldConstants(), expect_modified=False)


# -- SimplifyReshape ----------------------------------------------------------------------------------------

VIEW = (
    "(float[b,s,96] x) => (float[n] y) { n0 = Shape<start=0,end=1>(x) n1 = Shape<start=1,end=2>(x)"
    " t = Concat<axis=0>(%s) y = Reshape<allowzero=1>(x, t) }"
)
PIECES = {name: np.array([value], I64) for name, value in (("minus", -1), ("heads", 32), ("two", 2))}


@pytest.mark.parametrize(
    ("target", "spelled"),
    [
        ("n0, n1, minus, heads", [0, 0, 3, 32]),
        ("n0, minus", [0, -1]),
        ("minus, n1, heads", [-1, 0, 32]),
        ("n1, n0, minus", None),
    ],
)
def test_computed_targets(target: str, spelled: list[int] | None) -> None:
    model = parse(VIEW % target, **PIECES)
    if spelled == [-1, 0, 32]:
        spelled = [-1, 0, 32]
    step = SimplifyReshape()
    check_pass(model, step, expect_modified=spelled is not None, b=2, s=5)
    if spelled is None:
        assert "needs more than one computed dimension" in step.refusals[0].reason
    else:
        assert model.graph[-1].inputs[1].const_value.numpy().tolist() == spelled
        assert "allowzero" not in model.graph[-1].attributes


# -- TieInitializers ----------------------------------------------------------------------------------------


def test_equal_initializers_are_tied() -> None:
    w = f32(4, 4)
    other = w.copy()
    other[3, 3] += 1
    model = parse(
        "(float[n,4] x) => (float[n,4] y) { a = MatMul(x, w) b = MatMul(a, copy_of_w) c = MatMul(b, w_other) y = MatMul(c, w_bits) }",
        w=w,
        copy_of_w=w.copy(),
        w_other=other,
        w_bits=w.reshape(4, 4).T.copy().T,
    )
    check_pass(model, TieInitializers())
    assert set(model.graph.initializers) == {"w", "w_other"}


@pytest.mark.parametrize("name", ["FLOAT4E2M1", "FLOAT8E4M3FN", "UINT4", "INT2", "BFLOAT16"])
def test_low_bit_initializers_are_compared(name: str) -> None:
    """Three with the same first kilobyte, of which two are equal to the end."""
    dtype = ir.DataType[name]
    codes = np.zeros(4096, dtype.numpy())
    other = codes.copy()
    other[-1] = 1
    model = parse("(float[n] x) => (float[n] y) { y = Identity(x) }")
    for label, array in (("a", codes), ("b", codes.copy()), ("c", other)):
        model.graph.initializers.add(
            ir.Value(name=label, const_value=ir.Tensor(array, dtype, name=label), type=ir.TensorType(dtype))
        )
    assert [[v.name for v in group] for group in equal_initializers(model.graph)] == [["a", "b"]]


def test_same_bytes_of_another_type_or_shape_are_not_tied() -> None:
    model = parse(
        "(float[n,4] x) => (float[n,4] y) { a = Add(x, f) b = Cast<to=1>(i) c = Add(a, b) y = Add(c, g) }",
        f=np.zeros(4, np.float32),
        g=np.zeros((1, 4), np.float32),
        i=np.zeros(4, np.int32),
    )
    check_pass(model, TieInitializers(), expect_modified=False)


def test_negative_zero_is_not_zero() -> None:
    model = parse(
        "(float[n] x) => (float[n] y) { a = Add(x, p) y = Div(a, m) }",
        p=np.float32([0.0]),
        m=np.float32([-0.0]),
    )
    assert not TieInitializers()(model).modified


# -- InlineFunctions ----------------------------------------------------------------------------------------


def with_function(domain: str) -> ir.Model:
    proto = parse_proto(
        "(float[n,4] x) => (float[n,4] y) { a = DOMAIN.f(x) y = DOMAIN.f(a) }".replace("DOMAIN", domain),
        imports=f', "{domain}" : 1',
    )
    proto.functions.append(
        helper.make_function(
            domain,
            "f",
            ["x"],
            ["y"],
            [helper.make_node("Neg", ["x"], ["h"]), helper.make_node("Exp", ["h"], ["y"])],
            [helper.make_opsetid("", 23)],
        )
    )
    return ir.from_proto(proto)


def test_functions_are_inlined() -> None:
    model = check_pass(with_function("acme"), InlineFunctions(), infer=False)
    assert ops(model) == ["Neg", "Exp", "Neg", "Exp"]
    assert not model.functions
    assert len({v.name for n in model.graph for v in n.outputs}) == 4


def test_quantized_layers_stay_functions() -> None:
    model = with_function("ai.qgraph")
    assert not InlineFunctions()(model).modified
    assert ops(model) == ["f", "f"]


def test_function_with_too_many_arguments() -> None:
    model = with_function("acme")
    node = model.graph[0]
    node.resize_inputs(2)
    node.replace_input_with(1, model.graph.inputs[0])
    with pytest.raises(InputError, match="cannot be inlined"):
        InlineFunctions()(model)


# -- ExpandContrib ------------------------------------------------------------------------------------------

MS = ', "com.microsoft" : 1'


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = com.microsoft.SkipLayerNormalization<epsilon=0.01>(x, x, g, b)", ["Add", "LayerNormalization"]),
        (
            "y, m, i, t = com.microsoft.SkipLayerNormalization(x, x, g, b, g) z = Neg(t)",
            ["Add", "Add", "LayerNormalization", "Neg"],
        ),
        ("y = com.microsoft.SkipSimplifiedLayerNormalization(x, x, g)", ["Add", "RMSNormalization"]),
        ("y = SimplifiedLayerNormalization<axis=-1>(x, g)", ["RMSNormalization"]),
        ("y = com.microsoft.Gelu(x)", ["Gelu"]),
        ("y = com.microsoft.BiasGelu(x, b)", ["Add", "Gelu"]),
        ("y = com.microsoft.FastGelu(x, b)", ["Add", "Gelu"]),
        ("y = com.microsoft.QuickGelu(x)", ["Mul", "Sigmoid", "Mul"]),
        ("y = com.microsoft.FusedMatMul<transB=1,alpha=0.5>(x, w)", ["Transpose", "MatMul", "Mul"]),
    ],
)
def test_contrib_operators(body: str, expected: list[str]) -> None:
    model = parse(
        f"(float[n,3,4] x) => (float[n,3,4] y) {{ {body} }}", imports=MS, g=f32(4), b=f32(4), w=f32(4, 4)
    )
    check_pass(model, ExpandContrib(), infer=False)
    assert ops(model) == expected


def test_contrib_operator_with_statistics_stays() -> None:
    model = parse(
        "(float[n,3,4] x) => (float[n,3,4] y, float[n,3,1] m) { y, m = com.microsoft.SkipLayerNormalization(x, x, g, b) }",
        imports=MS,
        g=f32(4),
        b=f32(4),
    )
    step = ExpandContrib()
    assert not step(model).modified
    assert "is used" in step.refusals[0].reason


def test_the_harness_sees_a_wrong_pass() -> None:
    """The check that all these tests lean on fails for a pass that changes results or lies."""

    class Wrong(RemoveUnused):
        def call(self, model: ir.Model) -> ir.passes.PassResult:
            model.graph[0].op_type = "Exp"
            return ir.passes.PassResult(model, True)

    class Liar(RemoveUnused):
        def call(self, model: ir.Model) -> ir.passes.PassResult:
            return ir.passes.PassResult(model, True)

    text = "(float[n] x) => (float[n] y) { y = Neg(x) }"
    for broken in (Wrong, Liar):
        with pytest.raises(AssertionError):
            check_pass(parse(text), broken())
    assert run_ort(parse(text), feeds_for(parse(text)))[0].shape == (3,)
