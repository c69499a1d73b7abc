"""Passes: graph to graph on onnx-ir. `pipeline.py` lists them in order; each file holds one.

    model = load_model("model.onnx")
    prepare_model(model)

Importing this package is cheap: onnx and onnx-ir are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qgraph.passes.base import GraphPass, Refusal
    from qgraph.passes.check_prepared import CheckPrepared
    from qgraph.passes.load import load_model
    from qgraph.passes.pipeline import PrepareOptions, prepare, prepare_model, run_passes

__all__ = [
    "CheckPrepared",
    "GraphPass",
    "PrepareOptions",
    "Refusal",
    "load_model",
    "prepare",
    "prepare_model",
    "run_passes",
]

_LAZY = {
    "CheckPrepared": "check_prepared",
    "GraphPass": "base",
    "PrepareOptions": "pipeline",
    "Refusal": "base",
    "load_model": "load",
    "prepare": "pipeline",
    "prepare_model": "pipeline",
    "run_passes": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"qgraph.passes.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'qgraph.passes' has no attribute {name!r}")
