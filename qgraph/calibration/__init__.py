"""Calibration: what a model's activations look like on real data, in bounded memory.

    data = open_data("text.txt", model_inputs(model), tokenizer="tokenizer.json")
    statistics = collect(model, data)

Importing this package is cheap: ONNX, ONNX Runtime and numpy are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qgraph.calibration.calibrator import StreamingCalibrator
    from qgraph.calibration.collector import channel_amax, collect
    from qgraph.calibration.data import Batch, Data, model_inputs, open_data
    from qgraph.calibration.journal import Journal

__all__ = [
    "Batch",
    "Data",
    "Journal",
    "StreamingCalibrator",
    "channel_amax",
    "collect",
    "model_inputs",
    "open_data",
]

_LAZY = {
    "Batch": "data",
    "Data": "data",
    "Journal": "journal",
    "StreamingCalibrator": "calibrator",
    "channel_amax": "collector",
    "collect": "collector",
    "model_inputs": "data",
    "open_data": "data",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"qgraph.calibration.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'qgraph.calibration' has no attribute {name!r}")
