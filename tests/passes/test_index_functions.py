"""Positions and masks: formulas found, graphs shortened; caches of rotary embeddings."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import sympy
from prepare_harness import check_pass, feeds_for, ops, parse, run_ort

from qgraph.passes import prepare_model
from qgraph.passes.broadcast_rotary import BroadcastRotary
from qgraph.passes.fold_index_functions import FoldIndexFunctions
from qgraph.passes.index_functions import axis, index_functions
from qgraph.passes.infer_shapes import InferShapes
from qgraph.passes.shapes.dims import symbol

B, S = symbol("b"), symbol("s")
i0, i1, i2, i3 = (axis(k) for k in range(4))

# Every graph may use: x int64 [b, s]; r = 0 .. s-1; rows r as [1, s], columns as [s, 1]; n = s.
HEAD = """(int64[b, s] x) => (float[u, v] out)
<int64[1] zero1 = {0}, int64[1] one1 = {1}, int64[1] two1 = {2}, int64[1] last1 = {-1},
 int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64 three = {3}, int64[1] huge = {9223372036854775807},
 int64[1] lowest = {-9223372036854775807}>
{ sizes = Shape(x) n1 = Shape<start = 1, end = 2>(x) n = Squeeze(n1) r = Range(zero, n, one)
  row = Unsqueeze(r, zero1) col = Unsqueeze(r, one1) full = Expand(row, sizes)
  %s
  out = Cast<to = 1>(y) }"""


def graph(body: str) -> ir.Model:
    return parse(HEAD.replace("%s", body))


CASES = {
    "range": ("y = Unsqueeze(r, zero1)", i1),
    "range with a step": ("q = Range(two, n, three) y = Unsqueeze(q, zero1)", 2 + 3 * i1),
    "expand": ("y = Identity(full)", i1),
    "transpose": ("y = Transpose(full)", i0),
    "transpose by perm": ("y = Transpose<perm = [1, 0]>(full)", i0),
    "sum and difference": ("a = Add(row, col) c = Mul(a, two) d = Sub(c, row) y = Neg(d)", -i1 - 2 * i0),
    "sizes": ("y = Add(row, n)", i1 + S),
    "slice": ("y = Slice(full, one1, huge, one1)", i1 + 1),
    "slice with a step": ("y = Slice(full, one1, huge, one1, two1)", 2 * i1 + 1),
    "slice from the end": ("y = Slice(full, last1, huge, one1)", S - 1),
    "concat that goes on": (
        "f = Slice(full, zero1, one1, one1) g = Sub(f, one) y = Concat<axis = 1>(g, full)",
        i1 - 1,
    ),
    "causal": ("y = LessOrEqual(row, col)", sympy.Le(i1, i0)),
    "causal, the other way": ("y = GreaterOrEqual(col, row)", sympy.Ge(i0, i1)),
    "not": ("a = LessOrEqual(row, col) y = Not(a)", sympy.Gt(i1, i0)),
    "window": (
        "a = LessOrEqual(row, col) d = Sub(col, two) c = Greater(row, d) y = And(a, c)",
        sympy.And(sympy.Le(i1, i0), sympy.Gt(i1, i0 - 2)),
    ),
    "decided": ("a = Add(row, one) y = Greater(a, row)", sympy.true),
    "cumsum of ones": ("a = Equal(full, full) c = Cast<to = 7>(a) y = CumSum(c, one)", i1 + 1),
    "exclusive": (
        "a = Equal(full, full) c = Cast<to = 7>(a) y = CumSum<exclusive = 1>(c, one)",
        i1,
    ),
    "reverse": ("a = Equal(full, full) c = Cast<to = 7>(a) y = CumSum<reverse = 1>(c, one)", S - i1),
    "cumsum along what is equal": ("y = CumSum(full, zero)", i0 * i1 + i1),
    "where": ("a = Equal(full, full) y = Where(a, full, zero)", i1),
    "gather": ("y = Gather<axis = 1>(full, r)", i1),
    "gather of a formula": ("q = Mul(r, zero) y = Gather<axis = 1>(full, q)", sympy.Integer(0)),
    "gathernd": (
        "m = Max(row, col) t = Shape(m) a = Expand(row, t) c = Expand(col, t) p = Unsqueeze(a, last1)"
        " q = Unsqueeze(c, last1) i = Concat<axis = -1>(p, q) e = Expand(row, t) f = Sub(e, col)"
        " y = GatherND(f, i)",
        i0 - i1,
    ),
    "constant": ("z = ConstantOfShape<value = int64[1] {7}>(sizes) y = Identity(z)", sympy.Integer(7)),
    "bool to int": ("a = Equal(full, full) y = Cast<to = 7>(a)", sympy.Integer(1)),
    "int to bool": ("y = Cast<to = 9>(full)", sympy.Ne(i1, 0)),
    "xor": (
        "a = LessOrEqual(row, col) c = Equal(col, col) y = Xor(a, c)",
        sympy.Gt(i1, i0),
    ),
    # What is no function of the indices, or not one that is followed.
    "data": ("y = Add(full, x)", None),
    "concat that breaks off": ("y = Concat<axis = 1>(full, full)", None),
    "cumsum of positions": ("y = CumSum(full, one)", None),
    "slice backwards": ("y = Slice(full, last1, lowest, one1, last1)", None),
    "reshape that mixes axes": ("t = Concat<axis = 0>(n1, last1) y = Reshape(full, t)", None),
    "int32 may wrap": ("y = Cast<to = 6>(full)", None),
}


@pytest.mark.parametrize("name", CASES)
def test_formula(name: str) -> None:
    body, expected = CASES[name]
    model = graph(body)
    InferShapes()(model)
    (cast,) = (node for node in model.graph if node.outputs[0].name == "out")
    found = index_functions(model.graph).get(cast.inputs[0])
    assert (found is None) == (expected is None), found
    assert found is None or found.formula == expected


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sizes", [{"b": 2, "s": 5}, {"b": 1, "s": 3}])
def test_values_stay(name: str, sizes: dict[str, int]) -> None:
    """Whatever is rewritten computes the same."""
    model = graph(CASES[name][0])
    feeds = feeds_for(model, **sizes)
    (expected,) = run_ort(model, feeds)
    prepare_model(model)
    (found,) = run_ort(model, feeds)
    np.testing.assert_array_equal(found, expected)


def test_packed_sequences_of_the_exporter() -> None:
    """What torch writes for a causal mask over positions that it believes may restart: one comparison."""
    model = parse(
        """(int64[b, s] x) => (bool[b, one, s, s2] out)
        <int64[1] zero1 = {0}, int64[1] one1 = {1}, int64[1] two1 = {2}, int64[1] three1 = {3},
         int64 zero = {0}, int64[1] last1 = {-1}, int64 last = {-1}, int64 one = {1},
         int64[2] two_first = {0, 1}, int64[2] two_mid = {1, 2}, bool yes = {1},
         int64[1] huge = {9223372036854775807}>
        { b1 = Shape<end = 1>(x) b = Squeeze(b1) s1 = Shape<start = 1, end = 2>(x) s = Squeeze(s1)
          r = Range(zero, s, one) u = Unsqueeze(r, zero1) bs = Concat<axis = 0>(b1, last1)
          onesize = Concat<axis = 0>(b1, one1) e = Expand(u, onesize)
          first = Slice(e, zero1, one1, one1, one1) before = Sub(first, one) c = Concat<axis = -1>(before, e)
          s_more = Add(one, s) s_more1 = Reshape(s_more, last1)
          left = Slice(c, zero1, s1, last1, one1) right = Slice(c, one1, s_more1, last1, one1)
          step = Sub(right, left) same = Equal(step, one) new = Not(same) count = Cast<to = 7>(new)
          document = CumSum(count, last)
          rb = Range(zero, b, one) rb3 = Unsqueeze(rb, two_mid) rb4 = Unsqueeze(rb3, three1)
          r3 = Unsqueeze(r, two_first) query = Unsqueeze(r3, three1) key = Unsqueeze(r3, two1)
          qm = Max(rb4, query) qs = Shape(qm) qb = Expand(rb4, qs) qb1 = Unsqueeze(qb, last1)
          qq = Expand(query, qs) qq1 = Unsqueeze(qq, last1) qi = Concat<axis = -1>(qb1, qq1)
          km = Max(rb4, key) ks = Shape(km) kb = Expand(rb4, ks) kb1 = Unsqueeze(kb, last1)
          kk = Expand(key, ks) kk1 = Unsqueeze(kk, last1) ki = Concat<axis = -1>(kb1, kk1)
          qd = GatherND(document, qi) kd = GatherND(document, ki) together = Equal(qd, kd)
          a = And(yes, together) qp = GatherND(e, qi) kp = GatherND(e, ki) le = LessOrEqual(kp, qp)
          out = And(a, le) }"""
    )
    prepare_model(model)
    assert not {"CumSum", "GatherND", "Equal", "And", "Max", "Slice"} & set(ops(model)), ops(model)
    assert ops(model).count("LessOrEqual") == 1
    for b, s in ((1, 1), (3, 5)):
        (found,) = run_ort(model, {"x": np.zeros((b, s), np.int64)})
        np.testing.assert_array_equal(found, np.broadcast_to(np.tri(s, dtype=bool), (b, 1, s, s)))


def test_shortened_only_where_it_is_shorter() -> None:
    model = parse(
        "(int64[b, s] x) => (float[s] y) <int64 zero = {0}, int64 one = {1}>"
        "{ n1 = Shape<start = 1>(x) n = Squeeze(n1) r = Range(zero, n, one) y = Cast<to = 1>(r) }"
    )
    check_pass(model, FoldIndexFunctions(), expect_modified=False)


PADDING = """(int64[b, s] x) => (float[b, one, one2, s] y)
    <int64 zero = {0}, int64 one = {1}, int64[2] mid = {1, 2}, int64[1] three1 = {3},
     int64[3] first = {0, 1, 2}, int64[1] last1 = {-1}>
    { b1 = Shape<end = 1>(x) b = Squeeze(b1) s1 = Shape<start = 1>(x) s = Squeeze(s1)
      rb = Range(zero, b, one) rb3 = Unsqueeze(rb, mid) rb4 = Unsqueeze(rb3, three1)
      r = Range(zero, s, one) r4 = Unsqueeze(r, first) m = Max(rb4, r4) t = Shape(m)
      p = Expand(rb4, t) p1 = Unsqueeze(p, last1) q = Expand(r4, t) q1 = Unsqueeze(q, last1)
      i = Concat<axis = -1>(%s) g = GatherND(x, i) y = Cast<to = 1>(g) }"""


def test_gathernd_of_its_own_indices_is_a_view() -> None:
    model = check_pass(parse(PADDING % "p1, q1"), FoldIndexFunctions(), b=2, s=5)
    assert "GatherND" not in ops(model)
    assert ops(model)[-2:] == ["Unsqueeze", "Cast"]


FLAT = """(int64[b, s] x) => (float[b, one, one2, s] y)
    <int64 zero = {0}, int64 one = {1}, int64[3] back = {1, 2, 3}, int64[3] first = {0, 1, 2}>
    { b1 = Shape<end = 1>(x) b = Squeeze(b1) s1 = Shape<start = 1>(x) s = Squeeze(s1)
      rb = Range(zero, b, one) rb4 = Unsqueeze(rb, back) r = Range(zero, s, one) r4 = Unsqueeze(r, first)
      f = Flatten<axis = 2>(x) %s g = Gather(f, i) h = Shape(i) j = Reshape(g, h) y = Cast<to = 1>(j) }"""


@pytest.mark.parametrize(
    ("index", "is_view"),
    [
        ("m = Mul(rb4, s) i = Add(m, r4)", True),
        ("m = Mul(rb4, b) i = Add(m, r4)", False),
        ("i = Add(rb4, r4)", False),
    ],
)
def test_gather_from_a_flat_tensor(index: str, is_view: bool) -> None:
    """x[b, s] as the TorchScript exporter reads it, at b * length + s of all elements."""
    model = check_pass(parse(FLAT % index), FoldIndexFunctions(), expect_modified=is_view, b=2, s=5)
    assert ("Gather" not in ops(model)) == is_view


def test_gathernd_transposed() -> None:
    """x[s, b] at [b, 1, 1, s], where both have one size."""
    text = (PADDING % "q1, p1").replace("int64[b, s] x", "int64[s, s] x").replace("float[b,", "float[s,")
    model = check_pass(parse(text), FoldIndexFunctions(), s=4)
    assert "GatherND" not in ops(model)
    assert ops(model)[-3:] == ["Transpose", "Unsqueeze", "Cast"]


def test_gathernd_of_other_indices_stays() -> None:
    model = check_pass(parse(PADDING % "p1, p1"), FoldIndexFunctions(), b=2, s=5)
    assert "GatherND" in ops(model)


def test_rotary_caches_get_the_batch() -> None:
    model = parse(
        "(float[b, 2, s, 8] x, float[b, 3, s, 8] z, float[1, s, 4] c, float[1, s, 4] i) => "
        "(float[b, 2, s, 8] y, float[b, 3, s, 8] t)"
        "{ y = RotaryEmbedding(x, c, i) t = RotaryEmbedding(z, c, i) }"
    )
    feeds = feeds_for(model, b=3, s=5)
    expected = [
        np.concatenate(parts)
        for parts in zip(
            *(
                run_ort(model, {k: v[n : n + 1] if k in "xz" else v for k, v in feeds.items()})
                for n in range(3)
            ),
            strict=True,
        )
    ]
    InferShapes()(model)
    assert BroadcastRotary()(model).modified
    assert ops(model).count("Expand") == 2  # one a cache, for both
    InferShapes()(model)
    assert not BroadcastRotary()(model).modified
    for a, b in zip(run_ort(model, feeds), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
