"""What exporters really write, at several opsets: prepared graphs compute the same, with every shape exact.

Small random models, so nothing is downloaded. Exports take most of the time; each is made once.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from prepare_harness import check_shapes, feeds_for, ops, run_ort

from qgraph.passes import load_model, prepare_model
from qgraph.passes.orient_weights import TIED

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = [{"batch": 2, "sequence": 7}, {"batch": 3, "sequence": 12}]


def bert(attention: str = "sdpa"):
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        attn_implementation=attention,
    )
    return transformers.BertModel(config), ["input_ids", "attention_mask", "token_type_ids"]


def llama(**changes):
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
        tie_word_embeddings=True,
        **changes,
    )
    return transformers.LlamaForCausalLM(config), ["input_ids", "attention_mask"]


def vit():
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        hidden_act="gelu",
    )
    return transformers.ViTModel(config), ["pixel_values"]


MODELS = {
    "bert": bert,
    "bert_eager": functools.partial(bert, "eager"),
    "llama": llama,
    "vit": vit,
}


class FirstOutput(torch.nn.Module):
    """Exporters want tensors, not dataclasses."""

    def __init__(self, module: torch.nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module = module
        self.names = names

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return self.module(**dict(zip(self.names, values, strict=True)))[0]


def example(names: list[str]) -> tuple[torch.Tensor, ...]:
    if names == ["pixel_values"]:
        return (torch.randn(2, 3, 32, 32),)
    ids = torch.arange(14).reshape(2, 7) + 1
    return tuple(ids if name == "input_ids" else torch.ones_like(ids) for name in names)


def export(name: str, opset: int, dynamo: bool, path: Path) -> None:
    torch.manual_seed(0)
    module, names = MODELS[name]()
    wrapped = FirstOutput(module.eval(), names).eval()
    axes = {0: "batch"} if names == ["pixel_values"] else {0: "batch", 1: "sequence"}
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            if dynamo:
                dims = {axis: torch.export.Dim(dim, min=1, max=64) for axis, dim in axes.items()}
                torch.onnx.export(
                    wrapped,
                    example(names),
                    str(path),
                    dynamo=True,
                    external_data=False,
                    opset_version=opset,
                    input_names=names,
                    output_names=["y"],
                    dynamic_shapes=(tuple(dims for _ in names),),
                )
            else:
                torch.onnx.export(
                    wrapped,
                    example(names),
                    str(path),
                    dynamo=False,
                    opset_version=opset,
                    input_names=names,
                    output_names=["y"],
                    dynamic_axes=dict.fromkeys(names, axes),
                )
    finally:
        logging.disable(logging.NOTSET)


# name, opset, dynamo exporter, operators that the prepared graph must have
CASES = [
    ("bert", 23, True, {"LayerNormalization": 3, "Gelu": 1, "Attention": 1, "MatMul": 6}),
    ("bert", 18, True, {"LayerNormalization": 3, "Gelu": 1, "Gemm": 0, "Attention": 0}),
    ("bert_eager", 20, True, {"LayerNormalization": 3, "Gelu": 1, "Softmax": 1}),
    ("llama", 23, True, {"RMSNormalization": 3, "Attention": 1, "RotaryEmbedding": 2}),
    ("llama", 18, True, {"RMSNormalization": 3, "RotaryEmbedding": 0}),
    ("vit", 23, True, {"LayerNormalization": 3, "Gelu": 1, "Attention": 1, "Conv": 1}),
    ("bert_eager", 17, False, {"LayerNormalization": 3, "Gelu": 1}),
    ("bert_eager", 14, False, {"LayerNormalization": 3, "Gelu": 1}),
    ("llama", 17, False, {"RMSNormalization": 3}),
    ("vit", 14, False, {"LayerNormalization": 3, "Gelu": 1, "Conv": 1}),
]


SLOW = {("bert", 18), ("bert_eager", 20), ("llama", 18)}  # tens of seconds on a busy machine


@pytest.mark.parametrize(
    ("name", "opset", "dynamo", "expected"),
    [
        pytest.param(
            *case,
            id=f"{case[0]}-{case[1]}-{'dynamo' if case[2] else 'torchscript'}",
            marks=pytest.mark.slow if case[:2] in SLOW else (),
        )
        for case in CASES
    ],
)
def test_export(name: str, opset: int, dynamo: bool, expected: dict[str, int], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    try:
        export(name, opset, dynamo, path)
    except Exception as error:
        pytest.skip(f"torch cannot export it: {type(error).__name__}: {str(error)[:100]}")
    original, model = load_model(path), load_model(path)
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
