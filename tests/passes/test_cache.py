"""Caches of decoders: found, and their lengths told by one name, whatever exporters called them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.checker import check_model
from prepare_harness import parse, refusals

from qgraph.errors import InputError, UnsupportedError
from qgraph.passes import prepare_model
from qgraph.passes.cache import find_cache
from qgraph.passes.infer_shapes import CHECKS, InferShapes
from qgraph.passes.shapes.dims import symbol
from qgraph.passes.unify_cache import UnifyCache

# Two layers' caches; the dims of everything, as an exporter calls them.
DECODER = """(int64[b, s] input_ids, int64[b, t] attention_mask, float[b, 2, p0, 8] past_0_key,
    float[b, 2, p1, 8] past_0_value, float[b, 2, p2, 8] past_1_key, float[b, 2, p3, 8] past_1_value)
    => (float[b, s, 8] y, float[b, 2, t0, 8] present_0_key, float[b, 2, t1, 8] present_0_value,
        float[b, 2, t2, 8] present_1_key, float[b, 2, t3, 8] present_1_value)
    <int64[4] split = {0, 0, 2, 8}, int64[3] merge = {0, 0, 16}, float half = {0.5}, int64[2] mid = {1, 2}>
    { x = Gather(table, input_ids) x4 = Reshape(x, split) h = Transpose<perm = [0, 2, 1, 3]>(x4)
      c = Cast<to = 9>(attention_mask) c4 = Unsqueeze(c, mid)
      present_0_key = Concat<axis = 2>(past_0_key, h) present_0_value = Concat<axis = -2>(past_0_value, h)
      present_1_key = Concat<axis = 2>(past_1_key, h) present_1_value = Concat<axis = -2>(past_1_value, h)
      kt = Transpose<perm = [0, 1, 3, 2]>(present_0_key) a = MatMul(h, kt) a1 = Where(c4, a, hidden)
      w = Softmax(a1) z = MatMul(w, present_0_value)
      kt1 = Transpose<perm = [0, 1, 3, 2]>(present_1_key) b = MatMul(z, kt1) w1 = Softmax(b)
      u = MatMul(w1, present_1_value) u1 = Transpose<perm = [0, 2, 1, 3]>(u) u2 = Reshape(u1, merge)
      y = MatMul(u2, out) }"""
NAMES = {
    "optimum": {"b": "batch_size", "s": "sequence_length", "t": "T", "p": "past_sequence_length"},
    "optimum, a sum": {"b": "batch", "s": "sequence", "t": "past_sequence + 1", "p": "past_sequence"},
    "dynamo": {"b": "s18", "s": "s70", "t": "s83", "p": "s45 s42 s46 s50"},
    "one name for both": {"b": "N", "s": "sequence", "t": "sequence", "p": "past"},
    "our own": {"b": "batch", "s": "sequence", "t": "total_sequence", "p": "total_sequence - sequence"},
    "unnamed": {"b": "", "s": "", "t": "", "p": ""},
    "one token": {"b": "batch", "s": 1, "t": "all", "p": "past"},
}
TOTALS = {"optimum": "T", "dynamo": "s83", "one token": "all"}


def decoder(b: str, s: str | int, t: str, p: str, text: str = DECODER) -> ir.Model:
    """The graph with these dims; `p` may name one for each past."""
    model = parse(
        text,
        table=np.ones((4, 16), np.float32),
        out=np.ones((16, 8), np.float32),
        hidden=np.array(-np.inf, np.float32),
    )
    pasts = p.split() if len(p.split()) == 4 else [p] * 4
    names = {"b": b, "s": s, "t": t, **{f"p{i}": past for i, past in enumerate(pasts)}}
    for value in model.graph.inputs:
        old = [d if isinstance(d, int) else names[str(d.value)] for d in value.shape]
        value.shape = ir.Shape([d if isinstance(d, int) else ir.SymbolicDim(d or None) for d in old])
    return model


@pytest.mark.parametrize("names", NAMES)
def test_lengths_are_told_by_one_name(names: str) -> None:
    model = decoder(**NAMES[names])
    assert UnifyCache()(model).modified
    assert not UnifyCache()(model).modified
    total, new = TOTALS.get(names, "total_sequence"), NAMES[names]["s"] or "sequence"
    shapes = {v.name: [str(d) for d in v.shape] for v in model.graph.inputs}
    assert shapes["attention_mask"][1] == total
    assert {shapes[n][2] for n in shapes if n.startswith("past")} == {f"{total} - {new}"}
    check_model(ir.to_proto(prepare_model(model)))
    cache = find_cache(model.graph)
    assert cache is not None
    assert (cache.total, cache.sequence) == (total, new if new == 1 else symbol(str(new)))
    assert [(p.past.name, p.present.name) for p in cache.pairs] == [
        (f"past_{i}_{part}", f"present_{i}_{part}") for i in (0, 1) for part in ("key", "value")
    ]
    assert {str(v.shape[2]) for v in model.graph.outputs[1:]} == {total}
    assert [(str(a), str(b)) for a, b, _ in model.graph.meta[CHECKS]] == [(total, str(new))]


def test_prepared_twice() -> None:
    """A low-bit file is prepared again: the same names, also where no input but the cache tells the total."""
    text = DECODER.replace("int64[b, t] attention_mask, ", "").replace("Where(c4, a, hidden)", "Identity(a)")
    text = text.replace("c = Cast<to = 9>(attention_mask) c4 = Unsqueeze(c, mid)", "")
    model = decoder("b", "sequence", "", "past", text)
    prepare_model(model)
    cache = find_cache(model.graph)
    assert cache is not None
    assert cache.total == "total_sequence"
    again = ir.from_proto(ir.to_proto(model))
    prepare_model(again)
    assert [str(v.shape) for v in again.graph.inputs] == [str(v.shape) for v in model.graph.inputs]
    assert find_cache(again.graph).total == cache.total  # type: ignore[union-attr]


def test_a_cache_of_fixed_length_is_left_alone() -> None:
    model = decoder("b", "s", "t", "p")
    model.graph.inputs[2].shape = ir.Shape([ir.SymbolicDim("b"), 2, 5, 8])
    unify = UnifyCache()
    assert not unify(model).modified
    assert "cache of 5 tokens" in refusals([unify])[0]


def test_without_tokens_it_is_left_alone() -> None:
    model = decoder("b", "s", "t", "p")
    model.graph.inputs[0].name = "words"
    unify = UnifyCache()
    assert not unify(model).modified
    assert "no 'input_ids'" in refusals([unify])[0]


def test_what_is_named_like_a_cache_is_told() -> None:
    model = parse("(float[b, 2, p, 8] past_key) => (float[b, 2, p, 8] y) { y = Exp(past_key) }")
    unify = UnifyCache()
    assert not unify(model).modified
    assert "no node puts new tokens behind it" in refusals([unify])[0]
    assert find_cache(model.graph) is None


ONE = """(float[b, 2, p, 8] pk, float[b, 2, p, 8] pv, float[b, 2, s, 8] q, float[b, 2, s, 8] k,
    float[b, 2, s, 8] v) => (float[b, 2, s, 8] y, float[b, 2, t, 8] nk, float[b, 2, t, 8] nv)
    { y, nk, nv = Attention(q, k, v, , pk, pv) }"""


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("", "", "its length with the new tokens, 'p . s', must be"),
        ("float[b, 2, t, 8] nk, ", "", "no output of the model"),
        ("(q, k, v, , pk", "(q, k, v, , e", "no input of the model"),
        ("(q, k, v, , pk, pv)", "(q, k, v, , pk, pk)", "read elsewhere"),
        ("pv) }", "pv) z = Exp(nk) }", "is read by node"),
    ],
)
def test_pasts_of_another_form_are_refused(old: str, new: str, reason: str) -> None:
    text = ONE.replace(old, new) if old else ONE
    if "e, pv" in text:
        text = text.replace("{ y", "{ e = Exp(pk) y")
    model = parse(text)
    InferShapes()(model)
    with pytest.raises(UnsupportedError, match=reason):
        find_cache(model.graph)


def test_shapes_of_a_cache() -> None:
    """A name that stands in a difference alone is bound by it; one that may be 0 is not."""
    model = parse(ONE)
    for value in model.graph.inputs[:2]:
        value.shape = ir.Shape([ir.SymbolicDim("b"), 2, ir.SymbolicDim("all - s"), 8])
    InferShapes()(model)
    assert [str(v.shape) for v in model.graph.outputs] == ["[b,2,s,8]", "[b,2,all,8]", "[b,2,all,8]"]
    for value in model.graph.inputs[:2]:
        value.shape = ir.Shape([ir.SymbolicDim("b"), 2, ir.SymbolicDim("old + 1"), 8])
    InferShapes()(model)
    assert str(model.graph.inputs[0].shape[2]) == "old___1"


def test_halves_of_unequal_length() -> None:
    model = parse(
        ONE.replace("float[b, 2, p, 8] pv", "float[b, 2, 3, 8] pv").replace("2, p, 8] pk", "2, 4, 8] pk")
    )
    with pytest.raises(InputError, match="lengths of past key and value"):
        InferShapes()(model)
