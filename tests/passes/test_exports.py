"""What exporters really write, at several opsets: prepared graphs compute the same, with every shape
exact."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from exports import export_case, exported
from prepare_harness import check_shapes, feeds_for, ops, run_ort

from qgraph.passes import prepare_model
from qgraph.passes.orient_weights import TIED

SIZES = [{"batch": 2, "sequence": 7}, {"batch": 3, "sequence": 12}]


# name, opset, dynamo exporter, operators that the prepared graph must have
CASES = [
    ("bert", 23, True, {"LayerNormalization": 3, "Gelu": 1, "Attention": 1, "MatMul": 6}),
    ("bert", 18, True, {"LayerNormalization": 3, "Gelu": 1, "Gemm": 0, "Attention": 1}),
    ("bert_eager", 20, True, {"LayerNormalization": 3, "Gelu": 1, "Softmax": 0, "Attention": 1}),
    ("llama", 23, True, {"RMSNormalization": 3, "Attention": 1, "RotaryEmbedding": 2}),
    ("llama", 18, True, {"RMSNormalization": 3, "Attention": 1}),
    ("vit", 23, True, {"LayerNormalization": 3, "Gelu": 1, "Attention": 1, "Conv": 1}),
    ("bert_eager", 17, False, {"LayerNormalization": 3, "Gelu": 1, "Attention": 1}),
    ("bert_eager", 14, False, {"LayerNormalization": 3, "Gelu": 1, "Attention": 1}),
    ("llama", 17, False, {"RMSNormalization": 3, "Attention": 1}),
    ("vit", 14, False, {"LayerNormalization": 3, "Gelu": 1, "Attention": 1, "Conv": 1}),
]


@pytest.mark.parametrize(("name", "opset", "dynamo", "expected"), [export_case(*case) for case in CASES])
def test_export(name: str, opset: int, dynamo: bool, expected: dict[str, int]) -> None:
    original, model = exported(name, opset, dynamo), exported(name, opset, dynamo)
    refusals: list = []
    prepare_model(model, refusals=refusals)
    counts = Counter(ops(model))
    assert {op: counts[op] for op in expected} == expected, (counts, list(map(str, refusals)))
    # The exporter gives RotaryEmbedding a cache of batch 1, which ONNX Runtime refuses for any other batch.
    sizes_run = [{**s, "batch": 1} for s in SIZES] if counts["RotaryEmbedding"] else SIZES
    for seed, sizes in enumerate(sizes_run):
        feeds = feeds_for(original, seed, high=40, **sizes)
        if "attention_mask" in feeds:
            feeds["attention_mask"] = np.ones_like(feeds["attention_mask"])
            feeds["attention_mask"][0, -2:] = 0
        if "token_type_ids" in feeds:
            feeds["token_type_ids"] %= 2
        (a,), (b,) = run_ort(original, feeds), run_ort(model, feeds)
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)
    check_shapes(model, sizes_run, high=2)
    if name == "llama":
        check_tied(model)


def check_tied(model: ir.Model) -> None:
    """The table of tied embeddings is there once, as the output layer's weight."""
    tables = [v for v in model.graph.initializers.values() if sorted(v.const_value.shape) == [32, 50]]
    assert [v.const_value.shape for v in tables] == [[32, 50]]
    assert sum(TIED in node.metadata_props for node in model.graph) == 2
