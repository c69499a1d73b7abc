"""One way to run a model, whatever it is: an ONNX file, or an artifact."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qgraph.errors import InputError, UnsupportedError, UsageError
from qgraph.evaluate.files import existing_file
from qgraph.evaluate.samples import InputSpec, input_specs
from qgraph.evaluate.text_ports import new_tokens

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from qgraph.runtime import Model

_LONGEST_MESSAGE = 400
# What ONNX Runtime says of an operator of ours that the file does not define. For a hint alone.
_OURS = re.compile(r"ai\.qgraph:\w+\(-?\d+\) is not a registered function/op")

Feeds = Mapping[str, "np.ndarray"]
Shape = tuple[int | str, ...]


class Runner(Protocol):
    """Something that computes named outputs from named inputs."""

    name: str  # for tables: the engine
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    specs: tuple[InputSpec, ...]  # of the inputs
    output_shapes: dict[str, Shape]

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """All outputs. `feeds` holds exactly the inputs; InputError says what is missing or wrong."""


class OnnxRuntimeRunner:
    """An ONNX file by ONNX Runtime on the CPU.

    threads: of one operator; 0 is ONNX Runtime's choice. kernels: whether the file may have operators of ours
    (`--export ort`), which run the code in it: a choice, for other ONNX files are data. Raises InputError for
    a file that it refuses, UnsupportedError for one with operators that it does not have, such as
    DequantizeLinear of 4-bit floats, ResourceError where the library of our operators cannot be built.
    """

    name = "onnxruntime"

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 0, kernels: bool = False) -> None:
        self._path = os.fspath(existing_file(path))
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # is read at import
        import onnxruntime

        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what goes wrong comes as an exception
        if kernels:
            from qgraph.runtime.build import ort_library

            options.register_custom_ops_library(str(ort_library()))
        try:
            self._session = onnxruntime.InferenceSession(
                self._path, options, providers=["CPUExecutionProvider"]
            )
        except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
            raise UnsupportedError(
                f"{self._path}: ONNX Runtime has no kernel for an operator of it ({_one_line(error)}); "
                "ONNX's reference evaluator runs it, and `--export ort` makes one that ONNX Runtime runs"
            ) from error
        except Exception as error:  # ONNX Runtime's classes share no base
            ours = not kernels and _OURS.search(str(error))
            hint = "; engine 'ort' runs files of `--export ort`" if ours else ""
            raise InputError(f"{self._path}: ONNX Runtime refuses it: {_one_line(error)}{hint}") from error
        self.specs = tuple(_ort_spec(i) for i in self._session.get_inputs())
        self.output_shapes: dict[str, Shape] = {o.name: tuple(o.shape) for o in self._session.get_outputs()}
        self.inputs = tuple(spec.name for spec in self.specs)
        self.outputs = tuple(self.output_shapes)

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """See `Runner.run`."""
        _check_names(self._path, self.inputs, feeds)
        try:
            values = self._session.run(None, dict(feeds))
        except Exception as error:
            raise InputError(f"{self._path}: ONNX Runtime: {_one_line(error)}") from error
        return dict(zip(self.outputs, values, strict=True))

    def run_values(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        """Some outputs, as ONNX Runtime holds them (`.numpy()` shows one): fed again they are not copied.
        Otherwise as `run`."""
        from onnxruntime import OrtValue

        _check_names(self._path, self.inputs, feeds)
        try:
            given = {
                name: value if isinstance(value, OrtValue) else OrtValue.ortvalue_from_numpy(value)
                for name, value in feeds.items()
            }
            values = self._session.run_with_ort_values(list(outputs), given)
        except Exception as error:
            raise InputError(f"{self._path}: ONNX Runtime: {_one_line(error)}") from error
        return dict(zip(outputs, values, strict=True))


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
                f"{self._path}: ONNX's reference evaluator refuses it: {_one_line(error)}"
            ) from error
        graph = self._evaluator.proto_.graph
        initializers = {t.name for t in graph.initializer}
        self.specs = tuple(
            _onnx_spec(v) for v in graph.input if v.name not in initializers and v.name not in given
        )
        self.output_shapes: dict[str, Shape] = {v.name: _onnx_shape(v) for v in graph.output}
        self.inputs = tuple(n for n in self._evaluator.input_names if n not in initializers)
        self.outputs = tuple(self._evaluator.output_names)

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """See `Runner.run`."""
        return self.run_values(feeds, self.outputs)

    def run_values(self, feeds: Feeds, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """Some outputs. Otherwise as `run`."""
        _check_names(self._path, self.inputs, feeds)
        try:
            values = self._evaluator.run(list(outputs), dict(feeds))
        except Exception as error:
            raise InputError(f"{self._path}: ONNX's reference evaluator: {_one_line(error)}") from error
        return dict(zip(outputs, values, strict=True))


def _ort_spec(info: Any) -> InputSpec:
    """An input as ONNX Runtime describes it."""
    kind = info.type.removeprefix("tensor(").removesuffix(")")
    names = {"float": "float32", "double": "float64"}
    return InputSpec(info.name, names.get(kind, kind), tuple("?" if d is None else d for d in info.shape))


def _onnx_spec(info: onnx.ValueInfoProto) -> InputSpec:
    """An input as the file describes it."""
    from onnx import helper

    kind = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type).name
    return InputSpec(info.name, kind, _onnx_shape(info))


def _onnx_shape(info: onnx.ValueInfoProto) -> Shape:
    dims = info.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims)


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
    """A loaded artifact by qgraph's runtime, whose errors these are.

    capacity: tokens that its state can hold, where it has one; 0 is as much as `room` tokens need, as far as
    the model goes, and without `room` the artifact's default. `run` begins with an empty state.
    """

    name = "qgraph"

    def __init__(self, model: Model, *, capacity: int = 0, room: int = 0) -> None:
        self.model, self.has_state = model, model.has_state
        if not self.has_state:
            capacity = 0
        self.session = model.session(capacity=capacity or capacity_for(model, room))
        self.specs = tuple(input_specs(model))
        self.inputs = tuple(spec.name for spec in self.specs)
        self.output_shapes: dict[str, Shape] = {t.name: t.shape for t in model.outputs}
        self.outputs = tuple(self.output_shapes)

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """See `Runner.run`."""
        if self.has_state:
            self.session.reset()
        return self.session.run(dict(feeds))

    def close(self) -> None:
        """Frees the model and its session."""
        self.session.close()
        self.model.close()


def run_once(model: Model, feeds: Feeds) -> dict[str, np.ndarray]:
    """The outputs of one run on an empty state, if there is one, with room for all tokens of `feeds`."""
    with model.session(capacity=run_capacity(model, feeds)) as session:
        return session.run(dict(feeds))


def run_capacity(model: Model, feeds: Feeds) -> int:
    """The capacity of a session that `feeds` are the first run of."""
    return capacity_for(model, new_tokens(model, feeds))


def capacity_for(model: Model, tokens: int) -> int:
    """The capacity of a session that is to hold so many tokens, as far as the model goes; without a state
    0."""
    if not model.has_state:
        return 0
    bounds = {dim.kind: dim.max for dim in model.dims}
    return min(tokens, bounds["capacity"], bounds["total"])


def _open_artifact(
    path: str | os.PathLike[str], *, threads: int, device: str | None, public_key: bytes | None, **state: int
) -> ArtifactRunner:
    from qgraph.runtime import load

    return ArtifactRunner(load(path, threads=threads, device=device, public_key=public_key), **state)


_ENGINES: dict[str, Callable[..., Runner]] = {
    "qgraph": _open_artifact,
    "onnxruntime": lambda path, threads: OnnxRuntimeRunner(path, threads=threads),
    "ort": lambda path, threads: OnnxRuntimeRunner(path, threads=threads, kernels=True),
    "reference": lambda path, threads: ReferenceRunner(path),
}


def open_runner(
    path: str | os.PathLike[str],
    *,
    engine: str = "",
    threads: int = 0,
    device: str | None = None,
    capacity: int = 0,
    room: int = 0,
    public_key: bytes | None = None,
) -> Runner:
    """A runner for the file. engine: "qgraph" (default for .qg), "onnxruntime" (default else), "ort"
    (that with our kernels, for files of `--export ort`), "reference".
    threads: 0 is one for every core, or what ONNX Runtime chooses. device: of an artifact, see
    `qgraph.runtime.load`; the other engines are on the CPU. capacity and room: of an artifact with state, see
    `ArtifactRunner`. public_key: whose signature an artifact must have, see `qgraph.runtime.load`.

    Nothing falls back to another engine: what one cannot run is its error. Raises UsageError for an unknown
    engine, and for one that is not on the device or knows no signatures.
    """
    engine = engine or ("qgraph" if Path(path).suffix == ".qg" else "onnxruntime")
    if engine not in _ENGINES:
        raise UsageError(f"unknown engine '{engine}'; known: {', '.join(_ENGINES)}")
    if engine == "qgraph":
        return _open_artifact(
            path, threads=threads, device=device, public_key=public_key, capacity=capacity, room=room
        )
    if device not in (None, "cpu"):
        raise UsageError(f"{path}: {engine} runs on the CPU, and the device '{device}' is for artifacts")
    if public_key is not None:
        raise UsageError(f"{path}: {engine} knows no signatures, and a public key is for artifacts")
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


def _one_line(error: Exception) -> str:
    """The message, cut where it is long: the lines behind the first may say which input it is about."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."
