"""Real models as code: where they come from, how they become ONNX, how their outputs are judged.

A model is one file or folder here with a class that satisfies `qgraph.models.base.ExportableModel`, and one
line in `_MODELS`. Causal language models need none: a folder of Hugging Face's is a model, too. Torch,
transformers and the weights are loaded only when a model is exported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qgraph.errors import UsageError

if TYPE_CHECKING:
    from qgraph.models.base import ExportableModel

__all__ = ["get_model", "model_names", "open_model"]

_MODELS = {
    "minilm": ("qgraph.models.minilm", "MiniLM"),
    "tinystories": ("qgraph.models.tinystories", "TinyStories"),
}


def model_names() -> list[str]:
    """The names `get_model` knows."""
    return sorted(_MODELS)


def get_model(name: str) -> ExportableModel:
    """The model of that name. Raises UsageError, listing the known ones."""
    import importlib

    if name not in _MODELS:
        raise UsageError(f"unknown model '{name}'; known are: {', '.join(model_names())}")
    module, class_name = _MODELS[name]
    return getattr(importlib.import_module(module), class_name)()


def open_model(name: str) -> ExportableModel:
    """The model of that name, or the causal language model in the folder `name`.

    Raises UsageError for what is neither, InputError for a folder without a model.
    """
    from pathlib import Path

    if name not in _MODELS and Path(name).is_dir():
        from qgraph.models.causal_lm import CausalLM

        return CausalLM(name)
    if name not in _MODELS and Path(name).name != name:
        raise UsageError(
            f"no folder '{name}', and no model of that name; known are: {', '.join(model_names())}"
        )
    return get_model(name)
