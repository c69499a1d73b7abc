"""Decomposed attention becomes one Attention, whatever its spelling; what only looks like it stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from prepare_harness import check_pass, feeds_for, ops, parse, refusals, run_ort

from qgraph.passes import prepare_model
from qgraph.passes.fuse_attention import FuseAttention
from qgraph.passes.infer_shapes import InferShapes
from qgraph.passes.remove_unused import RemoveUnused

LOWEST = float(np.finfo(np.float32).min)

# Every graph may use kt, which is k [b, h, t, 8] turned; a mask m and a condition c; constants.
HEAD = """(float[b, 4, s, 8] q, float[b, %(kv)s, t, 8] k, float[b, %(kv)s, t, 8] v, float[b, 1, s, t] m,
           bool[b, 1, s, t] c) => (float[b, 4, s, 8] y)
    <float zero = {0}, float three = {3}, float third = {0.3333}, float half = {0.5}, int64[1] two = {2},
     int64[5] twice = {1, 1, 2, 1, 1}, int64[4] heads = {0, 4, -1, 8}, int64[3] merged = {-1, 6, 8}>
    { kt = Transpose<perm = [0, 1, 3, 2]>(k) %(scores)s %(weights)s y = MatMul(w, %(values)s) }"""
WEIGHTS = "w = Softmax(a)"
GUARD = "w0 = Softmax<axis = 3>(a) nan = IsNaN(w0) w = Where(nan, zero, w0)"
REPEAT = (
    "k5 = Unsqueeze(k, two) v5 = Unsqueeze(v, two) {repeat} kr = Reshape(k10, heads) vr = Reshape(v10, heads)"
    " krt = Transpose<perm = [0, 1, 3, 2]>(kr) a = MatMul(q, krt)"
)
TILED = REPEAT.format(repeat="k10 = Tile(k5, twice) v10 = Tile(v5, twice)")
EXPANDED = REPEAT.format(
    repeat="sh = Shape(k5) sh1 = Mul(sh, twice) k10 = Expand(k5, sh1) v10 = Expand(v5, sh1)"
)


def attention(
    scores: str, weights: str = WEIGHTS, kv: int = 4, values: str = "v", **numbers: float
) -> ir.Model:
    """The graph, `numbers` being further constants."""
    arrays = {name: np.array(x, np.float32) for name, x in numbers.items()}
    return parse(HEAD % {"scores": scores, "weights": weights, "kv": kv, "values": values}, **arrays)


SPELLINGS = {
    "bare": ("a = MatMul(q, kt)", 1.0),
    "scaled product": ("p = MatMul(q, kt) a = Mul(p, third)", 0.3333),
    "divided product": ("p = MatMul(q, kt) a = Div(p, three)", 1 / 3),
    "scaled query": ("q1 = Mul(third, q) a = MatMul(q1, kt)", 0.3333),
    "scaled key": ("k1 = Div(kt, three) a = MatMul(q, k1)", 1 / 3),
    "key scaled before it is turned": (
        "k1 = Mul(k, half) k2 = Transpose<perm = [0, 1, 3, 2]>(k1) a = MatMul(q, k2)",
        0.5,
    ),
    "both, and the product": (
        "q1 = Mul(q, half) k1 = Mul(half, kt) p = MatMul(q1, k1) a = Mul(p, three)",
        0.75,
    ),
    "mask": ("p = MatMul(q, kt) p1 = Mul(p, half) a = Add(p1, m)", 0.5),
    "mask first": ("p = MatMul(q, kt) a = Add(m, p)", 1.0),
    "two masks": ("p = MatMul(q, kt) p1 = Add(p, m) a = Add(p1, m)", 1.0),
    "cap": ("p = MatMul(q, kt) p1 = Div(p, three) p2 = Tanh(p1) a = Mul(p2, three)", 1.0),
    "cap of scaled scores, and a mask": (
        "q1 = Mul(q, half) p = MatMul(q1, kt) p1 = Div(p, three) p2 = Tanh(p1) p3 = Mul(p2, three)"
        " a = Add(p3, m)",
        0.5,
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("weights", [WEIGHTS, GUARD], ids=["plain", "guarded"])
def test_spelling(name: str, weights: str) -> None:
    scores, scale = SPELLINGS[name]
    fuse = FuseAttention()
    model = check_pass(attention(scores, weights), fuse, b=2, s=3, t=5)
    RemoveUnused()(model)
    (node,) = [n for n in model.graph if n.op_type == "Attention"]
    assert set(ops(model)) <= {"Attention", "Add"}, ops(model)
    assert node.attributes.get_float("scale") == pytest.approx(scale)
    assert node.attributes.get_float("softcap", 0.0) == (3.0 if "cap" in name else 0.0)
    assert not fuse.refusals


CONDITIONS = {
    "added, -inf": ("w1 = Where(c, zero, hidden) p = MatMul(q, kt) a = Add(p, w1)", -np.inf),
    "in its place, -inf": ("p = MatMul(q, kt) a = Where(c, p, hidden)", -np.inf),
    "negated": ("p = MatMul(q, kt) n = Not(c) a = Where(n, hidden, p)", -np.inf),
    "added, lowest": ("w1 = Where(c, zero, hidden) p = MatMul(q, kt) a = Add(p, w1)", LOWEST),
    "in its place, lowest": ("p = MatMul(q, kt) a = Where(c, p, hidden)", LOWEST),
    "in its place, twice": ("p = MatMul(q, kt) p1 = Where(c, p, hidden) a = Where(c, p1, hidden)", LOWEST),
    "and then a mask": ("p = MatMul(q, kt) p1 = Where(c, p, hidden) a = Add(p1, m)", LOWEST),
    "a mask and then -inf": ("p = MatMul(q, kt) p1 = Add(p, m) a = Where(c, p1, hidden)", -np.inf),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_hidden_scores(name: str) -> None:
    """Rows with some keys, one key and, as the last, none; judged by the reference."""
    scores, hidden = CONDITIONS[name]
    model = attention(scores, GUARD, hidden=hidden)
    feeds = feeds_for(model, b=2, s=3, t=5)
    feeds["c"][:, :, 1] = [True, False, False, False, False]
    feeds["c"][:, :, 2] = False
    expected = run_ort(model, feeds)
    InferShapes()(model)
    assert FuseAttention()(model).modified
    assert "Softmax" not in ops(model)
    assert "Attention" in ops(model)
    found = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)


def test_grouped_queries_read_heads_once() -> None:
    for scores in (TILED, EXPANDED):
        model = check_pass(attention(scores, kv=2, values="vr"), FuseAttention(), b=2, s=3, t=5)
        RemoveUnused()(model)
        assert ops(model) == ["Attention"]
        assert [v.name for v in model.graph[-1].inputs] == ["q", "k", "v"]


def test_one_head_of_keys_for_all_queries() -> None:
    model = check_pass(attention("a = MatMul(q, kt)", kv=1), FuseAttention(), b=2, s=3, t=5)
    assert ops(model) == ["Attention"]


def test_transposed_through_three_axes() -> None:
    """As the dynamo exporter turns keys."""
    scores = (
        "k3 = Reshape(k, merged) k3t = Transpose<perm = [0, 2, 1]>(k3) back = Shape(kt)"
        " k4 = Reshape(k3t, back) a = MatMul(q, k4)"
    )
    text = (HEAD % {"scores": scores, "weights": WEIGHTS, "kv": 4, "values": "v"}).replace("t, 8]", "6, 8]")
    model = check_pass(parse(text.replace("s, t]", "s, 6]")), FuseAttention(), b=2, s=3)
    assert ops(model) == ["Attention"]


def test_keys_that_are_given_transposed() -> None:
    model = parse(
        "(float[b, 4, s, 8] q, float[b, 4, 8, t] k, float[b, 4, t, 8] v) => (float[b, 4, s, 8] y)"
        "{ a = MatMul(q, k) w = Softmax(a) y = MatMul(w, v) }"
    )
    check_pass(model, FuseAttention(), b=2, s=3, t=5)
    assert ops(model) == ["Transpose", "Attention"]


def test_heads_repeated_before_an_attention() -> None:
    text = HEAD % {
        "scores": EXPANDED.replace("a = MatMul(q, krt)", ""),
        "weights": "",
        "kv": 2,
        "values": "v",
    }
    text = text.replace("y = MatMul(w, v)", "y = Attention<scale = 0.5>(q, kr, vr, c)")
    text = text.replace("krt = Transpose<perm = [0, 1, 3, 2]>(kr)", "")
    model = check_pass(
        parse(text.replace("kt = Transpose<perm = [0, 1, 3, 2]>(k)", "")), FuseAttention(), b=2, s=3, t=5
    )
    assert ops(model) == ["Attention"]
    assert model.graph[-1].inputs[1].name == "k"


REFUSED = {
    "other axis": ("a = MatMul(q, kt)", "w = Softmax<axis = 2>(a)", "not over the last axis"),
    "weights are read": (
        "a = MatMul(q, kt)",
        "w = Softmax(a) e = Exp(w) f = MatMul(e, v) g = Identity(f)",
        "read elsewhere",
    ),
    "scaled behind the mask": (
        "p = MatMul(q, kt) p1 = Add(p, m) a = Mul(p1, half)",
        WEIGHTS,
        "result of Add",
    ),
    "negative scale": (
        "n = Neg(half) p = MatMul(q, kt) p0 = Mul(p, minus) a = Identity(p0)",
        WEIGHTS,
        "Identity",
    ),
    "not positive": ("p = MatMul(q, kt) a = Mul(p, minus)", WEIGHTS, "not positive"),
    "fills that hide nothing": ("p = MatMul(q, kt) a = Where(c, p, three)", WEIGHTS, "hides nothing"),
    "fills that may be all": ("p = MatMul(q, kt) a = Where(c, p, little)", WEIGHTS, "may have no others"),
    "two numbers": (
        "p = MatMul(q, kt) p1 = Where(c, p, little) a = Where(c, p1, lowest)",
        WEIGHTS,
        "two different numbers",
    ),
    "filled behind a mask": (
        "p = MatMul(q, kt) p1 = Add(p, m) a = Where(c, p1, lowest)",
        WEIGHTS,
        "was added to",
    ),
    "two products": ("p = MatMul(q, kt) a = Add(p, p)", WEIGHTS, "not just one term"),
    "no product": ("a = Add(m, m)", WEIGHTS, "not just one term"),
    "no score chosen": ("p = MatMul(q, kt) a = Where(c, p, m)", WEIGHTS, "does not choose"),
    "a cap below 0": ("p = MatMul(q, kt) p1 = Tanh(p) a = Mul(p1, minus)", WEIGHTS, "capped at -2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    scores, weights, reason = REFUSED[name]
    model = attention(scores, weights, little=-1e4, lowest=LOWEST, minus=-2.0)
    fuse = FuseAttention()
    InferShapes()(model)
    assert not fuse(model).modified
    (told,) = refusals([fuse])
    assert "looks like attention" in told
    assert reason in told


def test_other_ranks_and_types_are_refused() -> None:
    for text, reason in (
        ("(float[b, s, 8] q, float[b, 8, t] k, float[b, t, 8] v) => (float[b, s, 8] y)", "rank 3"),
        (
            "(double[b, 2, s, 8] q, double[b, 2, 8, t] k, double[b, 2, t, 8] v) => (double[b, 2, s, 8] y)",
            "DOUBLE",
        ),
        (
            "(float[b, 2, s, 8] q, float[1, 2, 8, t] k, float[1, 2, t, 8] v) => (float[b, 2, s, 8] y)",
            "batches",
        ),
        ("(float[b, 2, s, 8] q, float[b, 2, 8, t] k, float[b, 1, t, 8] v) => (float[b, 2, s, 8] y)", "heads"),
    ):
        model = parse(text + "{ a = MatMul(q, k) w = Softmax(a) y = MatMul(w, v) }")
        fuse = FuseAttention()
        InferShapes()(model)
        assert not fuse(model).modified
        assert reason in refusals([fuse])[0]


def test_a_mask_that_broadcasts_the_scores_is_refused() -> None:
    model = parse(
        "(float[1, 2, s, 8] q, float[1, 2, 8, t] k, float[1, 2, t, 8] v, float[b, 1, s, t] m)"
        " => (float[b, 2, s, 8] y)"
        "{ p = MatMul(q, k) a = Add(p, m) w = Softmax(a) y = MatMul(w, v) }"
    )
    fuse = FuseAttention()
    InferShapes()(model)
    assert not fuse(model).modified
    assert "broadcasts" in refusals([fuse])[0]


def test_a_classifier_is_no_attention() -> None:
    weight = np.ones((8, 5), np.float32)
    model = parse(
        "(float[b, 8] x) => (float[b, 5] y) { a = MatMul(x, w1) w = Softmax(a) y = MatMul(w, w2) }",
        w1=weight,
        w2=np.ones((5, 5), np.float32),
    )
    fuse = FuseAttention()
    check_pass(model, fuse, expect_modified=False)
    assert not fuse.refusals


# -- the cache -----------------------------------------------------------------------------------------------

CACHED = """(int64[b, s] input_ids, float[b, 2, p, 8] past_k, float[b, 2, p, 8] past_v, float[b, 4, s, 8] q,
    float[b, 2, s, 8] k, float[b, 2, s, 8] v)
    => (float[b, 4, s, 8] y, float[b, 2, t, 8] pk, float[b, 2, t, 8] pv)
    <int64[1] two = {2}, int64[5] twice = {1, 1, 2, 1, 1}, int64[4] heads = {0, 4, -1, 8}>
    { pk = Concat<axis = -2>(past_k, k) pv = Concat<axis = 2>(past_v, v)
      k5 = Unsqueeze(pk, two) v5 = Unsqueeze(pv, two) k10 = Tile(k5, twice) v10 = Tile(v5, twice)
      kr = Reshape(k10, heads) vr = Reshape(v10, heads) %s }"""
DECOMPOSED = "kt = Transpose<perm = [0, 1, 3, 2]>(kr) a = MatMul(q, kt) w = Softmax(a) y = MatMul(w, vr)"


@pytest.mark.parametrize("body", [DECOMPOSED, "y = Attention(q, kr, vr)"], ids=["decomposed", "one node"])
def test_past_and_present(body: str) -> None:
    model = check_pass(parse(CACHED % body), FuseAttention(), b=2, s=3, p=5)
    assert ops(model) == ["Attention"]
    node = model.graph[-1]
    names = [None if v is None else v.name for v in node.inputs]
    assert names == ["q", "k", "v", None, "past_k", "past_v"]
    assert [v.name for v in node.outputs] == ["y", "pk", "pv"]


def test_a_present_that_is_read_elsewhere_stays_outside() -> None:
    text = CACHED.replace("(float[b, 4, s, 8] y,", "(float[b, 2, t, 8] z, float[b, 4, s, 8] y,")
    model = parse(text % (DECOMPOSED + " z = Exp(pk)"))
    fuse = FuseAttention()
    check_pass(model, fuse, b=2, s=3, p=5)
    assert len([n for n in model.graph if n.op_type == "Concat"]) == 2
    assert "'pk' is read by" in refusals([fuse])[0]


def test_half_a_cache_stays_outside() -> None:
    text = CACHED.replace("float[b, 2, t, 8] pv)", "float[b, 2, t, 8] pz)").replace(
        "pv = Concat", "pz = Concat"
    )
    model = parse(
        text.replace("Unsqueeze(pv", "Unsqueeze(pv0").replace(
            "{ pk", "{ pv0 = Concat<axis = 2>(v, past_v) pk"
        )
        % DECOMPOSED
    )
    fuse = FuseAttention()
    check_pass(model, fuse, b=2, s=3, p=5)
    assert "only one of its key and value" in refusals([fuse])[0]


def test_the_shape_of_a_present_comes_from_the_inputs() -> None:
    """As exporters read it for a mask, which the node that makes the present then reads."""
    body = (
        "n = Shape<start = 2, end = 3>(pk) n0 = Squeeze(n) r = Range(zero, n0, one) e = Less(r, n0)"
        " y = Attention(q, kr, vr, e4)"
    )
    text = CACHED.replace(
        "<int64[1] two", "<int64 zero = {0}, int64 one = {1}, int64[3] front = {0, 1, 2}, int64[1] two"
    )
    text = text.replace("float[b, 2, s, 8] v)", "float[b, 2, s, 8] v, bool[b, 1, s, t0] c)")
    body = body.replace("y =", "e3 = Unsqueeze(e, front) e4 = Or(e3, c) y =")
    model = parse(text % body)
    prepared = prepare_model(model)
    (node,) = [n for n in prepared.graph if n.op_type == "Attention"]
    assert len(node.outputs) == 3


GPT2 = """(int64[b, s] input_ids, float[b, 4, p, 8] past_k, float[b, 4, p, 8] past_v)
    => (float[b, 4, s, 8] y, float[b, 4, t, 8] pk, float[b, 4, t, 8] pv)
    <int64[4] split = {0, 0, 4, 8}, int64[1] two = {2}, int64[1] three = {3}, int64[1] nought = {0},
     float hidden = {-10000}>
    { x = Gather(table, input_ids) x4 = Reshape(x, split) h = Transpose<perm = [0, 2, 1, 3]>(x4)
      pk = Concat<axis = -2>(past_k, h) pv = Concat<axis = -2>(past_v, h)
      all = Shape<start = 2, end = 3>(pk) new = Shape<start = 2, end = 3>(h) old = Sub(all, new)
      rows = Slice(bias, old, all, two) mask = Slice(rows, nought, all, three)
      kt = Transpose<perm = [0, 1, 3, 2]>(pk) a = MatMul(h, kt) a1 = Where(mask, a, hidden) w = Softmax(a1)
      y = MatMul(w, pv) }"""


def test_a_causal_mask_cut_from_a_table() -> None:
    """The buffer of older GPT-2 files, whose -10^4 hides as well as -inf: each query attends itself."""
    bias = np.tri(16, dtype=bool).reshape(1, 1, 16, 16)
    table = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    original = parse(GPT2, bias=bias, table=table)
    prepared = parse(GPT2, bias=bias, table=table)
    prepare_model(prepared)
    assert not {"Slice", "Where", "Softmax", "Concat"} & set(ops(prepared)), ops(prepared)
    (node,) = [n for n in prepared.graph if n.op_type == "Attention"]
    assert node.attributes.get_int("is_causal") == 1
    assert node.inputs[3] is None
    for b, s, p in ((1, 1, 0), (3, 4, 0), (1, 4, 5), (3, 1, 5)):
        feeds = feeds_for(original, high=5, b=b, s=s, p=p)
        expected = run_ort(original, feeds)
        reference = ReferenceEvaluator(ir.to_proto(prepared)).run(None, feeds)
        for x, y, z in zip(expected, run_ort(prepared, feeds), reference, strict=True):
            np.testing.assert_allclose(y, x, atol=2e-6)
            np.testing.assert_allclose(z, x, atol=2e-6)
