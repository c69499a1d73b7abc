"""Sessions of ONNX Runtime as calibration wants them."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from qgraph.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    import onnx


_CODE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_NODE = re.compile(r"Non-zero status code returned while running (\w+) node\. Name:'(.*?)' Status Message: ")

_SOURCE = re.compile(r"/onnxruntime_src/\S+:\d+ .*? was false\. ")


def open_session(model: onnx.ModelProto, name: str) -> Any:
    """An `onnxruntime.InferenceSession` on one thread of the CPU, that may be run by many threads at once.

    Every node runs as it stands, by the same kernel whatever surrounds it: the graph is not optimized, so
    that values do not depend, to the last bit, on where it was cut. Memory goes back after each run.

    Raises UnsupportedError when ONNX Runtime lacks an operator, InputError when it refuses the model; `name`
    is for the message.
    """
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4  # what goes wrong comes as an exception
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except ort.capi.onnxruntime_pybind11_state.NotImplemented as error:
        raise UnsupportedError(
            f"{name}: ONNX Runtime, which runs the model for calibration, lacks an operator: "
            f"{first_line(error)}"
        ) from error
    except Exception as error:  # ONNX Runtime's classes share no base
        raise InputError(f"{name}: ONNX Runtime refuses it: {first_line(error)}") from error


def onnxruntime() -> Any:
    """The module, with its telemetry off."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # is read at import
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    return onnxruntime


def first_line(error: Exception) -> str:
    """What of a message of several lines says it, without ONNX Runtime's codes and phrases."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return _SOURCE.sub("", _NODE.sub(r"\1 '\2': ", _CODE.sub("", line)))
