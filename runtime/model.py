"""Models and sessions: numpy arrays in and out of the C++ runtime."""

from __future__ import annotations

import operator
import os
import threading
import time
from collections.abc import Mapping, Sequence
from ctypes import c_void_p
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from qgraph.errors import InputError, QGraphError, UsageError
from qgraph.runtime import _native
from qgraph.runtime.gpu_arrays import GpuArray, gpu_array, on_gpu

_NUMPY = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f64": np.dtype(np.float64),
    "i64": np.dtype(np.int64),
    "i32": np.dtype(np.int32),
    "i16": np.dtype(np.int16),
    "i8": np.dtype(np.int8),
    "u8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class TensorInfo:
    """An input or output. `shape` holds numbers, names of dims, and expressions such as `(2 * sequence)`."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Dim:
    """A named dimension and its inclusive bounds.

    `kind` says what gives it its size: "input", the shapes of inputs; "total", the tokens in the session's
    state after the run; "capacity", the session's; "option", `dims` of `Session.run`, else a default.
    """

    name: str
    min: int
    max: int
    kind: str = "input"


@dataclass(frozen=True)
class Step:
    """One kernel call of a run: the graph's node it stems from, and the kernel."""

    name: str
    kernel: str


@dataclass(frozen=True)
class Profile:
    """One run with timing on, in nanoseconds: from call to return, and every step of it."""

    wall_ns: int
    steps: tuple[tuple[Step, int], ...]


@dataclass(frozen=True)
class Variant:
    """The code for one instruction set of the model's device, and whether that runs it."""

    isa: str
    supported: bool


@dataclass(frozen=True)
class Device:
    """What a model can be loaded on: its name for `load`, and what it is."""

    name: str
    description: str


class Model:
    """A loaded artifact. Thread-safe; see `qgraph.runtime.load` for arguments and errors."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int = 0,
        isa: str | None = None,
        device: str | None = None,
        memory_limit: int = 0,
        public_key: bytes | None = None,
    ) -> None:
        self._handle: c_void_p | None = None
        self._session: Session | None = None
        self._lock = threading.Lock()
        self._threads, self._memory_limit = threads, memory_limit
        lib = _native.library()
        self.path = os.fsdecode(path)
        handle = self._handle = _native.load(self.path, isa, device, public_key)
        self.device = _native.text(lib.qg_model_device(handle))
        self.isa = _native.text(lib.qg_model_isa(handle))
        self.metadata = _native.metadata(handle)
        self.inputs = _tensors(handle, _native.INPUT)
        self.outputs = _tensors(handle, _native.OUTPUT)
        self.dims = tuple(Dim(*_native.dim(handle, i)) for i in range(lib.qg_model_dim_count(handle)))
        self.steps = tuple(
            Step(
                _native.text(lib.qg_model_step_name(handle, i)),
                _native.text(lib.qg_model_step_kernel(handle, i)),
            )
            for i in range(lib.qg_model_step_count(handle))
        )
        self.variants = tuple(
            Variant(
                _native.text(lib.qg_model_variant_name(handle, i)),
                bool(lib.qg_model_variant_supported(handle, i)),
            )
            for i in range(lib.qg_model_variant_count(handle))
        )

    @property
    def has_state(self) -> bool:
        """Whether sessions keep tokens from run to run, as the key-value cache of a decoder."""
        return any(dim.kind == "total" for dim in self.dims)

    def run(
        self,
        inputs: Mapping[str, Any],
        dims: Mapping[str, int] | None = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """`Session.run` on a session of the model's own; calls from several threads take turns.

        The state is empty at first, if the model has one: every call stands by itself.
        """
        with self._lock:
            if self._session is None:
                self._session = self.session()
            session = self._session
        with session._lock:
            if self.has_state:
                session.reset()
            return session.run(inputs, dims, outputs)

    def session(
        self, *, threads: int | None = None, memory_limit: int | None = None, capacity: int = 0
    ) -> Session:
        """A new session, for a thread of the caller's; by default with the model's settings.

        Args:
            threads: 0 is one for every core this process may use.
            memory_limit: bytes for temporaries and state; 0 is no limit.
            capacity: tokens that the state has room for; 0 is the model's default.

        Raises:
            InputError: a negative number of threads, or a capacity that the model does not allow.
            ResourceError: the system has no threads left.
        """
        return Session(
            self,
            self._threads if threads is None else threads,
            self._memory_limit if memory_limit is None else memory_limit,
            capacity,
        )

    def close(self) -> None:
        """Free the model; its memory goes when the last of its sessions is closed. Closing twice is fine."""
        with self._lock:
            if self._session is not None:
                self._session.close()
                self._session = None
            if self._handle is not None:
                _native.library().qg_model_free(self._handle)
                self._handle = None

    def _open_handle(self) -> c_void_p:
        if self._handle is None:
            raise UsageError(f"the model {self.path} is closed")
        return self._handle

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    def __repr__(self) -> str:
        sides = (", ".join(map(str, side)) for side in (self.inputs, self.outputs))
        return f"<qgraph model {self.path} ({self.isa} on {self.device}): {' -> '.join(sides)}>"


class Session:
    """Buffers, threads and state for one inference at a time: calls from several threads take turns.

    A model with a state (`Model.has_state`) adds the tokens of every run to those of the runs before:

        session.run({"input_ids": prompt}, dims={"logits": 1})
        session.run({"input_ids": token}, dims={"logits": 1})     # as if prompt and token were one text
    """

    def __init__(self, model: Model, threads: int, memory_limit: int, capacity: int = 0) -> None:
        self._handle: c_void_p | None = None
        options = (("threads", threads, 2**31), ("memory_limit", memory_limit, 2**64))
        for name, value, limit in (*options, ("capacity", capacity, 2**63)):
            if not 0 <= _int64(name, value, signed=limit < 2**64) < limit:
                raise InputError(f"{name} is {value}: give 0 for the default, or a positive number")
        self._lock = threading.RLock()
        self._model = model
        self._settings = threads, memory_limit, capacity
        self._choices: dict[str, int] = {}
        self._input_views = [_native.View(_dtype_name(info.dtype)) for info in model.inputs]
        self._output_views = [_native.View(_dtype_name(info.dtype)) for info in model.outputs]
        self._handle = _native.create_session(model._open_handle(), threads, memory_limit, capacity)
        self._stream: int | None = _native.library().qg_session_stream(self._handle)

    @property
    def threads(self) -> int:
        """Number of threads in use."""
        return int(_native.library().qg_session_threads(self._open_handle()))

    @property
    def memory(self) -> int:
        """Bytes now allocated for temporaries and state."""
        return int(_native.library().qg_session_memory(self._open_handle()))

    @property
    def capacity(self) -> int:
        """Tokens that the state has room for; 0 for a model without a state."""
        return int(_native.library().qg_state_capacity(self._open_handle()))

    @property
    def length(self) -> int:
        """Tokens that the state holds."""
        return int(_native.library().qg_state_length(self._open_handle()))

    def truncate(self, length: int) -> None:
        """Forget all tokens of the state but the first `length`.

        Raises:
            InputError: it holds fewer, or the model has no state.
        """
        with self._lock:
            _native.check(_native.library().qg_state_truncate(self._open_handle(), _int64("length", length)))

    def reset(self) -> None:
        """Empty the state. Raises InputError if the model has none."""
        self.truncate(0)

    def fork(self) -> Session:
        """A new session with the settings and the state of this one; both go on independently.

        Raises:
            InputError: the model has no state.
            ResourceError: no memory or threads left, or above the memory limit.
        """
        with self._lock:
            session = Session(self._model, *self._settings)
            try:
                session.copy_state(self)
            except QGraphError:
                session.close()
                raise
            return session

    def copy_state(self, source: Session, rows: Sequence[int] | None = None) -> None:
        """Take the tokens that `source` holds, in place of one's own.

        Args:
            source: a session of the same model, maybe this one. Its capacity may differ.
            rows: the state has as many rows then, row i that of `rows[i]` in `source`; None: all, in order.

        Raises:
            InputError: another model, one without a state, a row that `source` does not have, or more tokens
                than there is room for.
            ResourceError: no memory left, or above the memory limit.
        """
        if not isinstance(source, Session):
            raise InputError(f"the source is a {type(source).__name__}: give a session")
        if rows is not None and not isinstance(rows, Sequence | np.ndarray):
            raise InputError(f"rows is {rows!r}: give a list of rows")
        # In an order that two threads copying in opposite directions share.
        first, second = sorted((self, source), key=id)
        with first._lock, second._lock:
            indices = None if rows is None else [_int64("row", row) for row in rows]
            _native.copy_state(self._open_handle(), source._open_handle(), indices)

    def run(
        self,
        inputs: Mapping[str, Any],
        dims: Mapping[str, int] | None = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Run the model.

        Args:
            inputs: for every input name an array: numpy, or anything with DLPack on the CPU; for a model on
                a GPU also anything with DLPack or the CUDA array interface there, which is read where it is.
                Dtypes must match, no value is cast. Arrays in host memory that are not contiguous are copied.
            dims: sizes of dimensions of kind "option" in this run; the others have their defaults.
                `{"logits": 1}` asks a decoder for the last position only.
            outputs: for some output names the array to write: numpy, or on the GPU as for inputs. Contiguous,
                of the right dtype and shape.

        Returns:
            For every output name the array of `outputs`, else a new numpy array. All of them are complete.

        Raises:
            InputError: missing or unknown names, wrong dtypes or shapes, data that the model refuses, such
                as a token id outside the vocabulary, or more tokens than the state has room for. The state
                is as before then.
            ResourceError: not enough memory, or above the memory limit.
        """
        if dims is not None and not (isinstance(dims, Mapping) and all(isinstance(n, str) for n in dims)):
            raise InputError(f"dims is {dims!r}: give a dict of names to sizes")
        with self._lock:
            arrays = _arrays(self._model.inputs, inputs, self._stream)
            targets = _targets(self._model.outputs, outputs or {}, self._stream)
            self._choose(dims or {})
            return self._run(arrays, targets, outputs or {})

    def _choose(self, dims: Mapping[str, int]) -> None:
        """Set the option dims to these sizes, and to their defaults what an earlier run set."""
        if self._choices == dims:
            return
        lib, handle = _native.library(), self._open_handle()
        for name in [name for name in self._choices if name not in dims]:
            _native.check(lib.qg_set_dim(handle, name.encode(), 0))
            del self._choices[name]
        for name, size in dims.items():
            if _int64(name, size) < 1:
                raise InputError(f"{name} is {size}: give a positive number")
            _native.check(lib.qg_set_dim(handle, name.encode(), int(size)))
            self._choices[name] = int(size)

    def _run(
        self, arrays: list[_Array], targets: dict[str, _Array], given: Mapping[str, Any]
    ) -> dict[str, Any]:
        lib, handle = _native.library(), self._open_handle()
        for i, (view, array) in enumerate(zip(self._input_views, arrays, strict=True)):
            view.set(self._address(array), array.shape)
            _native.check(lib.qg_bind_input(handle, i, view.reference))
        outputs = {}
        for i, (view, info) in enumerate(zip(self._output_views, self._model.outputs, strict=True)):
            target = targets.get(info.name)
            if target is None:
                target = outputs[info.name] = np.empty(_native.output_shape(handle, i, view), info.dtype)
            else:
                outputs[info.name] = given[info.name]
            view.set(self._address(target), target.shape)
            _native.check(lib.qg_bind_output(handle, i, view.reference))
        _native.check(lib.qg_run(handle))
        return outputs

    def _address(self, array: _Array) -> int:
        """Where it lies; runs from now on wait until it is ready."""
        if isinstance(array, np.ndarray):
            return int(array.__array_interface__["data"][0])  # faster than array.ctypes.data
        if array.stream is not None:
            _native.check(_native.library().qg_session_wait(self._open_handle(), array.stream))
        return array.address

    def profile(self, inputs: Mapping[str, Any], dims: Mapping[str, int] | None = None) -> Profile:
        """Run once with every step timed. Arguments and errors as `run`."""
        lib = _native.library()
        with self._lock:
            handle = self._open_handle()
            _native.check(lib.qg_session_profile(handle, 1))
            try:
                start = time.perf_counter_ns()
                self.run(inputs, dims)
                wall = time.perf_counter_ns() - start
                steps = enumerate(self._model.steps)
                return Profile(wall, tuple((step, lib.qg_session_step_time(handle, i)) for i, step in steps))
            finally:
                _native.check(lib.qg_session_profile(handle, 0))

    def close(self) -> None:
        """Free buffers and threads. Closing twice is fine."""
        with self._lock:
            if self._handle is not None:
                _native.library().qg_session_free(self._handle)
                self._handle = None

    def _open_handle(self) -> c_void_p:
        if self._handle is None:
            raise UsageError("the session is closed")
        return self._handle

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()


def _tensors(model: c_void_p, side: int) -> tuple[TensorInfo, ...]:
    lib = _native.library()

    def dim(index: int, axis: int) -> int | str:
        size = _native.text(lib.qg_model_tensor_dim(model, side, index, axis))
        return int(size) if size.isdecimal() else size

    return tuple(
        TensorInfo(
            _native.text(lib.qg_model_tensor_name(model, side, i)),
            _NUMPY[_native.DTYPES[lib.qg_model_tensor_dtype(model, side, i)]],
            tuple(dim(i, axis) for axis in range(lib.qg_model_tensor_rank(model, side, i))),
        )
        for i in range(lib.qg_model_tensor_count(model, side))
    )


def _int64(name: str, value: int, signed: bool = True) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name} is {value!r}: give an integer") from None
    if not -(2**63) <= number < (2**63 if signed else 2**64):
        raise InputError(f"{name} is {number}, beyond 64 bits")
    return number


def _dtype_name(dtype: np.dtype) -> str:
    return next(name for name, known in _NUMPY.items() if known == dtype)


_Array = np.ndarray | GpuArray


def _arrays(infos: tuple[TensorInfo, ...], inputs: Mapping[str, Any], stream: int | None) -> list[_Array]:
    """The inputs in the model's order, as contiguous arrays of the model's dtypes, for work on `stream`."""
    names = [info.name for info in infos]
    if not isinstance(inputs, Mapping):
        kind = type(inputs).__name__
        raise InputError(f"the inputs are a {kind}: give a dict of {', '.join(names) or 'nothing'} to arrays")
    if unknown := [name for name in inputs if name not in names]:
        raise InputError(f"unknown input {unknown[0]!r}: the model has {', '.join(names) or 'none'}")
    if missing := [name for name in names if name not in inputs]:
        raise InputError(f"input {missing[0]!r} is missing: the model needs {', '.join(names)}")
    return [_array(info, inputs[info.name], stream) for info in infos]


def _targets(
    infos: tuple[TensorInfo, ...], outputs: Mapping[str, Any], stream: int | None
) -> dict[str, _Array]:
    """The arrays that outputs are written to, by name."""
    if not isinstance(outputs, Mapping):
        raise InputError(f"outputs is a {type(outputs).__name__}: give a dict of names to arrays")
    known = {info.name: info for info in infos}
    if unknown := [name for name in outputs if name not in known]:
        raise InputError(f"unknown output {unknown[0]!r}: the model has {', '.join(known) or 'none'}")
    return {name: _target(known[name], value, stream) for name, value in outputs.items()}


def _target(info: TensorInfo, value: Any, stream: int | None) -> _Array:
    label = f"output {info.name!r}"
    if not isinstance(value, np.ndarray):
        if not on_gpu(value):
            raise InputError(f"{label} is a {type(value).__name__}: give a numpy array, or one on the GPU")
        return _gpu_array(label, info, value, stream, writable=True)
    if value.dtype != info.dtype or not value.flags.carray:
        raise InputError(f"{label}: give a contiguous writable array of {info.dtype}")
    return value


def _gpu_array(label: str, info: TensorInfo, value: Any, stream: int | None, writable: bool) -> GpuArray:
    if stream is None:
        raise InputError(f"{label} is in a GPU's memory, but the model is on the CPU: load it on 'cuda'")
    array = gpu_array(label, value, stream, writable)
    if array.dtype != info.dtype:
        raise InputError(f"{label}: expected {info.dtype}, got {array.dtype}: cast it first")
    return array


def _array(info: TensorInfo, value: Any, stream: int | None) -> _Array:
    if type(value) is np.ndarray and value.dtype == info.dtype and value.flags.carray:
        return value
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray):
        if on_gpu(value):
            return _gpu_array(f"input {info.name!r}", info, value, stream, writable=False)
        if not hasattr(value, "__dlpack__"):
            kind = type(value).__name__
            raise InputError(f"input {info.name!r} is a {kind}: give a numpy array or an object with DLPack")
        try:
            value = np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"input {info.name!r}: numpy cannot take it over DLPack: {error}") from error
    if isinstance(value, np.ma.MaskedArray):
        raise InputError(f"input {info.name!r} is a masked array: fill it in with .filled first")
    if value.dtype != info.dtype:
        raise InputError(
            f"input {info.name!r}: expected {info.dtype}, got {value.dtype}: cast it with .astype"
        )
    # For a 0-d array ascontiguousarray would give one of rank 1.
    return np.require(value, requirements=["C", "A"])
