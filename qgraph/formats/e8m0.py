"""E8M0, the 8-bit power of two of the Microscaling formats' block scales: no sign, no mantissa, bias 127.

OCP Microscaling v1.0, section 5.4.1: code c stands for 2^(c - 127), c = 0..254; 255 is NaN; there is no zero.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

DTYPE = np.dtype(ml_dtypes.float8_e8m0fnu)
ONE_CODE, MAX_CODE = 127, 254


def floor(x: npt.NDArray[np.float32]) -> npt.NDArray:
    """The largest power of two that is not above x: float32, not negative -> float8_e8m0fnu of that shape.

    It is the exponent field of the float32 as it stands. Zero and what is below 2^-127 give 2^-127, infinity
    and NaN give NaN.
    """
    bits = np.ascontiguousarray(x, np.float32).view(np.int32)
    return from_codes((bits >> 23).astype(np.uint8))


def decode(x: npt.NDArray) -> npt.NDArray[np.float32]:
    """float8_e8m0fnu -> float32, exactly (2^-127 is a subnormal float32)."""
    return np.asarray(x, DTYPE).astype(np.float32)


def from_codes(codes: npt.NDArray[np.uint8]) -> npt.NDArray:
    """Bit patterns -> float8_e8m0fnu, without a copy."""
    return np.ascontiguousarray(codes, np.uint8).view(DTYPE)
