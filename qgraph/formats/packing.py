"""ONNX's packing of elements below 8 bits: flattened row by row, the first of a byte in its low bits.

Only the end of the whole tensor is padded (with zero bits), never a row: where 8 / bits does not divide N the
rows straddle bytes. ONNX, onnx.proto3, TensorProto.int32_data and raw_data.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qgraph.errors import InputError


def pack_bits(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Codes below 2^bits of any shape -> uint8 [ceil(size * bits / 8)]; bits is 2, 4 or 8."""
    flat = np.ascontiguousarray(codes, np.uint8).reshape(-1)
    each = 8 // bits
    packed = flat[::each].copy()
    for i in range(1, each):
        part = flat[i::each]
        packed[: part.size] |= part << np.uint8(bits * i)
    return packed


def unpack_bits(packed: npt.NDArray[np.uint8], shape: tuple[int, ...], bits: int) -> npt.NDArray[np.uint8]:
    """The inverse of `pack_bits`. InputError when the number of bytes does not fit `shape`."""
    size, each = int(np.prod(shape)), 8 // bits
    packed = np.ascontiguousarray(packed, np.uint8).reshape(-1)
    if packed.size != -(-size // each):
        raise InputError(f"{packed.size} bytes cannot hold {bits}-bit codes of shape {list(shape)}")
    codes = np.empty((packed.size, each), np.uint8)
    for i in range(each):
        np.right_shift(packed, np.uint8(bits * i), out=codes[:, i])
    codes &= np.uint8((1 << bits) - 1)
    return codes.reshape(-1)[:size].reshape(shape)
