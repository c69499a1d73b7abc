"""Arrays in memory of a GPU, as torch, CuPy, JAX and Numba have them: where they lie, without a copy."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_int32, c_int64, c_uint8, c_uint16, c_uint64, c_void_p
from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from qgraph.errors import InputError

# DLDeviceType of dlpack.h: kDLCUDA, kDLCUDAManaged.
_GPU = (2, 13)

# (DLDataTypeCode, bits) of dlpack.h.
_DTYPES = {
    (0, 8): np.dtype(np.int8),
    (0, 16): np.dtype(np.int16),
    (0, 32): np.dtype(np.int32),
    (0, 64): np.dtype(np.int64),
    (1, 8): np.dtype(np.uint8),
    (2, 16): np.dtype(np.float16),
    (2, 32): np.dtype(np.float32),
    (2, 64): np.dtype(np.float64),
    (4, 16): np.dtype(ml_dtypes.bfloat16),
    (6, 8): np.dtype(np.bool_),
}


class _Tensor(ctypes.Structure):
    """DLTensor, which a DLManagedTensor begins with."""

    _fields_ = (
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    )


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = c_void_p, [ctypes.py_object, ctypes.c_char_p]


@dataclass(frozen=True)
class GpuArray:
    """A dense array in memory of a GPU.

    address, shape, dtype: where and what. stream: the CUDA stream whose work it has to wait for, None if that
    is seen to. owner: keeps the memory alive.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype
    stream: int | None
    owner: Any


def on_gpu(value: Any) -> bool:
    """Whether it is an array in memory of a GPU."""
    if hasattr(value, "__dlpack_device__"):
        return value.__dlpack_device__()[0] in _GPU
    return hasattr(value, "__cuda_array_interface__")


def gpu_array(label: str, value: Any, stream: int, writable: bool = False) -> GpuArray:
    """What `on_gpu` found, ready for work on the CUDA stream `stream`; `label` begins error messages.

    Raises InputError: not dense, of no dtype that models have, or not to be had.
    """
    try:
        if hasattr(value, "__dlpack__"):
            array, strides = _from_dlpack(value.__dlpack__(stream=stream))
        else:
            array, strides = _from_interface(value.__cuda_array_interface__, value, writable)
    except (AttributeError, BufferError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{label}: it cannot be taken from the GPU's memory: {error}") from error
    if strides is not None and not _dense(array.shape, strides):
        raise InputError(f"{label} is not contiguous: make it so first")
    return array


def _from_dlpack(capsule: Any) -> tuple[GpuArray, tuple[int, ...] | None]:
    """The array, and its strides in elements. The capsule frees what it holds when it goes."""
    tensor = _Tensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    dtype = _DTYPES.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
    if dtype is None:
        raise TypeError(f"its dtype (DLPack code {tensor.code}, {tensor.bits} bits) is none that models have")
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
    address = (tensor.data or 0) + tensor.byte_offset
    return GpuArray(address, tuple(tensor.shape[: tensor.ndim]), dtype, None, capsule), strides


def _from_interface(found: Any, owner: Any, writable: bool) -> tuple[GpuArray, tuple[int, ...] | None]:
    """The same from the CUDA array interface, whose strides are bytes."""
    address, read_only = found["data"]
    if writable and read_only:
        raise ValueError("it is read-only")
    dtype = np.dtype(found["typestr"])
    strides = found.get("strides")
    if strides is not None:
        strides = tuple(stride / dtype.itemsize for stride in strides)
    return GpuArray(address or 0, tuple(found["shape"]), dtype, found.get("stream"), owner), strides


def _dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    if 0 in shape:
        return True
    return all(
        size == 1 or stride == prod(shape[i + 1 :])
        for i, (size, stride) in enumerate(zip(shape, strides, strict=True))
    )
