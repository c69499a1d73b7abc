"""E2M1, a 4-bit float: sign, 2 exponent bits (bias 1), 1 mantissa bit. OCP Microscaling v1.0, section 5.3.3.

Its magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4, 6; it has neither infinity nor NaN. A code is a uint8 in 0..15,
bit 3 the sign.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MAX = 6.0
VALUES = np.array(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], np.float32
)

# The spacing of E2M1 near v is p/2 with p = 2^floor(log2 v) held to [1, 4]. Adding 1.5 * 2^22 * p to v in
# float32 puts the sum where one unit in the last place is exactly that spacing, so that the FPU's
# round-to-nearest-even rounds v to E2M1: an even multiple of the spacing is an even mantissa. Non-negative
# floats order as their bits do, and integer minimum and maximum are several times faster in numpy than the
# float ones, which must look for NaN.
_MAGIC = np.float32(1.5 * 2**22)
_MAGIC_BITS = np.int32(_MAGIC.view(np.int32))
_EXPONENT = np.int32(0x7F800000)
_ABS = np.int32(0x7FFFFFFF)
_ONE_BITS = np.int32(np.float32(1.0).view(np.int32))
_MAX_BITS = np.int32(np.float32(MAX).view(np.int32))

_CHUNK = 1 << 15  # elements at a time: the three buffers stay in the L2 cache


def _add_magic(v: npt.NDArray[np.float32], magic: npt.NDArray[np.float32]) -> None:
    """v <- min(v, 6) + magic and magic <- 1.5 * 2^22 * p(v), in place, for v >= 0."""
    v_bits, magic_bits = v.view(np.int32), magic.view(np.int32)
    np.minimum(v_bits, _MAX_BITS, out=v_bits)
    np.bitwise_and(v_bits, _EXPONENT, out=magic_bits)
    np.maximum(magic_bits, _ONE_BITS, out=magic_bits)
    np.multiply(magic, _MAGIC, out=magic)
    np.add(v, magic, out=v)


def round_magnitudes(v: npt.NDArray[np.float32], scratch: npt.NDArray[np.float32]) -> None:
    """Replaces v by the nearest E2M1 value, ties to the even mantissa, beyond 6 by 6. Allocates nothing.

    v: float32, contiguous, non-negative and not NaN. scratch: float32 of the same shape, overwritten.
    """
    _add_magic(v, scratch)
    np.subtract(v, scratch, out=v)


def round_values(v: npt.NDArray[np.float32], scratch: npt.NDArray[np.float32]) -> None:
    """`round_magnitudes` for numbers of any sign; what is held to +-6 is the rounded value.

    v: float32, contiguous, finite, |v| < 2^100. scratch: float32 of the same shape, overwritten.
    """
    bits = scratch.view(np.int32)
    np.bitwise_and(v.view(np.int32), _EXPONENT, out=bits)
    np.maximum(bits, _ONE_BITS, out=bits)
    np.multiply(scratch, _MAGIC, out=scratch)
    np.add(v, scratch, out=v)
    np.subtract(v, scratch, out=v)
    np.minimum(v, np.float32(MAX), out=v)
    np.maximum(v, np.float32(-MAX), out=v)


def encode(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """float32 of any shape -> codes: nearest, ties to the even mantissa, saturating at +-6.

    Agrees with `ml_dtypes.float4_e2m1fn` in every input: a negative number that rounds to zero gives -0 (code
    8), infinities saturate, and NaN, for which E2M1 has no code, gives a zero. Callers that must not lose a
    NaN look for it first.
    """
    x = np.ascontiguousarray(x, np.float32)
    flat = x.reshape(-1)
    codes = np.empty(flat.size, np.uint8)
    size = min(_CHUNK, flat.size)
    v, magic, sign = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.int32)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        n = part.size
        out = codes[start : start + n]
        np.right_shift(part.view(np.int32), 28, out=sign[:n])
        np.bitwise_and(sign[:n], 8, out=sign[:n])
        np.bitwise_and(part.view(np.int32), _ABS, out=v[:n].view(np.int32))
        _add_magic(v[:n], magic[:n])
        # The sum, as bits, is MAGIC + (log2 p << 23) + m with m = |q| / spacing < 8; the code is 2 log2 p +
        # m.
        bits, m = v[:n].view(np.int32), magic[:n].view(np.int32)
        np.subtract(bits, _MAGIC_BITS, out=bits)
        np.bitwise_and(bits, 7, out=m)
        np.right_shift(bits, 22, out=bits)
        np.add(bits, m, out=bits)
        np.bitwise_or(bits, sign[:n], out=out, casting="unsafe")
        nan = np.isnan(part)
        if nan.any():
            out[nan] = 8 - sign[:n][nan]
    return codes.reshape(x.shape)


def decode(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Codes 0..15 of any shape -> float32. A code above 15 raises IndexError."""
    return VALUES[codes]
