"""One way to run a model, whatever it is: an ONNX file, or an artifact."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qgraph.errors import InputError, UnsupportedError, UsageError
from qgraph.evaluate.files import existing_file

if TYPE_CHECKING:
    import numpy as np
    import onnx

Feeds = Mapping[str, "np.ndarray"]


class Runner(Protocol):
    """Something that computes named outputs from named inputs."""

    name: str  # for tables: the engine
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """All outputs. `feeds` holds exactly the inputs; InputError says what is missing or wrong."""


class OnnxRuntimeRunner:
    """An ONNX file by ONNX Runtime on the CPU.

    threads: of one operator; 0 is ONNX Runtime's choice. Raises InputError for a file that it refuses,
    UnsupportedError for one with operators that it does not have, such as DequantizeLinear of 4-bit floats.
    """

    name = "onnxruntime"

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 0) -> None:
        self._path = os.fspath(existing_file(path))
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # is read at import
        import onnxruntime

        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what goes wrong comes as an exception
        try:
            self._session = onnxruntime.InferenceSession(
                self._path, options, providers=["CPUExecutionProvider"]
            )
        except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
            raise UnsupportedError(
                f"{self._path}: ONNX Runtime has no kernel for an operator of it ({_first_line(error)}); "
                "ONNX's reference evaluator runs it"
            ) from error
        except Exception as error:  # ONNX Runtime's classes share no base
            raise InputError(f"{self._path}: ONNX Runtime refuses it: {_first_line(error)}") from error
        self.inputs = tuple(i.name for i in self._session.get_inputs())
        self.outputs = tuple(o.name for o in self._session.get_outputs())

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """See `Runner.run`."""
        _check_names(self._path, self.inputs, feeds)
        try:
            values = self._session.run(None, dict(feeds))
        except Exception as error:
            raise InputError(f"{self._path}: ONNX Runtime: {_first_line(error)}") from error
        return dict(zip(self.outputs, values, strict=True))


class ReferenceRunner:
    """An ONNX file by ONNX's reference evaluator: numpy, slow, and the judge of what an operator means.

    given: values inside the graph that are inputs instead, computed by nobody; shown: values that are outputs
    as well. InputError for names that the graph does not have.
    """

    name = "reference"

    def __init__(
        self, path: str | os.PathLike[str], *, given: Sequence[str] = (), shown: Sequence[str] = ()
    ) -> None:
        self._path = os.fspath(existing_file(path))
        from onnx.reference import ReferenceEvaluator

        try:
            model = _cut(self._path, given, shown) if given or shown else self._path
            self._evaluator = ReferenceEvaluator(model)
        except InputError:
            raise
        except Exception as error:  # protobuf's, ONNX's and numpy's classes share no base
            raise InputError(
                f"{self._path}: ONNX's reference evaluator refuses it: {_first_line(error)}"
            ) from error
        initializers = {t.name for t in self._evaluator.proto_.graph.initializer}
        self.inputs = tuple(n for n in self._evaluator.input_names if n not in initializers)
        self.outputs = tuple(self._evaluator.output_names)

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """See `Runner.run`."""
        _check_names(self._path, self.inputs, feeds)
        try:
            values = self._evaluator.run(None, dict(feeds))
        except Exception as error:
            raise InputError(f"{self._path}: ONNX's reference evaluator: {_first_line(error)}") from error
        return dict(zip(self.outputs, values, strict=True))


def _cut(path: str, given: Sequence[str], shown: Sequence[str]) -> onnx.ModelProto:
    """The model with the values `given` as inputs and `shown` as further outputs."""
    import onnx

    model = onnx.load(path)
    graph = model.graph
    known = {name for node in graph.node for name in node.output} | {value.name for value in graph.input}
    for name in (*given, *shown):
        if name not in known:
            raise InputError(f"{path}: the graph has no value '{name}'")
    kept = [node for node in graph.node if not set(node.output) & set(given)]
    del graph.node[:]
    graph.node.extend(kept)
    there = {value.name for value in graph.input}
    graph.input.extend(onnx.ValueInfoProto(name=name) for name in given if name not in there)
    there = {value.name for value in graph.output}
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in shown if name not in there)
    return model


class ArtifactRunner:
    """An artifact by qgraph's runtime. threads: 0 is one for every core. Errors are the runtime's."""

    name = "qgraph"

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 0) -> None:
        from qgraph import runtime

        self._model = runtime.load(path, threads=threads)
        self.inputs = tuple(t.name for t in self._model.inputs)
        self.outputs = tuple(t.name for t in self._model.outputs)

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """See `Runner.run`."""
        return self._model.run(dict(feeds))


_ENGINES: dict[str, Callable[..., Runner]] = {
    "qgraph": ArtifactRunner,
    "onnxruntime": OnnxRuntimeRunner,
    "reference": lambda path, threads: ReferenceRunner(path),
}


def open_runner(path: str | os.PathLike[str], *, engine: str = "", threads: int = 0) -> Runner:
    """A runner for the file. engine: "qgraph" (default for .qg), "onnxruntime" (default else), "reference".

    Nothing falls back to another engine: what one cannot run is its error. Raises UsageError for an unknown
    engine.
    """
    engine = engine or ("qgraph" if Path(path).suffix == ".qg" else "onnxruntime")
    if engine not in _ENGINES:
        raise UsageError(f"unknown engine '{engine}'; known: {', '.join(_ENGINES)}")
    return _ENGINES[engine](path, threads=threads)


def _check_names(path: str, inputs: tuple[str, ...], feeds: Feeds) -> None:
    missing, unknown = [n for n in inputs if n not in feeds], [n for n in feeds if n not in inputs]
    if missing or unknown:
        what = [
            f"{label} {', '.join(names)}"
            for label, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise InputError(f"{path}: inputs {'; '.join(what)}: the model's are {', '.join(inputs)}")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
