"""Exports of small random models by torch's two exporters: what passes meet in the wild.

Nothing is downloaded. An export takes seconds to tens of seconds; each is made once a process.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from qgraph.models.export_onnx import quiet
from qgraph.passes import load_model

# name, opset: tens of seconds on a busy machine. Tests of these are marked `slow`.
SLOW = {("bert", 18), ("bert_eager", 20), ("llama", 18)}


def exported(name: str, opset: int, dynamo: bool) -> ir.Model:
    """The model as the exporter wrote it, freshly loaded. Skips the test when torch is missing or cannot
    export it."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    path = _file(name, opset, dynamo)
    if isinstance(path, str):
        pytest.skip(path)
    return load_model(path)


def export_case(name: str, opset: int, dynamo: bool, *rest: object) -> object:
    """The case as a parameter of a test, with its name, and marked where it is slow."""
    return pytest.param(
        name,
        opset,
        dynamo,
        *rest,
        id=f"{name}-{opset}-{'dynamo' if dynamo else 'torchscript'}",
        marks=pytest.mark.slow if (name, opset) in SLOW else (),
    )


@functools.cache
def _folder() -> Path:
    path = tempfile.mkdtemp(prefix="qgraph-exports-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


@functools.cache
def _file(name: str, opset: int, dynamo: bool) -> Path | str:
    """Where the export is, or why there is none."""
    path = _folder() / f"{name}-{opset}-{dynamo}.onnx"
    try:
        _export(name, opset, dynamo, path)
    except Exception as error:
        return f"torch cannot export it: {type(error).__name__}: {str(error)[:100]}"
    return path


def bert(attention: str = "sdpa") -> tuple[Any, list[str]]:
    import transformers

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


def llama(**changes: Any) -> tuple[Any, list[str]]:
    import transformers

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


def vit() -> tuple[Any, list[str]]:
    import transformers

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


def _first_output(module: Any, names: list[str]) -> Any:
    """The module with its first output alone: exporters want tensors, not dataclasses."""
    import torch

    class FirstOutput(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            return self.module(**dict(zip(names, values, strict=True)))[0]

    return FirstOutput().eval()


def _example(names: list[str]) -> tuple[Any, ...]:
    import torch

    if names == ["pixel_values"]:
        return (torch.randn(2, 3, 32, 32),)
    ids = torch.arange(14).reshape(2, 7) + 1
    return tuple(ids if name == "input_ids" else torch.ones_like(ids) for name in names)


def _export(name: str, opset: int, dynamo: bool, path: Path) -> None:
    import torch

    torch.manual_seed(0)
    module, names = MODELS[name]()
    wrapped = _first_output(module.eval(), names)
    axes = {0: "batch"} if names == ["pixel_values"] else {0: "batch", 1: "sequence"}
    with quiet():
        if dynamo:
            dims = {axis: torch.export.Dim(dim, min=1, max=64) for axis, dim in axes.items()}
            torch.onnx.export(
                wrapped,
                _example(names),
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
                _example(names),
                str(path),
                dynamo=False,
                opset_version=opset,
                input_names=names,
                output_names=["y"],
                dynamic_axes=dict.fromkeys(names, axes),
            )
