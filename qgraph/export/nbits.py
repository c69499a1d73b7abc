"""ONNX Runtime's `com.microsoft::MatMulNBits` in numpy: weights, and how it rounds activations.

A node holds integers of 2, 4 or 8 bits, each block of K with a float scale, packed by rows of W^T. A weight
is a sum of `Plane`s, one a node, and means by block where the format has them. What a plane dequantizes to is
exact; the sum is that of the format but for float32 roundings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qgraph.formats import FORMATS, QTensor, nvfp4
from qgraph.formats.packing import pack_bits

# Added to levels, so that those of few bits lie around zero; the means take it back.
_CENTRE = {"int2": 2, "int3": 4}


@dataclass(frozen=True)
class Plane:
    """W[k, n] = (fields[k, n] - zero_point[k // block, n]) * scale[k // block, n]; without a zero point it is
    2^(bits - 1) everywhere."""

    bits: int
    block: int
    fields: npt.NDArray[np.uint8]  # [K, N]
    scale: npt.NDArray[np.float32]  # [ceil(K / block), N]
    zero_point: npt.NDArray[np.uint8] | None = None  # as the scale

    def packed(self) -> npt.NDArray[np.uint8]:
        """The node's input B, uint8 [N, ceil(K / block), block * bits / 8], the first of a byte in its low
        bits."""
        K, N = self.fields.shape
        blocks = -(-K // self.block)
        rows = np.full((N, blocks * self.block), 1 << (self.bits - 1), np.uint8)
        rows[:, :K] = self.fields.T
        return pack_bits(rows, self.bits).reshape(N, blocks, self.block * self.bits // 8)

    def packed_zero_points(self) -> npt.NDArray[np.uint8]:
        """The node's input zero_points, uint8 [N, ceil(blocks * bits / 8)]: rows begin with a byte."""
        assert self.zero_point is not None
        each = 8 // self.bits
        blocks, N = self.zero_point.shape
        rows = np.zeros((N, -(-blocks // each) * each), np.uint8)
        rows[:, :blocks] = self.zero_point.T
        return pack_bits(rows, self.bits).reshape(N, -1)


def planes(q: QTensor, wide: bool) -> list[Plane]:
    """`wide`: everything in planes of 4 bits, the only ones that ONNX Runtime multiplies by float activations
    on CPUs at speed. Else one plane, of as many bits as the levels need.

    NVFP4: twice an E2M1 number is an integer of -12 to 12, that is one of 8 bits, or the sum of two of 4.
    int8 is 16 times one of 4 bits, and another."""
    spec = FORMATS[q.format]
    if q.format == nvfp4.NVFP4.name:
        twice = (2 * spec.values).astype(np.int16)
        half = nvfp4.scales(q.block_scale, q.global_scale) * np.float32(0.5)
        if not wide:
            return [_plane(8, q, twice, half)]
        near = np.clip(twice, -8, 7)
        return [_plane(4, q, near, half), _plane(4, q, twice - near, half)]
    scale = q.block_scale.astype(np.float32)
    levels = spec.values.astype(np.int16) - _CENTRE.get(q.format, 0)
    if q.format == "int8" and wide:
        low = _plane(4, q, (levels & 15) - 8, scale)
        zero = np.zeros(scale.shape, np.uint8)
        return [_plane(4, q, levels >> 4, scale * np.float32(16)), replace(low, zero_point=zero)]
    if spec.offset == "zero_point":
        return [Plane(4, spec.block, q.codes, scale, q.block_offset)]
    bits = 2 if len(levels) <= 4 and not wide else 8 if len(levels) > 16 else 4
    return [_plane(bits, q, levels, scale)]


def means(q: QTensor) -> npt.NDArray[np.float32] | None:
    """What is to be added to every weight of a block besides the planes, float32 [ceil(K / block), N];
    None where that is nothing."""
    if FORMATS[q.format].offset != "mean":
        return None
    assert q.block_offset is not None
    centre = np.float32(_CENTRE.get(q.format, 0))
    return q.block_offset.astype(np.float32) + centre * q.block_scale.astype(np.float32)


def round_blocks(x: npt.NDArray[np.float32], block: int) -> npt.NDArray[np.float32]:
    """x [.., K] rounded to int8 by blocks of its last axis, as the node does with `accuracy_level` 4."""
    K = x.shape[-1]
    pads = [(0, 0)] * (x.ndim - 1) + [(0, -K % block)]
    blocks = np.pad(x, pads).reshape(*x.shape[:-1], -1, block)
    amax = np.abs(blocks).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127), amax, out=np.zeros_like(amax), where=amax > 0)
    return (np.rint(blocks * inverse) * (amax / np.float32(127))).reshape(*x.shape[:-1], -1)[..., :K]


def _plane(bits: int, q: QTensor, levels: npt.NDArray[np.int16], scale: npt.NDArray[np.float32]) -> Plane:
    """Of levels around zero, one for each code."""
    fields = (levels + (1 << (bits - 1))).astype(np.uint8)
    return Plane(bits, FORMATS[q.format].block, fields[q.codes], scale)
