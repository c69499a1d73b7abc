"""Caches in 8 bits: what goes in is rounded, once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from qgraph.errors import UsageError
from qgraph.formats.activations import dynamic_int8
from qgraph.passes.lowbit_functions import AddLowbitFunctions
from qgraph.passes.quantize_cache import QuantizeCache

HEADS, SIZE = 2, 16


def value(name: str, length: str) -> ir.Value:
    shape = ir.Shape(["batch", HEADS, length, SIZE])
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=shape)


def attention(past: bool) -> ir.Model:
    q, k, v = (value(name, "sequence") for name in "qkv")
    pasts = [value(name, "total - sequence") for name in ("past_key", "past_value")] if past else []
    node = ir.node(
        "Attention",
        [q, k, v, *([None, *pasts] if past else [])],
        {"is_causal": 1},
        num_outputs=3 if past else 1,
        name="attention",
    )
    for output, name in zip(node.outputs, ("y", "present_key", "present_value"), strict=False):
        output.name, output.type = name, ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [q, k, v, *pasts], list(node.outputs), nodes=[node], opset_imports={"": 23}, name="attention"
    )
    return ir.Model(graph, ir_version=11)


def test_keys_and_values_are_rounded_by_token_and_head() -> None:
    model = attention(past=True)
    assert QuantizeCache()(model).modified
    AddLowbitFunctions()(model)
    evaluator = ReferenceEvaluator(ir.to_proto(model))
    rng = np.random.default_rng(0)

    def draw(length: int) -> np.ndarray:
        return rng.standard_normal((3, HEADS, length, SIZE)).astype(np.float32)

    first, second = ({name: draw(length) for name in "qkv"} for length in (4, 1))
    empty = dict.fromkeys(("past_key", "past_value"), np.zeros((3, HEADS, 0, SIZE), np.float32))
    _, key, v = evaluator.run(None, first | empty)
    for got, name in ((key, "k"), (v, "v")):
        np.testing.assert_array_equal(got, dynamic_int8(first[name]))
        assert np.abs(got - first[name]).max() > 1e-4
    _, longer, _ = evaluator.run(None, second | {"past_key": key, "past_value": v})
    np.testing.assert_array_equal(longer, np.concatenate([key, dynamic_int8(second["k"])], axis=2))


def test_without_a_cache_there_is_nothing_to_store() -> None:
    with pytest.raises(UsageError, match="the model has no cache of keys and values"):
        QuantizeCache()(attention(past=False))


def test_heads_side_by_side_come_apart_first() -> None:
    """An Attention of three dims: what is rounded is a head's, as in one of four."""

    def side_by_side(x: np.ndarray) -> np.ndarray:
        return x.transpose(0, 2, 1, 3).reshape(len(x), x.shape[2], -1)

    apart, joined = attention(past=True), attention(past=True)
    for given in joined.graph.inputs[:3]:
        given.shape = ir.Shape(["batch", "sequence", HEADS * SIZE])
    node = joined.graph.node("attention")
    node.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", HEADS)
    node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", HEADS)
    results = []
    rng = np.random.default_rng(1)
    feeds = {name: rng.standard_normal((3, HEADS, 4, SIZE)).astype(np.float32) for name in "qkv"}
    past = {f"past_{n}": np.zeros((3, HEADS, 0, SIZE), np.float32) for n in ("key", "value")}
    for model, given in ((apart, feeds), (joined, {n: side_by_side(x) for n, x in feeds.items()})):
        QuantizeCache()(model)
        AddLowbitFunctions()(model)
        results.append(ReferenceEvaluator(ir.to_proto(model)).run(None, {**given, **past}))
    np.testing.assert_allclose(results[1][0], side_by_side(results[0][0]), rtol=1e-6, atol=1e-6)
    for got, wanted in zip(results[1][1:], results[0][1:], strict=True):
        np.testing.assert_array_equal(got, wanted)
