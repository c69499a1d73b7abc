"""Causal language models from a local Hugging Face folder: Llama, Qwen, GPT-2 and whatever else transformers
can load as one, with a cache of keys and values or without.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qgraph.errors import InputError, UnsupportedError
from qgraph.models.base import ModelInput

MAX_BATCH = 1024  # of the export
MAX_BYTES = 1 << 31  # of an ONNX file


class CausalLM:
    """See `qgraph.models.base.ExportableModel`. `folder` holds `config.json`, weights and `tokenizer.json`.

    `inputs` are those that every export has. Raises InputError where the folder holds no model.
    """

    inputs: tuple[ModelInput, ...] = (ModelInput("input_ids", "int64", ("batch", "sequence")),)
    output = "logits"

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise InputError(f"{self.folder}: no Hugging Face model: it has no config.json")
        self.name = self.folder.resolve().name
        self.title = f"causal language model in {self.folder}"

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        cache: bool = True,
        mask: bool = False,
        opset: int = 0,
        verbose: bool = False,
    ) -> Path:
        """Writes `path`: input_ids [batch, sequence] to logits [batch, sequence, vocabulary], float32.

        The same bytes every time.

        Args:
            cache: also past_key_values.N.key and .value [batch, kv_heads, past_sequence, head size] for each
                layer, where past_sequence may be 0, to present.N.key and .value, which have the new tokens
                appended. Without it every run reads a text from its start.
            mask: also attention_mask [batch, total_sequence], of past and new tokens, and position_ids
                [batch, sequence], so that texts of a batch may be padded on the left. Without it all tokens
                count, and positions go on from the past.
            opset: 18 or above; 0 is that of `export_onnx`.

        Raises:
            ResourceError: a package is missing, the file cannot be written.
            InputError: transformers cannot load the folder as a causal language model.
            UnsupportedError: it has more weights than one ONNX file holds, or its cache is no cache of the
                keys and values of all tokens.
        """
        from qgraph.atomic import atomic_write
        from qgraph.models.export_onnx import OPSET, export_module, require

        require("torch", "transformers", "onnxscript")
        import onnx_ir as ir

        with atomic_write(path) as temporary:  # opened first: a bad path fails before the long export
            module = self.load(verbose)
            size = sum(p.nbytes for p in module.parameters())
            if size >= MAX_BYTES:
                raise UnsupportedError(
                    f"{self.folder}: {size / 1e9:.1f} GB of weights, more than one ONNX file holds"
                )
            signature = Signature.of(module, self.layers(module) if cache else (), mask=mask)
            model = export_module(
                as_function(module, signature),
                signature.example(module.config.vocab_size),
                input_names=signature.inputs,
                output_names=[self.output, *signature.presents],
                dynamic=[signature.dims(getattr(module.config, "max_position_embeddings", None) or 1 << 20)],
                opset=opset or OPSET,
                verbose=verbose,
            )
            model.graph.name = self.name
            ir.save(model, temporary)
        return Path(path)

    def load(self, verbose: bool = False) -> Any:
        """The torch module, float32, in eval mode. Raises InputError as `export` does."""
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        if not verbose:
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        try:
            module = AutoModelForCausalLM.from_pretrained(
                self.folder, local_files_only=True, dtype=torch.float32
            )
        except (OSError, ValueError, KeyError) as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise InputError(
                f"{self.folder}: no causal language model that transformers loads: {first}"
            ) from error
        return module.eval()

    def layers(self, module: Any) -> tuple[Layer, ...]:
        """What each layer keeps: read off a run, since configurations say it in many ways.

        Raises UnsupportedError as `export` does.
        """
        import torch
        from transformers.cache_utils import DynamicCache, DynamicLayer

        with torch.no_grad():
            kept = module(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=True)
        found = getattr(kept, "past_key_values", None)
        layers: list[Any] = list(found.layers) if isinstance(found, DynamicCache) else []
        other = [f"{i} ({type(x).__name__})" for i, x in enumerate(layers) if type(x) is not DynamicLayer]
        if other or not layers:
            what = f"layer {other[0]} of {type(module).__name__}" if other else type(module).__name__
            raise UnsupportedError(
                f"{self.folder}: {what} does not keep the keys and values of all tokens, the only "
                "cache that can be exported; export it without (--no-cache)"
            )
        return tuple(Layer(tuple(x.keys.shape[1::2]), tuple(x.values.shape[1::2])) for x in layers)

    def tokenizer_path(self) -> Path:
        """Raises InputError where the folder has none."""
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{self.folder}: it has no tokenizer.json")
        return path


@dataclass(frozen=True)
class Layer:
    """Heads and head size of the keys and of the values that a layer keeps."""

    key: tuple[int, ...]
    value: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of an export, in order; the inputs of the text are named as transformers names
    them."""

    text: tuple[str, ...]
    layers: tuple[Layer, ...]
    positions: bool  # whether the model takes any, given or made

    @classmethod
    def of(cls, module: Any, layers: tuple[Layer, ...], *, mask: bool) -> Signature:
        import inspect

        positions = "position_ids" in inspect.signature(module.forward).parameters
        text = ["input_ids"]
        if mask:
            text += ["attention_mask", *(["position_ids"] if positions else [])]
        return cls(tuple(text), layers, positions)

    def _kept(self, prefix: str) -> tuple[str, ...]:
        return tuple(f"{prefix}.{i}.{part}" for i in range(len(self.layers)) for part in ("key", "value"))

    @property
    def inputs(self) -> tuple[str, ...]:
        return *self.text, *self._kept("past_key_values")

    @property
    def presents(self) -> tuple[str, ...]:
        return self._kept("present")

    def example(self, vocabulary: int) -> tuple[Any, ...]:
        """Inputs to trace with: every size is another one, and none is 1."""
        import torch

        batch, length, past = 2, 8, 3 if self.layers else 0
        text = {
            "input_ids": torch.arange(batch * length).reshape(batch, length) % vocabulary,
            "attention_mask": torch.ones(batch, past + length, dtype=torch.int64),
            "position_ids": torch.arange(past, past + length).repeat(batch, 1),
        }
        kept = [
            torch.zeros(batch, heads, past, size)
            for layer in self.layers
            for heads, size in (layer.key, layer.value)
        ]
        return *(text[name] for name in self.text), *kept

    def dims(self, longest: int) -> tuple[dict[int, Any], ...]:
        """The dynamic axes of every input."""
        from torch.export import Dim

        batch, sequence = Dim("batch", min=1, max=MAX_BATCH), Dim("sequence", min=1, max=longest)
        past = Dim("past_sequence", min=0, max=longest)
        total = Dim("total_sequence", min=1, max=2 * longest) if self.layers else sequence
        text = {name: {0: batch, 1: total if name == "attention_mask" else sequence} for name in self.text}
        return *text.values(), *({0: batch, 2: past} for _ in self.presents)


def as_function(model: Any, signature: Signature) -> Any:
    """`model` as a module of the tensors of `signature`.

    Where positions are no input, they are written out for every sequence. Left to itself, transformers makes
    positions of batch 1, and the exporter then writes RotaryEmbedding nodes that ONNX Runtime refuses for
    larger batches.
    """
    import torch
    from transformers.cache_utils import DynamicCache

    class Function(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            text = dict(zip(signature.text, values, strict=False))
            past = values[len(text) :]
            if signature.positions and "position_ids" not in text:
                batch, length = text["input_ids"].shape
                start = past[0].shape[2] if past else 0
                positions = torch.arange(start, start + length)
                text["position_ids"] = positions.unsqueeze(0).expand(batch, -1)
            if not past:
                return (self.model(**text, use_cache=False).logits,)
            cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
            logits = self.model(**text, past_key_values=cache, use_cache=True).logits
            layers: list[Any] = cache.layers
            return logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values))

    return Function()
