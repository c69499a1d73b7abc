"""The fake driver through ctypes, for scripts of `run_script`: GPU memory that is not the runtime's."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int, c_size_t, c_uint64, c_void_p
from typing import Any

import numpy as np

libcuda = ctypes.CDLL("libcuda.so.1")
KINDS = ("contexts", "modules", "memory", "pinned", "streams", "events", "graphs", "execs")


def live() -> dict[str, int]:
    """What has been made and not freed."""
    return {kind: count for kind in KINDS if (count := libcuda.fake_cuda_live(kind.encode()))}


def call(name: str, *arguments: Any) -> None:
    code = getattr(libcuda, name)(*arguments)
    assert code == 0, f"{name} gives {code}"


def use(ordinal: int = 0) -> None:
    """Make a device current on this thread, as torch or CuPy do."""
    device, context = c_int(), c_void_p()
    call("cuInit", 0)
    call("cuDeviceGet", byref(device), ordinal)
    call("cuDevicePrimaryCtxRetain", byref(context), device)
    call("cuCtxPushCurrent_v2", context)


class _Tensor(ctypes.Structure):
    """DLManagedTensor of dlpack.h."""

    _fields_ = (
        ("data", c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", c_uint64),
        ("manager", c_void_p),
        ("deleter", c_void_p),
    )


class GpuMemory:
    """An array on the GPU that begins `offset` bytes into its memory. Its content is written by a stream that
    is still at it when the constructor returns."""

    def __init__(self, array: np.ndarray, offset: int = 0) -> None:
        self.shape, self.dtype, self._offset = array.shape, array.dtype, offset
        self._address, self._stream = c_uint64(), c_void_p()
        call("cuMemAlloc_v2", byref(self._address), c_size_t(array.nbytes + offset))
        call("cuStreamCreate", byref(self._stream), 0)
        data, size = c_void_p(array.ctypes.data), c_size_t(array.nbytes)
        call("cuMemcpyHtoDAsync_v2", c_uint64(self.address), data, size, self._stream)

    @property
    def address(self) -> int:
        return self._address.value + self._offset

    def numpy(self) -> np.ndarray:
        result = np.empty(self.shape, self.dtype)
        data, size = c_void_p(result.ctypes.data), c_size_t(result.nbytes)
        call("cuMemcpyDtoH_v2", data, c_uint64(self.address), size)
        return result

    def free(self) -> None:
        call("cuStreamDestroy_v2", self._stream)
        call("cuMemFree_v2", self._address)


class Interface(GpuMemory):
    """With the CUDA array interface alone, as Numba's arrays."""

    strides: tuple[int, ...] | None = None

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": self.strides,
            "stream": self._stream.value,
            "version": 3,
        }


class DLPack(GpuMemory):
    """With DLPack, as torch's and CuPy's arrays; a list of the streams that asked for it."""

    bits: int | None = None

    def __init__(self, array: np.ndarray, offset: int = 0) -> None:
        super().__init__(array, offset)
        self.asked: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, stream: int) -> Any:
        self.asked.append(stream)
        event = c_void_p()
        call("cuEventCreate", byref(event), 2)
        call("cuEventRecord", event, self._stream)
        call("cuStreamWaitEvent", c_void_p(stream), event, 0)
        call("cuEventDestroy_v2", event)
        self._kept = shape = (ctypes.c_int64 * len(self.shape))(*self.shape)
        code = {"i": 0, "u": 1, "f": 2}[self.dtype.kind]
        bits = self.bits or 8 * self.dtype.itemsize
        # From 64 bytes before it, to see that the offset counts.
        tensor = _Tensor(self.address - 64, 2, 0, len(self.shape), code, bits, 1, shape, None, 64, None, None)
        self._tensor = tensor
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, [c_void_p, ctypes.c_char_p, c_void_p]
        return make(ctypes.addressof(tensor), b"dltensor", None)
