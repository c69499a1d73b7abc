"""Decoders as exporters write them, with a cache and without: one form after `prepare`, with the outputs of
before."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from exports import decoder_feeds, export_case, exported
from prepare_harness import check_shapes, ops, run_ort

from qgraph.passes import prepare_model
from qgraph.passes.cache import find_cache

LAYERS = 2
NORMS = {
    "llama": {"RMSNormalization": 5, "RotaryEmbedding": 4, "LayerNormalization": 0, "Sigmoid": 2},
    "qwen3": {"RMSNormalization": 9, "RotaryEmbedding": 4, "LayerNormalization": 0, "Sigmoid": 2},
    "gpt2": {"RMSNormalization": 0, "RotaryEmbedding": 0, "LayerNormalization": 5, "Gelu": 2},
}
# Nothing of another spelling is left of attention, norms, rotary embeddings and activations.
GONE = ("Softmax", "Pow", "ReduceMean", "Sqrt", "Reciprocal", "Tanh", "Neg", "Gemm", "Div", "Sub")

CASES = [
    *((f"{kind}-cache", opset, True) for kind in NORMS for opset in (18, 20, 23)),
    *((kind, opset, True) for kind in ("qwen3", "gpt2") for opset in (18, 20, 23)),
    *((f"{kind}-cache-mask", opset, True) for kind in ("llama", "gpt2") for opset in (20, 23)),
    *((f"{kind}-cache", 17, False) for kind in NORMS),
    *((f"{kind}-cache-mask", 17, False) for kind in ("llama", "gpt2")),
    *((f"{kind}-mask", 17, False) for kind in ("qwen3", "gpt2")),
]


@pytest.mark.parametrize(("name", "opset", "dynamo"), [export_case(*case) for case in CASES])
def test_decoder(name: str, opset: int, dynamo: bool) -> None:
    original, model = exported(name, opset, dynamo), exported(name, opset, dynamo)
    refusals: list = []
    prepare_model(model, refusals=refusals)
    counts = Counter(ops(model))
    wanted = {**NORMS[name.split("-")[0]], "Attention": LAYERS, **dict.fromkeys(GONE, 0)}
    assert {op: counts[op] for op in wanted} == wanted, (counts, list(map(str, refusals)))
    assert all(counts[op] == (1 if counts["RotaryEmbedding"] else 0) for op in ("Cos", "Sin"))
    assert not [r for r in refusals if r.pass_name.startswith("Fuse")], list(map(str, refusals))
    cached = "cache" in name
    cache = find_cache(model.graph)
    assert (0 if cache is None else len(cache.pairs)) == (2 * LAYERS if cached else 0)
    for seed, (batch, past, length) in enumerate([(1, 0, 1), (1, 5, 1), (3, 0, 4), (3, 1, 4), (2, 5, 3)]):
        if past and not cached:
            continue
        feeds = decoder_feeds(original, seed, batch, past, length)
        compare(run_ort(original, feeds), run_ort(model, feeds), feeds)
    batch_name, length_name = map(str, model.graph.inputs[0].shape)
    sizes = {batch_name: 2, length_name: 3, **({cache.total: 8} if cache is not None else {})}
    check_shapes(model, [sizes, {**sizes, batch_name: 1}], high=2)


def compare(before: list[np.ndarray], after: list[np.ndarray], feeds: dict[str, np.ndarray]) -> None:
    """What is computed for padding is nobody's business."""
    batch, length = feeds["input_ids"].shape
    total = after[1].shape[2] if len(after) > 1 else length
    kept = feeds.get("attention_mask", np.ones((batch, total))) != 0
    np.testing.assert_allclose(
        after[0][kept[:, -length:]], before[0][kept[:, -length:]], atol=2e-5, rtol=1e-4
    )
    for a, b in zip(before[1:], after[1:], strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(
            b.transpose(0, 2, 1, 3)[kept], a.transpose(0, 2, 1, 3)[kept], atol=2e-5, rtol=1e-4
        )
