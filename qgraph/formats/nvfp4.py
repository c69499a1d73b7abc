"""NVFP4: W' = q * (d_b * a), q in E2M1, d_b in E4M3 for each block of 16 along K, a float32 for the tensor.

The two-level scaling of NVIDIA's Blackwell FP4 (Transformer Engine, Model-Optimizer). `a` brings the tensor's
range into that of E4M3. The float32 order of operations is ONNX's: s = f32(d_b) * a is rounded once, then q *
s once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qgraph.formats import e2m1, e4m3
from qgraph.formats.block import BlockFormat, divide_blocks

BLOCK = 16
NVFP4 = BlockFormat(
    name="nvfp4", title="NVFP4", block=BLOCK, code_bits=4, values=e2m1.VALUES, scale_dtype=e4m3.DTYPE
)

# Weights beyond this have no NVFP4 form whose float32 products are sure not to overflow.
MAX_WEIGHT = 2.0**125
_SMALLEST_NORMAL = 2.0**-126


def global_scale(amax: float, top: float = e4m3.MAX) -> np.float32:
    """The float32 `a` that gives a block of largest magnitude `amax` the block scale `top`: amax / (6 * top).

    top = 448 is Model-Optimizer's choice, 256 that of Four Over Six, which leaves room for larger block
    scales. 1 for a zero tensor. Never subnormal, so that no result hangs on how a machine treats subnormal
    numbers.
    """
    return np.float32(max(amax / (e2m1.MAX * top), _SMALLEST_NORMAL) if amax else 1.0)


def amax_block_scale(amax: npt.NDArray[np.float32], a: np.float32, code: float = e2m1.MAX) -> npt.NDArray:
    """The block scale that maps a block's largest magnitude to `code`, E4M3(amax / (code a)): as amax.

    Held to the smallest positive E4M3, so that a block far below the tensor's range keeps what it can; 1 for
    a zero block. A block scale is therefore always positive.
    """
    d = np.maximum(amax / (np.float32(code) * a), np.float32(e4m3.SMALLEST))
    return e4m3.encode(np.where(amax == 0, np.float32(1), d))


def scales(block_scale: npt.NDArray, a: np.float32) -> npt.NDArray[np.float32]:
    """s = f32(d_b) * a, one float32 rounding: the first DequantizeLinear. [blocks, N] -> [blocks, N]."""
    return e4m3.decode(block_scale) * np.float32(a)


def quantize(W: npt.NDArray[np.float32], block_scale: npt.NDArray, a: np.float32) -> npt.NDArray[np.uint8]:
    """Nearest codes of W at given positive scales: E2M1(W / s), uint8 [K, N]. Blocked QuantizeLinear.

    Nearest is optimal element by element, so no other codes have a smaller squared error at these scales.
    """
    return e2m1.encode(divide_blocks(W, scales(block_scale, a), BLOCK))
