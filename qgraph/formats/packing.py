"""ONNX's packing of 4-bit elements: flattened row by row, two a byte, the first in the low nibble.

Only the end of the whole tensor is padded (with a zero nibble), never a row: with odd N the rows straddle
bytes. ONNX, onnx.proto3, TensorProto.int32_data and raw_data.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qgraph.errors import InputError


def pack_nibbles(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Codes 0..15 of any shape -> uint8 [ceil(size / 2)]."""
    flat = np.ascontiguousarray(codes, np.uint8).reshape(-1)
    packed = flat[0::2].copy()
    packed[: flat.size // 2] |= flat[1::2] << 4
    return packed


def unpack_nibbles(packed: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """The inverse of `pack_nibbles`. InputError when the number of bytes does not fit `shape`."""
    size = int(np.prod(shape))
    packed = np.ascontiguousarray(packed, np.uint8).reshape(-1)
    if packed.size != -(-size // 2):
        raise InputError(f"{packed.size} bytes cannot hold 4-bit codes of shape {list(shape)}")
    codes = np.empty(2 * packed.size, np.uint8)
    np.bitwise_and(packed, 15, out=codes[0::2])
    np.right_shift(packed, 4, out=codes[1::2])
    return codes[:size].reshape(shape)
