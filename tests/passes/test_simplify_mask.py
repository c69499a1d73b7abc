"""Masks of Attention: what is causal is said so, the rest computes the same, with and without a past."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from prepare_harness import ops, parse, run_ort

from qgraph.passes.infer_shapes import InferShapes
from qgraph.passes.remove_unused import RemoveUnused
from qgraph.passes.simplify_mask import LOW, SimplifyMask
from qgraph.passes.unify_cache import UnifyCache

LOWEST = float(np.finfo(np.float32).min)

# col [s, 1] is where a query stands among all tokens, row [t] where a key does; pad [b, 1, 1, t] is true
# where there is no padding.
HEAD = """(int64[b, s] input_ids, int64[b, t] attention_mask, float[b, 4, s, 8] q, float[b, 2, s, 8] k,
           float[b, 2, s, 8] v, float[b, 2, p, 8] past_k, float[b, 2, p, 8] past_v)
    => (float[b, 4, s, 8] y, float[b, 2, t, 8] pk, float[b, 2, t, 8] pv)
    <int64 nought = {0}, int64 one = {1}, int64[1] last = {1}, int64[2] mid = {1, 2}, int64 window = {3},
     float zero = {0}>
    { s1 = Shape<start = 1, end = 2>(input_ids) s = Squeeze(s1)
      t1 = Shape<start = 1, end = 2>(attention_mask) t = Squeeze(t1)
      rq = Range(nought, s, one) rk = Range(nought, t, one) p = Sub(t, s) rq1 = Add(rq, p)
      col = Unsqueeze(rq1, last) row = Identity(rk)
      pad2 = Cast<to = 9>(attention_mask) pad = Unsqueeze(pad2, mid) causal = LessOrEqual(row, col)
      %s
      y, pk, pv = Attention(q, k, v, mask, past_k, past_v) }"""

# mask, is_causal, operators that are left of it, its type
MASKS = {
    "causal": ("mask = Identity(causal)", 1, None),
    "causal, the other way": ("mask = GreaterOrEqual(col, row)", 1, None),
    "causal, from below": ("c1 = Add(col, one) mask = Less(row, c1)", 1, None),
    "causal, negated": ("n = Greater(row, col) mask = Not(n)", 1, None),
    "causal and padding": ("mask = And(causal, pad)", 1, "BOOL"),
    "padding and causal, negated": (
        "n1 = Not(pad) n2 = Greater(row, col) n = Or(n1, n2) mask = Not(n)",
        1,
        "BOOL",
    ),
    "causal, expanded, and padding": ("m = And(pad, causal) sh = Shape(m) mask = Expand(m, sh)", 1, "BOOL"),
    "window": ("far = Sub(col, window) near = Greater(row, far) mask = And(near, causal)", 1, "BOOL"),
    "padding": ("sh = Shape(causal) mask = Expand(pad, sh)", 0, "BOOL"),
    "padding, one query": ("mask = Identity(pad)", 0, "BOOL"),
    "added, -inf": ("mask = Where(causal, zero, inf)", 1, None),
    "added, -inf, with padding": ("m = And(causal, pad) mask = Where(m, zero, inf)", 1, "BOOL"),
    "added, -inf, where not": ("n = Greater(row, col) mask = Where(n, inf, zero)", 1, None),
    "added, lowest": ("mask = Where(causal, zero, lowest)", 1, None),
    "added, -10^4": ("mask = Where(causal, zero, little)", 1, None),
    "added, lowest, a window": (
        "far = Sub(col, window) near = Greater(row, far) m = And(near, causal) mask = Where(m, zero, lowest)",
        1,
        "BOOL",
    ),
    "added, lowest, with padding": ("m = And(causal, pad) mask = Where(m, zero, lowest)", 0, "FLOAT"),
    "sum, -inf": ("c = Where(causal, zero, inf) p4 = Where(pad, zero, lowest) mask = Add(c, p4)", 1, "FLOAT"),
    "sum, lowest": (
        "c = Where(causal, zero, lowest) p4 = Where(pad, zero, lowest) mask = Add(c, p4)",
        0,
        "FLOAT",
    ),
    "product": (
        "f = Cast<to = 1>(pad) u = Sub(unit, f) p4 = Mul(u, lowest) c = Where(causal, zero, inf)"
        " mask = Add(p4, c)",
        1,
        "FLOAT",
    ),
    "too late": ("c1 = Add(col, one) mask = LessOrEqual(row, c1)", 0, "BOOL"),
    "too early": ("mask = Less(row, col)", 0, "BOOL"),
    "all": ("mask = GreaterOrEqual(row, nought)", 0, None),
}


def graph(name: str) -> ir.Model:
    numbers = {"inf": -np.inf, "lowest": LOWEST, "little": -1e4, "unit": 1.0}
    return parse(HEAD % MASKS[name][0], **{k: np.array(x, np.float32) for k, x in numbers.items()})


def feeds(b: int, s: int, p: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Row i starts with i tokens of padding."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    mask = np.ones((b, s + p), np.int64)
    for row in range(b):
        mask[row, : min(row, s + p - 1)] = 0
    return {
        "input_ids": np.zeros((b, s), np.int64),
        "attention_mask": mask,
        "q": normal(b, 4, s, 8),
        "k": normal(b, 2, s, 8),
        "v": normal(b, 2, s, 8),
        "past_k": normal(b, 2, p, 8),
        "past_v": normal(b, 2, p, 8),
    }


@pytest.mark.filterwarnings("ignore:overflow")  # two lowest numbers added
@pytest.mark.parametrize("name", MASKS)
def test_mask(name: str) -> None:
    _, causal, kind = MASKS[name]
    model = graph(name)
    before = ReferenceEvaluator(ir.to_proto(model))
    for step in (UnifyCache(), InferShapes(), SimplifyMask(), InferShapes()):
        step(model)
    assert not SimplifyMask()(model).modified
    RemoveUnused()(model)
    node = model.graph[-1]
    mask = node.inputs[3]
    assert node.attributes.get_int("is_causal", 0) == causal
    assert (None if mask is None else mask.dtype.name) == kind
    assert mask is None or str(mask.shape[-2]) == "s"
    after = ReferenceEvaluator(ir.to_proto(model))
    for b, s, p in itertools.product((1, 3), (1, 4), (0, 1, 5)):
        case = feeds(b, s, p)
        wanted = {v.name for v in model.graph.inputs}
        expected = before.run(None, case)
        for found in (after.run(None, {k: v for k, v in case.items() if k in wanted}), run_ort(model, case)):
            for x, y in zip(expected, found, strict=True):
                np.testing.assert_allclose(y, x, atol=2e-6)


def test_masks_are_written_once() -> None:
    text = HEAD.replace("float[b, 2, t, 8] pv)", "float[b, 2, t, 8] pv, float[b, 4, s, 8] z)")
    text = text.replace("past_v) }", "past_v) z = Attention(q, pk, pv, mask) }")
    model = parse(text % "m1 = And(causal, pad) n = Not(pad) m2 = Not(n) mask = And(m1, m2)")
    for step in (UnifyCache(), InferShapes(), SimplifyMask(), RemoveUnused()):
        step(model)
    assert ops(model).count("Expand") == 1
    assert ops(model).count("LessOrEqual") == 1  # the second Attention has no past: to it, this is not causal


def test_the_lowest_number_goes() -> None:
    """ONNX Runtime takes it for -inf: a query that attends no key would get zeros for a mean of all."""
    model = graph("added, lowest, with padding")
    for step in (UnifyCache(), InferShapes(), SimplifyMask(), RemoveUnused()):
        step(model)
    numbers = [
        v.const_value.numpy().item() for v in model.graph.initializers.values() if v.const_value.size == 1
    ]
    assert np.float32(LOW) in numbers
    assert np.float32(LOWEST) not in numbers


ATTENTION = """(float[b, 2, s, 8] q, float[b, 2, %(keys)s, 8] k, float[b, 2, %(keys)s, 8] v)
    => (float[b, 2, s, 8] y)
    <int64 zero = {0}, int64 one = {1}, int64[1] zero1 = {0}, int64[1] one1 = {1}>
    { s1 = Shape<start = 2, end = 3>(q) s = Squeeze(s1) t1 = Shape<start = 2, end = 3>(k) t = Squeeze(t1)
      rq = Range(zero, s, one) rk = Range(zero, t, one) row = Unsqueeze(rk, zero1) col = Unsqueeze(rq, one1)
      m = %(mask)s y = Attention<is_causal = 0>(q, k, v, m) }"""


@pytest.mark.parametrize(
    ("mask", "keys", "causal"),
    [
        ("LessOrEqual(row, col)", "s", 1),
        ("GreaterOrEqual(col, row)", "s", 1),
        ("Less(row, col)", "s", 0),
        ("GreaterOrEqual(row, col)", "s", 0),
        ("LessOrEqual(row, col)", "t", 0),
    ],
)
def test_without_a_past(mask: str, keys: str, causal: int) -> None:
    """The last one is causal only where there are as many keys as queries."""
    model = parse(ATTENTION % {"mask": mask, "keys": keys})
    for step in (InferShapes(), SimplifyMask(), RemoveUnused()):
        step(model)
    node = model.graph[-1]
    assert node.attributes.get_int("is_causal") == causal
    assert len(node.inputs) == (3 if causal else 4)
    assert (ops(model) == ["Attention"]) == bool(causal)
