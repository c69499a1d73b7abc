"""Exports of small random models by torch's two exporters: what passes meet in the wild.

Nothing is downloaded. An export takes seconds to tens of seconds; each is made once a test run. To keep them
for the next one, name a folder in QGRAPH_TEST_EXPORTS, and empty it when this file changes.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.models.export_onnx import quiet
from qgraph.passes import load_model

# name, opset: tens of seconds on a busy machine. Tests of these are marked `slow`.
SLOW = {("bert", 18), ("bert_eager", 20), ("llama", 18), ("llama", 20)}
SLOW |= {
    (f"{name}{kind}", opset)
    for name in ("llama-cache", "qwen3", "qwen3-cache", "gpt2", "gpt2-cache")
    for kind in ("", "-mask")
    for opset in (18, 20, 23)
} - {("llama-cache", 23)}


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


def _folder() -> Path:
    path = Path(os.environ["QGRAPH_TEST_EXPORTS"])  # tests/conftest.py sees to it
    path.mkdir(parents=True, exist_ok=True)
    return path


@functools.cache
def _file(name: str, opset: int, dynamo: bool) -> Path | str:
    """Where the export is, or why there is none."""
    path = _folder() / f"{name}-{opset}-{'dynamo' if dynamo else 'torchscript'}.onnx"
    if path.exists():
        return path
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        if name in DECODERS:
            _export_decoder(name, opset, dynamo, unfinished)
        else:
            _export(name, opset, dynamo, unfinished)
    except Exception as error:
        return f"torch cannot export it: {type(error).__name__}: {str(error)[:100]}"
    unfinished.replace(path)
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


def decoder_feeds(model: ir.Model, seed: int, batch: int, past: int, length: int) -> dict[str, np.ndarray]:
    """Random inputs of a decoder below: tokens, and a past of that length. Where there is a mask, the
    first texts of a batch are shorter, padded on the left."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, past + length), np.int64)
    for row in range(batch - 1):
        mask[row, : min(past + length - 1, batch - 1 - row)] = 0
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, past:]
    feeds = {"attention_mask": mask, "position_ids": positions}
    feeds["input_ids"] = rng.integers(0, 50, (batch, length))
    for value in model.graph.inputs:
        if value.name not in feeds:
            shape = (batch, value.shape[1], past, value.shape[3])
            feeds[str(value.name)] = rng.standard_normal(shape).astype(np.float32)
    return {str(value.name): feeds[str(value.name)] for value in model.graph.inputs}


def decoder(name: str) -> Any:
    """A random causal language model, as transformers makes it: 2 layers, vocabulary 50, 4 heads, 2 for keys
    and values (GPT-2: 4), head size 8 (Qwen3: 16)."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if name == "llama":
        module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True))
    elif name == "qwen3":
        module = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, head_dim=16))
    else:
        module = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=50,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=64,
                initializer_range=0.3,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    for key, parameter in module.named_parameters():
        if parameter.ndim == 1:  # norms of ones would be one initializer, biases of zeros none
            torch.nn.init.normal_(parameter, 0 if key.endswith("bias") else 1, 0.2)
    return module


# name of the export -> model, with cache, with mask and positions as inputs
DECODERS = {
    "llama-cache": ("llama", True, False),
    "llama-cache-mask": ("llama", True, True),
    "qwen3-cache": ("qwen3", True, False),
    "gpt2-cache": ("gpt2", True, False),
    "gpt2-cache-mask": ("gpt2", True, True),
    "llama-text": ("llama", False, False),
    "qwen3": ("qwen3", False, False),
    "qwen3-mask": ("qwen3", False, True),
    "gpt2": ("gpt2", False, False),
    "gpt2-mask": ("gpt2", False, True),
}


def _export_decoder(name: str, opset: int, dynamo: bool, path: Path) -> None:
    from qgraph.models.causal_lm import CausalLM

    kind, cache, mask = DECODERS[name]
    with quiet(), tempfile.TemporaryDirectory() as folder:
        decoder(kind).save_pretrained(folder)
        model = CausalLM(folder)
        if dynamo:
            model.export(path, cache=cache, mask=mask, opset=opset)
        else:
            _export_as_optimum_does(model, cache, mask, opset, path)


def _export_as_optimum_does(model: Any, cache: bool, mask: bool, opset: int, path: Path) -> None:
    """By TorchScript, with the names and dims that optimum gives."""
    import torch

    from qgraph.models.causal_lm import Signature, as_function

    module = model.load()
    signature = Signature.of(module, model.layers(module) if cache else (), mask=mask)
    batch, new, old = "batch_size", "sequence_length", "past_sequence_length"
    total = f"{old} + {new}" if cache else new
    axes = {v: {0: batch, 1: total if v == "attention_mask" else new} for v in (*signature.text, "logits")}
    axes |= {v: {0: batch, 2: old} for v in signature.inputs[len(signature.text) :]}
    axes |= {v: {0: batch, 2: total} for v in signature.presents}
    torch.onnx.export(
        as_function(module, signature),
        signature.example(module.config.vocab_size),
        str(path),
        dynamo=False,
        opset_version=opset,
        input_names=list(signature.inputs),
        output_names=["logits", *signature.presents],
        dynamic_axes=axes,
    )


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
