"""Activations rounded to low precision and back, their scales found at run time.

Every float32 operation and their order are those of the operators `ai.qgraph::DynamicQDQNVFP4` and
`DynamicQDQInt8` (passes/lowbit_bodies.py) and of the kernels (codegen/kernels/dynamic_quantize.py): the three
agree bit for bit. A value of zero keeps its sign. Work goes by groups of rows, so that temporaries stay in
the cache; the result of a row depends on nothing but the row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qgraph.errors import InputError
from qgraph.formats import e2m1, e4m3

BLOCK = 16
INT8_MAX = 127.0
SMALLEST_NORMAL = 2.0**-126  # no scale is below it

_CHUNK = 1 << 15  # elements at a time
_ABS, _SIGN = np.int32(0x7FFFFFFF), np.int32(-(1 << 31))


@dataclass(frozen=True)
class Rounding:
    """A place where a graph rounds activations: names of the value before and after, `nvfp4` or `int8`, the
    global scale of the former."""

    input: str
    output: str
    format: str
    global_scale: float | None


def dynamic_qdq(
    x: npt.NDArray[np.float32], activation_format: str, a: float | np.float32 | None
) -> npt.NDArray[np.float32]:
    """x rounded to `nvfp4`, with the global scale `a`, or to `int8`, which has none; and back."""
    if activation_format == "int8":
        return dynamic_int8(x)
    assert activation_format == "nvfp4" and a is not None, activation_format
    return dynamic_nvfp4(x, a)


def dynamic_nvfp4(x: npt.NDArray[np.float32], a: float | np.float32) -> npt.NDArray[np.float32]:
    """x rounded to NVFP4 along its last axis, as float32 of the same shape.

    A block of 16 (the last may be shorter) has the scale s = d a with d = E4M3(max|x_b| / (6 a)), held to
    [2^-9, 448]; y = E2M1(x / s) s. What lies beyond 448 * 6 a is held to that. A NaN makes its block NaN.

    Args:
        x: float32 [.., K], K >= 1.
        a: the global scale, calibrated: amax / (6 * 448) (`nvfp4.global_scale`). A normal positive float32.

    Raises InputError for another `x` or `a`.
    """
    rows = _rows(x)
    scale = np.float32(a)
    if not SMALLEST_NORMAL <= scale < np.inf:
        raise InputError(f"the global scale of an activation is a positive normal float32, not {a!r}")
    K = rows.shape[1]
    out = np.empty_like(rows)
    step = max(1, min(len(rows), _CHUNK // K))
    magnitude = np.empty((step, K), np.float32)
    for start in range(0, len(rows), step):
        part, y = rows[start : start + step], out[start : start + step]
        v = magnitude[: len(part)]
        np.bitwise_and(part.view(np.int32), _ABS, out=v.view(np.int32))
        with np.errstate(over="ignore"):
            d = _block_scale(_block_amax(v), scale)
            s = np.repeat(e4m3.decode(d) * scale, BLOCK, axis=1)[:, :K]
            np.divide(v, s, out=v)
        e2m1.round_magnitudes(v, y)
        np.multiply(v, s, out=v)
        sign = y.view(np.int32)  # round_magnitudes is done with it
        np.bitwise_and(part.view(np.int32), _SIGN, out=sign)
        np.bitwise_or(v.view(np.int32), sign, out=sign)
    return out.reshape(x.shape)


def dynamic_int8(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """x rounded to symmetric int8 by rows of its last axis (tokens), as float32 of the same shape.

    s = max(max|row| / 127, 2^-126), y = round_half_even(x / s) s. A zero row stays zero; a row with a NaN or
    an infinity is NaN.

    Args:
        x: float32 [.., K], K >= 1.

    Raises InputError for another `x`.
    """
    rows = _rows(x)
    out = np.empty_like(rows)
    step = max(1, min(len(rows), _CHUNK // rows.shape[1]))
    for start in range(0, len(rows), step):
        part, y = rows[start : start + step], out[start : start + step]
        np.bitwise_and(part.view(np.int32), _ABS, out=y.view(np.int32))
        amax = y.view(np.int32).max(axis=1, keepdims=True).view(np.float32)
        s = np.maximum(amax / np.float32(INT8_MAX), np.float32(SMALLEST_NORMAL))
        with np.errstate(invalid="ignore", over="ignore"):
            np.divide(part, s, out=y)
            np.rint(y, out=y)
            np.multiply(y, s, out=y)
    return out.reshape(x.shape)


def _rows(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    if x.dtype != np.float32 or x.ndim < 1 or x.shape[-1] < 1:
        raise InputError(f"activations are float32 [.., K] with K >= 1, not {x.dtype} {list(x.shape)}")
    return np.ascontiguousarray(x).reshape(-1, x.shape[-1])


def _block_amax(v: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The largest of each block of [R, K], none negative: [R, ceil(K / 16)]. NaN orders above all, by its
    bits."""
    bits = v.view(np.int32)
    whole = v.shape[1] - v.shape[1] % BLOCK
    amax = bits[:, :whole]
    for _ in range(4):  # by pairs: several times faster than a maximum along a last axis of 16
        amax = np.maximum(amax[:, 0::2], amax[:, 1::2])
    if whole < v.shape[1]:
        amax = np.concatenate([amax, bits[:, whole:].max(axis=1, keepdims=True)], axis=1)
    return amax.view(np.float32)


def _block_scale(amax: npt.NDArray[np.float32], a: np.float32) -> npt.NDArray:
    """E4M3(amax / (6 a)), at least the smallest positive one: a zero block divides by no zero."""
    ratio = amax / (np.float32(e2m1.MAX) * a)
    return e4m3.encode(np.maximum(ratio, np.float32(e4m3.SMALLEST)))
