"""Models and sessions: numpy arrays in and out of the C++ runtime."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from ctypes import byref, c_void_p
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from qgraph.errors import InputError, UsageError
from qgraph.runtime import _native

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
    """A named dimension and its inclusive bounds."""

    name: str
    min: int
    max: int


@dataclass(frozen=True)
class Step:
    """One kernel call of a run: the graph's node it stems from, and the kernel."""

    name: str
    kernel: str


@dataclass(frozen=True)
class Variant:
    """The code for one instruction set, and whether this CPU runs it."""

    isa: str
    supported: bool


class Model:
    """A loaded artifact. Thread-safe; see `qgraph.runtime.load` for arguments and errors."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int = 0,
        isa: str | None = None,
        memory_limit: int = 0,
    ) -> None:
        self._handle: c_void_p | None = None
        self._session: Session | None = None
        self._lock = threading.Lock()
        self._threads, self._memory_limit = threads, memory_limit
        lib = _native.library()
        self.path = os.fsdecode(path)
        handle = self._handle = _native.load(self.path, isa)
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

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """`Session.run` on a session of the model's own; calls from several threads take turns."""
        with self._lock:
            if self._session is None:
                self._session = self.session()
            session = self._session
        return session.run(inputs)

    def session(self, *, threads: int | None = None, memory_limit: int | None = None) -> Session:
        """A new session, for a thread of the caller's; by default with the model's settings.

        Raises:
            InputError: a negative number of threads.
            ResourceError: the system has no threads left.
        """
        return Session(
            self,
            self._threads if threads is None else threads,
            self._memory_limit if memory_limit is None else memory_limit,
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
        return f"<qgraph model {self.path} ({self.isa}): {' -> '.join(sides)}>"


class Session:
    """Buffers and threads for one inference at a time: calls from several threads take turns."""

    def __init__(self, model: Model, threads: int, memory_limit: int) -> None:
        self._handle: c_void_p | None = None
        for name, value, limit in (("threads", threads, 2**31), ("memory_limit", memory_limit, 2**64)):
            if not 0 <= value < limit:
                raise InputError(f"{name} is {value}: give 0 for the default, or a positive number")
        self._lock = threading.RLock()
        self._model = model
        self._handle = _native.create_session(model._open_handle(), threads, memory_limit)

    @property
    def threads(self) -> int:
        """Number of threads in use."""
        return int(_native.library().qg_session_threads(self._open_handle()))

    @property
    def memory(self) -> int:
        """Bytes now allocated for temporaries."""
        return int(_native.library().qg_session_memory(self._open_handle()))

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run the model.

        Args:
            inputs: for every input name an array: numpy, or anything with DLPack on the CPU. Dtypes must
                match, no value is cast. Arrays that are not contiguous are copied.

        Returns:
            For every output name a new array.

        Raises:
            InputError: missing or unknown names, wrong dtypes or shapes, or data that the model refuses, such
                as a token id outside the vocabulary.
            ResourceError: not enough memory, or above the memory limit.
        """
        arrays = _arrays(self._model.inputs, inputs)
        with self._lock:
            return self._run(arrays)

    def _run(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        lib, handle = _native.library(), self._open_handle()
        for i, (info, array) in enumerate(zip(self._model.inputs, arrays, strict=True)):
            view = _native.view(array.ctypes.data, _dtype_name(info.dtype), array.shape)
            _native.check(lib.qg_bind_input(handle, i, byref(view)))
        outputs = {}
        for i, info in enumerate(self._model.outputs):
            array = outputs[info.name] = np.empty(_native.output_shape(handle, i), info.dtype)
            view = _native.view(array.ctypes.data, _dtype_name(info.dtype), array.shape)
            _native.check(lib.qg_bind_output(handle, i, byref(view)))
        _native.check(lib.qg_run(handle))
        return outputs

    def profile(self, inputs: Mapping[str, Any]) -> list[tuple[Step, int]]:
        """Run once with timing on: every step with the nanoseconds it took. Arguments and errors as `run`."""
        lib = _native.library()
        with self._lock:
            handle = self._open_handle()
            _native.check(lib.qg_session_profile(handle, 1))
            try:
                self.run(inputs)
                return [
                    (step, lib.qg_session_step_time(handle, i)) for i, step in enumerate(self._model.steps)
                ]
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


def _dtype_name(dtype: np.dtype) -> str:
    return next(name for name, known in _NUMPY.items() if known == dtype)


def _arrays(infos: tuple[TensorInfo, ...], inputs: Mapping[str, Any]) -> list[np.ndarray]:
    """The inputs in the model's order, as contiguous arrays of the model's dtypes."""
    names = [info.name for info in infos]
    if not isinstance(inputs, Mapping):
        kind = type(inputs).__name__
        raise InputError(f"the inputs are a {kind}: give a dict of {', '.join(names) or 'nothing'} to arrays")
    if unknown := [name for name in inputs if name not in names]:
        raise InputError(f"unknown input {unknown[0]!r}: the model has {', '.join(names) or 'none'}")
    if missing := [name for name in names if name not in inputs]:
        raise InputError(f"input {missing[0]!r} is missing: the model needs {', '.join(names)}")
    return [_array(info, inputs[info.name]) for info in infos]


def _array(info: TensorInfo, value: Any) -> np.ndarray:
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray):
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
