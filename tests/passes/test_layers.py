# ruff: noqa: E501 (one graph a line is easier to read)
"""One spelling of each layer: Gemm, transposed and tied weights, biases, norms and GELU."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from prepare_harness import check_pass, ops, parse

from qgraph.passes.fuse_gelu import FuseGelu
from qgraph.passes.fuse_layer_norm import FuseLayerNorm
from qgraph.passes.fuse_rms_norm import FuseRMSNorm
from qgraph.passes.infer_shapes import InferShapes
from qgraph.passes.lower_gemm import LowerGemm
from qgraph.passes.name_weights import NameWeights
from qgraph.passes.order_bias import OrderBias
from qgraph.passes.orient_weights import TIED, OrientWeights
from qgraph.passes.remove_unused import RemoveUnused

I64 = np.int64
rng = np.random.default_rng(1)


def f32(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def scalar(value: float) -> np.ndarray:
    return np.array(value, np.float32)


# -- LowerGemm ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0), (1.0, 0.0), (-2.0, 1.0)])
@pytest.mark.parametrize("bias", [None, (), (1,), (5,), (1, 5), (3, 1), (3, 5)])
def test_gemm(trans_a: int, trans_b: int, alpha: float, beta: float, bias: tuple | None) -> None:
    weights = {"w": f32(5, 4) if trans_b else f32(4, 5)}
    if bias is not None:
        weights["c"] = f32(*bias) if bias else scalar(0.7)
    x = "4,n" if trans_a else "n,4"
    c = "" if bias is None else ", c"
    model = parse(
        f"(float[{x}] x) => (float[n,5] y) {{ y = Gemm<transA={trans_a},transB={trans_b},alpha={alpha},beta={beta}>(x, w{c}) }}",
        **weights,
    )
    check_pass(model, LowerGemm(), n=3)
    expected = ["Transpose"] * (trans_a + trans_b) + ["MatMul"]
    assert ops(model) == expected + (["Add"] if bias is not None and beta != 0 else [])
    assert next(n for n in model.graph if n.op_type == "MatMul").name == "n0"


def test_gemm_of_activations_and_shared_weights() -> None:
    model = parse(
        "(float[n,4] x, float[n,4] z) => (float[n,n] y) { a = Gemm<transB=1,alpha=3.0,beta=0.5>(x, z, c) h = Gemm<alpha=2.0>(x, w) k = MatMul(z, w) y = Gemm<transB=1>(h, k, a) }",
        w=f32(4, 6),
        c=f32(1, 1),
    )
    check_pass(model, LowerGemm())
    assert ops(model).count("Mul") == 2  # alpha of an activation, alpha of a weight that another layer reads
    assert "Gemm" not in ops(model)


def test_gemm_then_orient() -> None:
    """nn.Linear on a matrix: [out, in] weights, transB."""
    model = parse("(float[n,4] x) => (float[n,5] y) { y = Gemm<transB=1>(x, w, b) }", w=f32(5, 4), b=f32(5))
    check_pass(model, LowerGemm(), OrientWeights())
    assert ops(model) == ["MatMul", "Add"]
    assert set(model.graph.initializers) == {"w", "b"}
    assert model.graph.initializers["w"].const_value.shape == [4, 5]


# -- OrientWeights ------------------------------------------------------------------------------------------


def test_transposed_weight_takes_its_name() -> None:
    model = parse(
        "(float[n,4] x) => (float[n,5] y) { t = Transpose<perm=[1,0]>(w) y = MatMul(x, t) }", w=f32(5, 4)
    )
    check_pass(model, OrientWeights())
    assert ops(model) == ["MatMul"]
    assert list(model.graph.initializers) == ["w"]


def test_weight_shared_by_layers_is_turned_once() -> None:
    model = parse(
        "(float[n,4] x, float[n,4] z) => (float[n,5] y) { t = Transpose(w) a = MatMul(x, t) u = Transpose(w) b = MatMul(z, u) y = Add(a, b) }",
        w=f32(5, 4),
    )
    check_pass(model, OrientWeights())
    assert list(model.graph.initializers) == ["w"]
    assert ops(model) == ["MatMul", "MatMul", "Add"]


def test_tied_embedding_is_stored_once() -> None:
    """Embedding and output layer of one table: one [hidden, vocabulary] initializer."""
    model = parse(
        "(int64[b,s] ids) => (float[b,s,9] y) { h = Gather(embed, ids) t = Transpose(embed) y = MatMul(h, t) }",
        embed=f32(9, 4),
    )
    check_pass(model, OrientWeights(), b=2, s=5)
    assert ops(model) == ["Gather", "Transpose", "MatMul"]
    ((name, value),) = model.graph.initializers.items()
    assert (name, value.const_value.shape) == ("embed", [4, 9])
    gather, back, matmul = model.graph
    assert (gather.metadata_props[TIED], matmul.metadata_props[TIED]) == (matmul.name, gather.name)
    assert TIED not in back.metadata_props
    assert gather.attributes["axis"].value == 1


def test_transposed_copy_of_an_embedding_is_dropped() -> None:
    """Exporters fold the transpose of small tied tables: the weight is then stored twice."""
    table = f32(9, 4)
    body = "(int64[b,s] ids) => (float[b,s,9] y) { h = Gather(embed, ids) y = MatMul(h, val_3) }"
    model = parse(body, embed=table, val_3=np.ascontiguousarray(table.T))
    check_pass(model, OrientWeights(), b=2, s=5)
    assert [(v.name, v.const_value.shape) for v in model.graph.initializers.values()] == [("embed", [4, 9])]
    gather, _, matmul = model.graph
    assert (gather.metadata_props[TIED], matmul.metadata_props[TIED]) == (matmul.name, gather.name)
    other = table.T.copy()
    other[-1, -1] += 1
    model = parse(body, embed=table, val_3=other)
    check_pass(model, OrientWeights(), expect_modified=False)


def test_tied_embedding_of_one_id() -> None:
    model = parse(
        "(int64 id) => (float[9] y) { h = Gather(embed, id) t = Transpose(embed) y = MatMul(h, t) }",
        embed=f32(9, 4),
    )
    check_pass(model, OrientWeights())
    assert ops(model) == ["Gather", "MatMul"]


def test_weight_needed_both_ways_is_stored_twice_and_said_so() -> None:
    model = parse(
        "(float[n,4] x) => (float[n,4] y) { t = Transpose(w) a = MatMul(x, t) y = MatMul(a, w) }",
        w=f32(5, 4),
    )
    step = OrientWeights()
    check_pass(model, step)
    assert set(model.graph.initializers) == {"w", "w.transposed"}
    assert "stored a second time, transposed: MatMul needs its rows" in step.refusals[0].reason


def test_transposed_activations_are_left() -> None:
    model = parse("(float[n,4] x, float[n,4] z) => (float[n,n] y) { t = Transpose(z) y = MatMul(x, t) }")
    check_pass(model, OrientWeights(), expect_modified=False)


# -- OrderBias, NameWeights ---------------------------------------------------------------------------------


def test_bias_comes_second() -> None:
    model = parse(
        "(float[n,4] x) => (float[n,5] y) { h = MatMul(x, w) g = Add(b, h) k = Mul(s, g) y = Sub(b, k) }",
        w=f32(4, 5),
        b=f32(5),
        s=scalar(2),
    )
    check_pass(model, OrderBias())
    assert [n.inputs[1].name for n in model.graph] == ["w", "b", "s", "k"]


def test_numbered_weights_get_module_names() -> None:
    model = (
        parse(
            "(float[n,4] x) => (float[n,4] y) { h = MatMul(x, val_7) g = MatMul(h, own.name) y = MatMul(g, lone) }",
            **{"val_7": f32(4, 4), "own.name": f32(4, 4), "lone": f32(4, 4)},
        )
        if False
        else parse(
            "(float[n,4] x) => (float[n,4] y) { h = MatMul(x, val_7) g = MatMul(h, onnx_MatMul_3) y = MatMul(g, lone) }",
            val_7=f32(4, 4),
            onnx_MatMul_3=f32(4, 4),
            lone=f32(4, 4),
        )
    )
    first, second, _ = model.graph
    first.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'encoder', 'encoder.layer.0.query', 'linear']"
    second.name = "/encoder/layer.0/key/MatMul"
    check_pass(model, NameWeights())
    assert [n.inputs[1].name for n in model.graph] == [
        "encoder.layer.0.query.weight",
        "encoder.layer.0.key.weight",
        "lone",
    ]


# -- Norms --------------------------------------------------------------------------------------------------

EPS = 1e-3
CONSTANTS = {
    "two": scalar(2),
    "one": scalar(1),
    "half": scalar(0.5),
    "neghalf": scalar(-0.5),
    "eps": scalar(EPS),
    "last": np.array([-1], I64),
}
# From v = mean(d^2) + eps and d to n = d / sqrt(v).
QUOTIENTS = {
    "div": "s = Sqrt(v) n = Div(d, s)",
    "reciprocal": "s = Sqrt(v) r = Reciprocal(s) n = Mul(d, r)",
    "reciprocal_first": "s = Sqrt(v) r = Reciprocal(s) n = Mul(r, d)",
    "one_over": "s = Sqrt(v) r = Div(one, s) n = Mul(d, r)",
    "pow_half": "s = Pow(v, half) n = Div(d, s)",
    "pow_minus_half": "r = Pow(v, neghalf) n = Mul(d, r)",
}
SQUARES = {"pow": "q = Pow(d, two)", "mul": "q = Mul(d, d)"}
EPSILONS = {"right": "v = Add(m, eps)", "left": "v = Add(eps, m)"}


def norm_model(
    head: str, square: str, epsilon: str, quotient: str, tail: str, **weights: np.ndarray
) -> ir.Model:
    body = f"{head} {square} m = ReduceMean(q, last) {epsilon} {quotient} {tail}"
    return parse(f"(float[b,s,6] x) => (float[b,s,6] y) {{ {body} }}", **(CONSTANTS | weights))


@pytest.mark.parametrize("quotient", QUOTIENTS)
@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("tail", ["k = Mul(n, w) y = Add(k, c)", "k = Mul(w, n) y = Add(c, k)"])
def test_layer_norm_spellings(quotient: str, square: str, epsilon: str, tail: str) -> None:
    model = norm_model(
        "mu = ReduceMean(x, last) d = Sub(x, mu)",
        SQUARES[square],
        EPSILONS[epsilon],
        QUOTIENTS[quotient],
        tail,
        w=f32(6),
        c=f32(6),
    )
    check_pass(model, FuseLayerNorm())
    RemoveUnused()(model)
    assert ops(model) == ["LayerNormalization"]
    node = model.graph[0]
    assert [v.name for v in node.inputs] == ["x", "w", "c"]
    assert node.attributes["epsilon"].value == pytest.approx(EPS)


@pytest.mark.parametrize("quotient", QUOTIENTS)
@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("tail", ["y = Mul(n, w)", "y = Mul(w, n)"])
def test_rms_norm_spellings(quotient: str, square: str, tail: str) -> None:
    model = norm_model("d = Relu(x)", SQUARES[square], EPSILONS["right"], QUOTIENTS[quotient], tail, w=f32(6))
    check_pass(model, FuseRMSNorm())
    RemoveUnused()(model)
    assert ops(model) == ["Relu", "RMSNormalization"]
    assert [v.name for v in model.graph[1].inputs] == ["d", "w"]


LN_HEAD = "mu = ReduceMean(x, last) d = Sub(x, mu)"
FULL = (SQUARES["pow"], EPSILONS["right"], QUOTIENTS["div"])


def test_layer_norm_without_scale_or_bias() -> None:
    model = norm_model(LN_HEAD, *FULL, "y = Relu(n)")
    check_pass(model, FuseLayerNorm())
    RemoveUnused()(model)
    assert ops(model) == ["LayerNormalization", "Relu"]
    assert model.graph[0].inputs[1].const_value.numpy().tolist() == [1] * 6


def test_layer_norm_with_two_subs_and_scale_of_higher_rank() -> None:
    model = parse(
        "(float[b,s,6] x) => (float[b,s,6] y) { mu = ReduceMean(x, last) d = Sub(x, mu) e = Sub(x, mu) q = Pow(e, two)"
        " m = ReduceMean(q, last) v = Add(m, eps) s = Sqrt(v) n = Div(d, s) k = Mul(n, w) y = Add(k, c) }",
        **CONSTANTS,
        w=f32(1, 1, 6),
        c=scalar(0.5),
    )
    check_pass(model, FuseLayerNorm())
    RemoveUnused()(model)
    assert ops(model) == ["LayerNormalization"]
    assert [v.const_value.shape for v in model.graph[0].inputs[1:]] == [[6], [6]]


def test_layer_norm_over_two_axes() -> None:
    model = parse(
        "(float[b,3,6] x) => (float[b,3,6] y) { mu = ReduceMean(x, axes) d = Sub(x, mu) q = Pow(d, two) m = ReduceMean(q, axes)"
        " v = Add(m, eps) s = Sqrt(v) n = Div(d, s) y = Mul(n, w) }",
        **CONSTANTS,
        axes=np.array([1, 2], I64),
        w=f32(3, 6),
    )
    check_pass(model, FuseLayerNorm())
    assert model.graph[-1].attributes["axis"].value == -2


def test_values_inside_that_others_read_stay_computed() -> None:
    model = parse(
        "(float[b,s,6] x) => (float[b,s,6] y, float[b,s,1] z) { mu = ReduceMean(x, last) d = Sub(x, mu) q = Pow(d, two)"
        " m = ReduceMean(q, last) v = Add(m, eps) s = Sqrt(v) n = Div(d, s) y = Mul(n, w) z = Neg(s) }",
        **CONSTANTS,
        w=f32(6),
    )
    check_pass(model, FuseLayerNorm())
    RemoveUnused()(model)
    assert "LayerNormalization" in ops(model)
    assert "Sqrt" in ops(model)


def test_bias_of_positions_is_not_a_norm_bias() -> None:
    model = norm_model(LN_HEAD, *FULL, "k = Mul(n, w) y = Add(k, p)", w=f32(6), p=f32(3, 6))
    check_pass(model, FuseLayerNorm(), s=3)
    RemoveUnused()(model)
    assert ops(model) == ["LayerNormalization", "Add"]


@pytest.mark.parametrize(
    ("head", "square", "epsilon", "quotient", "reason"),
    [
        ("mu = ReduceMean(x, last) d = Sub(mu, x)", *FULL, "the difference is turned round"),
        ("mu = ReduceMax(x, last) d = Sub(x, mu)", *FULL, "a maximum is not a mean"),
        ("mu = ReduceMean(x, first) d = Sub(x, mu)", *FULL, "another axis"),
        (LN_HEAD, "q = Pow(d, half)", EPSILONS["right"], QUOTIENTS["div"], "no square"),
        (LN_HEAD, "q = Mul(d, x)", EPSILONS["right"], QUOTIENTS["div"], "no square"),
        (LN_HEAD, SQUARES["pow"], "v = Sub(m, eps)", QUOTIENTS["div"], "epsilon is taken away"),
        (LN_HEAD, SQUARES["pow"], "v = Add(m, x)", QUOTIENTS["div"], "epsilon is no number"),
        (LN_HEAD, SQUARES["pow"], EPSILONS["right"], "s = Sqrt(v) n = Div(s, d)", "divided the wrong way"),
        (LN_HEAD, SQUARES["pow"], EPSILONS["right"], "s = Exp(v) n = Div(d, s)", "no square root"),
    ],
)
def test_what_is_no_layer_norm(head: str, square: str, epsilon: str, quotient: str, reason: str) -> None:
    model = norm_model(
        f"x0 = Abs(x) {head}".replace("(x,", "(x0,").replace(", x)", ", x0)"),
        square.replace(", x)", ", x0)"),
        epsilon.replace(", x)", ", x0)"),
        quotient,
        "y = Mul(n, w)",
        w=f32(6),
        first=np.array([1], I64),
    )
    check_pass(model, FuseLayerNorm(), expect_modified=False)


def test_double_precision_norm_is_refused_with_a_reason() -> None:
    text = "(double[b,6] x) => (double[b,6] y) { q = Mul(x, x) m = ReduceMean(q, last) v = Add(m, eps) s = Sqrt(v) y = Div(x, s) }"
    model = parse(text, last=np.array([-1], I64), eps=np.array(1e-5, np.float64))
    step = FuseRMSNorm()
    check_pass(model, step, expect_modified=False)
    assert "not float32" in step.refusals[0].reason


def test_norm_of_a_named_dimension_is_refused_with_a_reason() -> None:
    model = parse(
        "(float[b,s] x) => (float[b,s] y) { q = Mul(x, x) m = ReduceMean(q, last) v = Add(m, eps) s1 = Sqrt(v) y = Div(x, s1) }",
        **CONSTANTS,
    )
    step = FuseRMSNorm()
    check_pass(model, step, expect_modified=False)
    assert "not fixed" in step.refusals[0].reason


# -- GELU ---------------------------------------------------------------------------------------------------

GELU = {
    "r2": scalar(math.sqrt(2)),
    "ir2": scalar(math.sqrt(0.5)),
    "one": scalar(1),
    "half": scalar(0.5),
    "two": scalar(2),
    "three": scalar(3),
    "k": scalar(math.sqrt(2 / math.pi)),
    "c": scalar(0.044715),
    "kc": scalar(math.sqrt(2 / math.pi) * 0.044715),
}
ERF_ARGUMENTS = ["a = Div(h, r2)", "a = Mul(h, ir2)", "a = Mul(ir2, h)"]
PRODUCTS = [
    "p = Add(e, one) q = Mul(h, p) y = Mul(q, half)",
    "p = Add(one, e) q = Mul(p, h) y = Mul(half, q)",
    "p = Add(e, one) g = Mul(h, half) y = Mul(g, p)",
    "p = Add(e, one) g = Mul(half, h) y = Mul(p, g)",
    "p = Add(e, one) q = Mul(p, half) y = Mul(h, q)",
    "p = Mul(e, half) q = Add(p, half) y = Mul(h, q)",
    "p = Add(e, one) q = Mul(h, p) y = Div(q, two)",
    "p = Add(e, one) g = Div(h, two) y = Mul(g, p)",
]
TANH_ARGUMENTS = [
    "h3 = Pow(h, three) ch = Mul(h3, c) s = Add(h, ch) a = Mul(s, k)",
    "h2 = Mul(h, h) h3 = Mul(h2, h) ch = Mul(c, h3) s = Add(ch, h) a = Mul(k, s)",
    "h2 = Mul(h, h) ch = Mul(h2, c) s = Add(ch, one) kh = Mul(h, k) a = Mul(kh, s)",
    "h2 = Pow(h, two) kch = Mul(h2, kc) s = Add(kch, k) a = Mul(h, s)",
]


def gelu_model(body: str) -> ir.Model:
    """The input of GELU is itself a sum and a product, as behind a linear layer."""
    return parse(f"(float[b,s,6] x) => (float[b,s,6] y) {{ z = Mul(x, k) h = Add(z, c) {body} }}", **GELU)


@pytest.mark.parametrize("argument", ERF_ARGUMENTS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_erf_gelu(argument: str, product: str) -> None:
    model = gelu_model(f"{argument} e = Erf(a) {product}")
    check_pass(model, FuseGelu())
    RemoveUnused()(model)
    assert ops(model) == ["Mul", "Add", "Gelu"]
    assert model.graph[-1].attributes["approximate"].value == "none"


@pytest.mark.parametrize("argument", TANH_ARGUMENTS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_tanh_gelu(argument: str, product: str) -> None:
    model = gelu_model(f"{argument} e = Tanh(a) {product}")
    check_pass(model, FuseGelu())
    RemoveUnused()(model)
    assert ops(model) == ["Mul", "Add", "Gelu"]
    assert model.graph[-1].attributes["approximate"].value == "tanh"


@pytest.mark.parametrize(
    "body",
    [
        "a = Mul(h, half) e = Erf(a) p = Add(e, one) q = Mul(h, p) y = Mul(q, half)",  # another argument
        "a = Div(h, r2) e = Erf(a) p = Add(e, two) q = Mul(h, p) y = Mul(q, half)",  # another offset
        "a = Div(h, r2) e = Erf(a) p = Add(e, one) q = Mul(h, p) y = Mul(q, two)",  # another factor
        "a = Div(h, r2) e = Erf(a) p = Add(e, one) q = Mul(z, p) y = Mul(q, half)",  # another x outside
        "a = Div(h, r2) e = Erf(a) p = Add(e, one) q = Mul(h, p) r = Mul(q, h) y = Mul(r, half)",  # x twice
        "a = Div(h, r2) e = Erf(a) y = Add(e, one)",  # no product
        "a = Div(h, r2) e = Erf(a) p = Add(e, one) q = Mul(h, p) w = Mul(q, half) y = Add(w, p)",  # (1 + erf) is read elsewhere
    ],
)
def test_what_is_no_gelu(body: str) -> None:
    model = gelu_model(body)
    step = FuseGelu()
    check_pass(model, step, expect_modified=False)
    assert "not part of a GELU" in step.refusals[0].reason


def test_plain_tanh_is_no_gelu() -> None:
    step = FuseGelu()
    check_pass(gelu_model("y = Tanh(h)"), step, expect_modified=False)
    assert not step.refusals


def test_inference_still_works_on_fused_nodes() -> None:
    model = gelu_model("a = Div(h, r2) e = Erf(a) p = Add(e, one) q = Mul(h, p) y = Mul(q, half)")
    InferShapes()(model)
    FuseGelu()(model)
    InferShapes()(model)
    assert str(model.graph.outputs[0].shape) == "[b,s,6]"


# -- constants that add axes --------------------------------------------------------------------------------

NORM = (
    "(float[b,8] x) => (float[i,j,k] y) { mu = ReduceMean(x, axes) d = Sub(x, mu) q = Pow(d, two) m = ReduceMean(q, axes)"
    " v = Add(m, eps) s = Sqrt(v) n = Div(d, s) g = Mul(n, gamma) y = Add(g, beta) }"
)
RMS = (
    "(float[b,8] x) => (float[i,j,k] y) { q = Pow(x, two) m = ReduceMean(q, axes) v = Add(m, eps) s = Sqrt(v)"
    " r = Reciprocal(s) n = Mul(x, r) y = Mul(n, gamma) }"
)


@pytest.mark.parametrize(
    ("text", "op", "where"),
    [
        (NORM, "LayerNormalization", "eps"),
        (NORM, "LayerNormalization", "gamma"),
        (NORM, "LayerNormalization", "beta"),
        (RMS, "RMSNormalization", "eps"),
        (RMS, "RMSNormalization", "gamma"),
    ],
)
def test_norm_constants_of_more_axes_keep_the_rank(text: str, op: str, where: str) -> None:
    """What stands before the operand that adds axes still becomes one node."""
    weights = {
        "two": scalar(2),
        "eps": scalar(0.1),
        "gamma": f32(8),
        "beta": f32(8),
        "axes": np.array([-1], I64),
    }
    weights[where] = weights[where].reshape(1, 1, -1)
    model = parse(text, **{k: v for k, v in weights.items() if f", {k})" in text})
    fuse = FuseLayerNorm() if op == "LayerNormalization" else FuseRMSNorm()
    check_pass(model, fuse, expect_modified=where != "eps")
    assert (op in ops(model)) == (where != "eps")
    assert len(model.graph.outputs[0].shape) == 3


def test_gelu_constant_of_more_axes_is_left() -> None:
    model = parse(
        "(float[b,8] x) => (float[i,j,k] y) { a = Div(x, r) e = Erf(a) f = Add(e, one) g = Mul(x, f) y = Mul(g, half) }",
        r=np.full((1, 1, 1), math.sqrt(2), np.float32),
        one=scalar(1),
        half=scalar(0.5),
    )
    check_pass(model, FuseGelu(), expect_modified=False)
    assert "Gelu" not in ops(model)


def test_gelu_constant_of_no_more_axes_fuses() -> None:
    model = parse(
        "(float[b,8] x) => (float[b,8] y) { a = Div(x, r) e = Erf(a) f = Add(e, one) g = Mul(x, f) y = Mul(g, half) }",
        r=np.full((1, 1), math.sqrt(2), np.float32),
        one=np.ones(1, np.float32),
        half=scalar(0.5),
    )
    check_pass(model, FuseGelu())
    assert ops(model) == ["Gelu"]
