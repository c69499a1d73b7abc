"""Integers and ternary numbers in groups along K, each with a float16 scale and, in most formats, an offset.

A code counts the levels from the lowest up, values[code] = lowest + code. Three kinds (`BlockFormat.offset`):

* symmetric, W' = v s: `int8`, `int4-sym`;
* with a zero point, W' = (v - v_z) s, z a code: `int4`. What ONNX's DequantizeLinear, and ONNX Runtime's
  MatMulNBits, take;
* with a mean, W' = v s + m, m in float16: `ternary` (PT2-LLM, arXiv 2510.03267: alpha T + mu), `int2`,
  `int3`. So few levels gain more from a grid that may lie anywhere than the bits of m cost.

Float32 order of operations: s and m widened, then a rounding for each operation as it is written here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qgraph.formats.block import BlockFormat, Offset, per_block

SCALE_DTYPE = np.dtype(np.float16)
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
LARGEST = float(np.finfo(np.float16).max)


def _format(name: str, block: int, bits: int, lowest: int, levels: int, offset: Offset) -> BlockFormat:
    values = np.arange(lowest, lowest + levels, dtype=np.float32)
    title = "".join(word.capitalize() for word in name.split("-"))
    return BlockFormat(name, title, block, bits, values, SCALE_DTYPE, has_global_scale=False, offset=offset)


TERNARY = _format("ternary", 128, 2, -1, 3, "mean")
GROUP_FORMATS = (
    TERNARY,
    _format("int2", 128, 2, 0, 4, "mean"),
    _format("int3", 128, 3, 0, 8, "mean"),
    _format("int4", 32, 4, 0, 16, "zero_point"),
    _format("int4-sym", 32, 4, -8, 16, "none"),
    _format("int8", 128, 8, -128, 256, "none"),
)


def to_fields(spec: BlockFormat, codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Codes as the integers that they stand for, in two's complement of so many bits: uint8 of any shape."""
    return (codes + _lowest(spec)) & np.uint8((1 << bits) - 1)


def from_fields(spec: BlockFormat, fields: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Inverse of `to_fields`."""
    return (fields - _lowest(spec)) & np.uint8((1 << bits) - 1)


def from_integers(spec: BlockFormat, integers: npt.NDArray) -> npt.NDArray[np.uint8]:
    """The codes of integers of any type, uint8 of any shape. Of one below the lowest: a code that no format
    has."""
    return (integers.astype(np.int16) - int(spec.values[0])).astype(np.uint8)


def _lowest(spec: BlockFormat) -> np.uint8:
    """The lowest value in two's complement."""
    return np.uint8(int(spec.values[0]) % 256)


def dequantize(
    spec: BlockFormat,
    codes: npt.NDArray[np.uint8],
    block_scale: npt.NDArray,
    block_offset: npt.NDArray | None,
) -> npt.NDArray[np.float32]:
    """float32 [K, N] of codes [K, N], block scales and offsets [ceil(K / block), N] of a group format."""
    W = spec.values[codes]
    s = block_scale.astype(np.float32)
    start = 0
    for view in per_block(W, spec.block):
        part = slice(start, start + len(view))
        start = part.stop
        if spec.offset == "zero_point":
            assert block_offset is not None
            view -= spec.values[block_offset[part]][:, None, :]
        view *= s[part, None, :]
        if spec.offset == "mean":
            assert block_offset is not None
            view += block_offset[part].astype(np.float32)[:, None, :]
    return W
