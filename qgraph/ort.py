"""ONNX Runtime, the float reference: imported here alone, with its telemetry switched off."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgraph.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from qgraph.samples import InputSpec

_DTYPES = {"float": "float32", "double": "float64"}


def make_session(path: Path, threads: int = 0) -> Any:
    """A CPU session of the ONNX file at `path`; 0 threads is one a core. Raises InputError when it does not
    load."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.log_severity_level = 3
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(f"{path}: ONNX Runtime refuses the model: {error}") from error


def session_specs(session: Any) -> list[InputSpec]:
    """The inputs of a session."""
    from qgraph.samples import InputSpec

    def dtype(text: str) -> str:
        name = text.removeprefix("tensor(").removesuffix(")")
        return _DTYPES.get(name, name)

    return [InputSpec(i.name, dtype(i.type), tuple(i.shape)) for i in session.get_inputs()]


def session_runner(
    path: Path, threads: int = 0
) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """A function that runs the ONNX file at `path`; inputs that it does not have are left out."""
    session = make_session(path, threads)
    names = [output.name for output in session.get_outputs()]
    known = {i.name for i in session.get_inputs()}

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            outputs = session.run(names, {k: v for k, v in feeds.items() if k in known})
        except Exception as error:
            raise InputError(f"{path}: ONNX Runtime fails on these inputs: {error}") from error
        return dict(zip(names, outputs, strict=True))

    return run
