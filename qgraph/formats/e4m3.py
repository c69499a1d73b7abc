"""E4M3, the 8-bit float of the block scales: sign, 4 exponent bits (bias 7), 3 mantissa bits.

OCP 8-bit floating point v1.0: no infinity, NaN is S.1111.111, the largest number is 448, the smallest 2^-9.
A scale is positive and finite, hence one of the 126 codes 1..126, which order as their values do.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

DTYPE = np.dtype(ml_dtypes.float8_e4m3fn)
MAX = 448.0
SMALLEST = 2.0**-9
ONE_CODE, MAX_CODE = 56, 126


def encode(x: npt.NDArray[np.float32]) -> npt.NDArray:
    """float32 -> float8_e4m3fn of the same shape: nearest, ties to even, saturating at +-448. NaN stays NaN.

    (A cast by ml_dtypes alone turns what exceeds 464 into NaN; ONNX's QuantizeLinear and Cast saturate, as
    here.)
    """
    return np.clip(np.asarray(x, np.float32), -MAX, MAX).astype(DTYPE)


def decode(x: npt.NDArray) -> npt.NDArray[np.float32]:
    """float8_e4m3fn -> float32, exactly."""
    return np.asarray(x, DTYPE).astype(np.float32)


def from_codes(codes: npt.NDArray[np.uint8]) -> npt.NDArray:
    """Bit patterns -> float8_e4m3fn, without a copy."""
    return np.ascontiguousarray(codes, np.uint8).view(DTYPE)


_EXPONENT = np.int32(0x7F800000)
_SMALLEST_NORMAL = np.float32(2.0**-6)
_MAGIC = np.float32(1.5 * 2**20)


def nearest_scale(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The positive E4M3 number nearest to x >= 0, as float32: decode(encode(x)), but never zero.

    Several times faster than a cast there and back. The spacing of E4M3 near x is p/8 with p = 2^floor(log2
    x), at least 2^-6; adding 1.5 * 2^20 p makes that one unit in the last place of the float32 sum (see
    `e2m1`).
    """
    x = np.clip(x, np.float32(SMALLEST), np.float32(MAX))
    magic = (x.view(np.int32) & _EXPONENT).view(np.float32)
    np.maximum(magic, _SMALLEST_NORMAL, out=magic)
    magic *= _MAGIC
    x += magic
    x -= magic
    return x
