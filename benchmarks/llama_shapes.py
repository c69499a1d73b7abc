"""Llama shapes with random weights, as ONNX: nothing is downloaded, and no text is worth reading."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 0
POSITIONS = 2048


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama; embedding and head are two tables."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000

    def kv_bytes(self, tokens: int) -> int:
        """Of a float32 cache of so many tokens."""
        return 2 * 4 * tokens * self.layers * self.kv_heads * self.width // self.heads

    def config(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=False,
        )


SHAPES = {
    "llama-134m": LlamaShape(layers=12, width=768, inner=2048, heads=12, kv_heads=12),
    "llama-1b": LlamaShape(layers=22, width=2048, inner=5632, heads=32, kv_heads=4),
}


def export(shape: LlamaShape, path: Path) -> Path:
    """Writes `path`, and the weights beside it: one ONNX file would end at 2 GiB. As `CausalLM.export` else:
    with a cache, without a mask.

    Raises ResourceError where torch or transformers are missing.
    """
    from qgraph.models.causal_lm import CausalLM, Signature, as_function
    from qgraph.models.export_onnx import export_module, require

    require("torch", "transformers", "onnxscript")
    import onnx_ir as ir
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(SEED)
    config = shape.config()
    config.save_pretrained(path.with_suffix(".config"))
    module = LlamaForCausalLM(config).eval()
    signature = Signature.of(module, CausalLM(path.with_suffix(".config")).layers(module), mask=False)
    model = export_module(
        as_function(module, signature),
        signature.example(shape.vocabulary),
        input_names=signature.inputs,
        output_names=["logits", *signature.presents],
        dynamic=[signature.dims(POSITIONS)],
    )
    ir.save(model, path, external_data=f"{path.name}.data")
    return path
