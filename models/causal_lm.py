"""Causal language models from a local Hugging Face folder: Llama, Qwen, GPT-2 and whatever else transformers
can load as one. Without a cache: every run reads a text from its start.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qgraph.errors import InputError, UnsupportedError
from qgraph.models.base import ModelInput

MAX_BATCH = 1024  # of the export
MAX_BYTES = 1 << 31  # of an ONNX file


class CausalLM:
    """See `qgraph.models.base.ExportableModel`. `folder` holds `config.json`, weights and `tokenizer.json`.

    Raises InputError where it does not.
    """

    inputs: tuple[ModelInput, ...] = (ModelInput("input_ids", "int64", ("batch", "sequence")),)
    output = "logits"

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise InputError(f"{self.folder}: no Hugging Face model: it has no config.json")
        self.name = self.folder.resolve().name
        self.title = f"causal language model in {self.folder}"

    def export(self, path: str | os.PathLike[str], *, opset: int = 0, verbose: bool = False) -> Path:
        """Writes `path`: input_ids [batch, sequence] to logits [batch, sequence, vocabulary], float32.

        opset: 18 or above; 0 is that of `export_onnx`. The same bytes every time.

        Raises:
            ResourceError: a package is missing, the file cannot be written.
            InputError: transformers cannot load the folder as a causal language model.
            UnsupportedError: it has more weights than one ONNX file holds.
        """
        from qgraph.atomic import atomic_write
        from qgraph.models.export_onnx import OPSET, export_module, require

        require("torch", "transformers", "onnxscript")
        import onnx_ir as ir
        import torch

        with atomic_write(path) as temporary:  # opened first: a bad path fails before the long export
            module = self._module(verbose)
            size = sum(p.nbytes for p in module.parameters())
            if size >= MAX_BYTES:
                raise UnsupportedError(
                    f"{self.folder}: {size / 1e9:.1f} GB of weights, more than one ONNX file holds"
                )
            longest = getattr(module.config, "max_position_embeddings", None) or 1 << 20
            batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
            sequence = torch.export.Dim("sequence", min=1, max=longest)
            model = export_module(
                _logits_alone(module),
                (torch.arange(2 * 8).reshape(2, 8) % module.config.vocab_size,),
                input_names=[i.name for i in self.inputs],
                output_names=[self.output],
                dynamic=[{0: batch, 1: sequence}],
                opset=opset or OPSET,
                verbose=verbose,
            )
            model.graph.name = self.name
            ir.save(model, temporary)
        return Path(path)

    def _module(self, verbose: bool) -> Any:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        if not verbose:
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        try:
            module = AutoModelForCausalLM.from_pretrained(
                self.folder, local_files_only=True, dtype=torch.float32, attn_implementation="sdpa"
            )
        except (OSError, ValueError, KeyError) as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise InputError(
                f"{self.folder}: no causal language model that transformers loads: {first}"
            ) from error
        return module.eval()

    def tokenizer_path(self) -> Path:
        """Raises InputError where the folder has none."""
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{self.folder}: it has no tokenizer.json")
        return path


def _logits_alone(model: Any) -> Any:
    """`model` as a module of token ids to logits, its positions 0, 1, ... written out for every sequence.

    Left to itself, transformers makes positions of batch 1, and the exporter then writes RotaryEmbedding
    nodes that ONNX Runtime refuses for larger batches.
    """
    import torch

    class LogitsAlone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            batch, length = input_ids.shape
            positions = torch.arange(length).unsqueeze(0).expand(batch, -1)
            return self.model(input_ids=input_ids, position_ids=positions, use_cache=False).logits

    return LogitsAlone()
