"""The C ABI of `include/qgraph/qgraph.h` through ctypes: prototypes, and statuses as exceptions. No numpy."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache

from qgraph.errors import InputError, QGraphError, ResourceError, SignatureError, UnsupportedError
from qgraph.runtime import build

MAX_RANK = 8
PUBLIC_KEY_SIZE = 32
INPUT, OUTPUT = 0, 1

# In the order of qg_dim_kind.
DIM_KINDS = ("input", "total", "capacity", "option")

# In the order of qg_dtype.
DTYPES = ("f32", "f16", "bf16", "f64", "i64", "i32", "i16", "i8", "u8", "bool")

# qg_status -> exception; what is not listed is a defect of ours.
_ERRORS: dict[int, type[QGraphError]] = {
    1: InputError,  # invalid argument
    2: InputError,  # invalid file
    3: UnsupportedError,
    4: InputError,  # not found
    5: ResourceError,  # I/O error
    6: ResourceError,  # out of memory
    7: InputError,  # bad data
    9: ResourceError,  # device error
    10: SignatureError,  # untrusted
}


class LoadOptions(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("isa", c_char_p),
        ("device", c_char_p),
        ("log", c_void_p),
        ("log_context", c_void_p),
        ("threads", c_int32),
        ("public_key", c_char_p),
    )


class SessionOptions(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("threads", c_int32),
        ("memory_limit", c_uint64),
        ("capacity", c_int64),
    )


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("dtype", c_int32),
        ("ndim", c_int32),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
    )


# name: (result, arguments); a result of None stands for qg_status.
_PROTOTYPES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "qg_version": (c_char_p, ()),
    "qg_last_error": (c_char_p, ()),
    "qg_load": (None, (c_char_p, POINTER(LoadOptions), POINTER(c_void_p))),
    "qg_device_count": (c_size_t, ()),
    "qg_device_name": (c_char_p, (c_size_t,)),
    "qg_device_description": (c_char_p, (c_size_t,)),
    "qg_device_problem": (c_char_p, ()),
    "qg_model_device": (c_char_p, (c_void_p,)),
    "qg_model_isa": (c_char_p, (c_void_p,)),
    "qg_model_variant_count": (c_size_t, (c_void_p,)),
    "qg_model_variant_name": (c_char_p, (c_void_p, c_size_t)),
    "qg_model_variant_supported": (c_int, (c_void_p, c_size_t)),
    "qg_model_tensor_count": (c_size_t, (c_void_p, c_int32)),
    "qg_model_tensor_name": (c_char_p, (c_void_p, c_int32, c_size_t)),
    "qg_model_tensor_dtype": (c_int32, (c_void_p, c_int32, c_size_t)),
    "qg_model_tensor_rank": (c_int32, (c_void_p, c_int32, c_size_t)),
    "qg_model_tensor_dim": (c_char_p, (c_void_p, c_int32, c_size_t, c_size_t)),
    "qg_model_dim_count": (c_size_t, (c_void_p,)),
    "qg_model_dim": (c_char_p, (c_void_p, c_size_t, POINTER(c_int64), POINTER(c_int64))),
    "qg_model_dim_kind": (c_int32, (c_void_p, c_size_t)),
    "qg_model_metadata_count": (c_size_t, (c_void_p,)),
    "qg_model_metadata_at": (c_char_p, (c_void_p, c_size_t, POINTER(c_char_p))),
    "qg_model_step_count": (c_size_t, (c_void_p,)),
    "qg_model_step_name": (c_char_p, (c_void_p, c_size_t)),
    "qg_model_step_kernel": (c_char_p, (c_void_p, c_size_t)),
    "qg_session_create": (None, (c_void_p, POINTER(SessionOptions), POINTER(c_void_p))),
    "qg_session_threads": (c_int32, (c_void_p,)),
    "qg_session_memory": (c_uint64, (c_void_p,)),
    "qg_bind_input": (None, (c_void_p, c_size_t, POINTER(Tensor))),
    "qg_output_shape": (None, (c_void_p, c_size_t, POINTER(c_int32), POINTER(c_int64))),
    "qg_bind_output": (None, (c_void_p, c_size_t, POINTER(Tensor))),
    "qg_set_dim": (None, (c_void_p, c_char_p, c_int64)),
    "qg_run": (None, (c_void_p,)),
    "qg_state_capacity": (c_int64, (c_void_p,)),
    "qg_state_length": (c_int64, (c_void_p,)),
    "qg_state_truncate": (None, (c_void_p, c_int64)),
    "qg_state_copy": (None, (c_void_p, c_void_p, POINTER(c_int64), c_size_t)),
    "qg_session_stream": (c_void_p, (c_void_p,)),
    "qg_session_wait": (None, (c_void_p, c_void_p)),
    "qg_session_profile": (None, (c_void_p, c_int)),
    "qg_session_step_time": (c_int64, (c_void_p, c_size_t)),
}


@cache
def library() -> ctypes.CDLL:
    """The loaded library, with prototypes; built on the first call of all.

    Raises:
        ResourceError: it cannot be built or loaded.
    """
    path = build.library()
    try:
        lib = ctypes.CDLL(str(path))
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(lib, name)
            function.argtypes = list(arguments)
            function.restype = c_int if result is None else result
        for name in ("qg_model_free", "qg_session_free"):
            getattr(lib, name).argtypes = [c_void_p]
            getattr(lib, name).restype = None
    except (OSError, AttributeError) as error:
        raise ResourceError(f"cannot load the runtime library {path}: {error}") from error
    return lib


def check(status: int) -> None:
    """Raise the exception that a status stands for, with the message that the library left on this thread."""
    if status != 0:
        raw = library().qg_last_error().decode("utf-8", "replace")
        # Names and messages come from the file: nothing of it may steer a terminal or begin a new line.
        message = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in raw)
        raise _ERRORS.get(status, QGraphError)(message)


def text(value: bytes | None) -> str:
    """A string of the library, which must not be NULL."""
    assert value is not None, "the library has no string where its counts promise one"
    return value.decode()


def load(path: str, isa: str | None, device: str | None, public_key: bytes | None) -> c_void_p:
    if "\0" in path:
        raise InputError(f"no such file: {path!r}")
    if device is not None and not isinstance(device, str):
        raise InputError(f"device is {device!r}: give its name, such as 'cuda'")
    if public_key is not None and not (isinstance(public_key, bytes) and len(public_key) == PUBLIC_KEY_SIZE):
        raise InputError(f"public_key is {public_key!r}: give its {PUBLIC_KEY_SIZE} bytes")
    handle = c_void_p()
    names = (None if name is None else name.encode() for name in (isa, device))
    options = LoadOptions(ctypes.sizeof(LoadOptions), *names, None, None, 0, public_key)
    check(library().qg_load(os.fsencode(path), byref(options), byref(handle)))
    return handle


def devices() -> list[tuple[str, str]]:
    """Name and description of each device."""
    lib = library()
    return [
        (text(lib.qg_device_name(i)), text(lib.qg_device_description(i)))
        for i in range(lib.qg_device_count())
    ]


def device_problem() -> str:
    """Why there is no GPU among them; empty if there is one."""
    return (library().qg_device_problem() or b"").decode("utf-8", "replace")


def create_session(model: c_void_p, threads: int, memory_limit: int, capacity: int) -> c_void_p:
    handle = c_void_p()
    options = SessionOptions(ctypes.sizeof(SessionOptions), threads, memory_limit, capacity)
    check(library().qg_session_create(model, byref(options), byref(handle)))
    return handle


def metadata(model: c_void_p) -> dict[str, str]:
    lib, value, pairs = library(), c_char_p(), {}
    for i in range(lib.qg_model_metadata_count(model)):
        key = text(lib.qg_model_metadata_at(model, i, byref(value)))
        pairs[key] = text(value.value)
    return pairs


def dim(model: c_void_p, index: int) -> tuple[str, int, int, str]:
    """Name, least and greatest size, and kind of a named dimension."""
    lib, low, high = library(), c_int64(), c_int64()
    name = text(lib.qg_model_dim(model, index, byref(low), byref(high)))
    return name, low.value, high.value, DIM_KINDS[lib.qg_model_dim_kind(model, index)]


class View:
    """A qg_tensor of one dtype, made once and set to another tensor for each call: a decoder's step is short.

    Attributes:
        reference: what the library takes.
        shape: sizes of up to MAX_RANK dimensions, which the library may write, too.
    """

    def __init__(self, dtype: str) -> None:
        self.shape = (c_int64 * MAX_RANK)()
        self.tensor = Tensor(None, DTYPES.index(dtype), 0, ctypes.cast(self.shape, POINTER(c_int64)), None)
        self.reference = byref(self.tensor)

    def set(self, pointer: int, shape: tuple[int, ...]) -> None:
        """Make it that of a dense tensor at an address. The library refuses a rank above MAX_RANK."""
        self.tensor.data, self.tensor.ndim = pointer, len(shape)
        self.shape[: min(len(shape), MAX_RANK)] = list(shape[:MAX_RANK])


def copy_state(target: c_void_p, source: c_void_p, rows: Sequence[int] | None) -> None:
    count = 0 if rows is None else len(rows)
    array = None if rows is None else (c_int64 * count)(*rows)
    check(library().qg_state_copy(target, source, array, count))


def output_shape(session: c_void_p, index: int, view: View) -> tuple[int, ...]:
    """An output's shape in the next run; `view` is that output's."""
    ndim = c_int32()
    check(library().qg_output_shape(session, index, byref(ndim), view.shape))
    return tuple(view.shape[: ndim.value])
