"""MXFP4: W' = q * s_b, q in E2M1, s_b a power of two (E8M0) for each block of 32 along K, and no more.

OCP Microscaling Formats (MX) v1.0, section 5.1. 4.25 bits a weight, where NVFP4 takes 4.5.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qgraph.formats import e2m1, e8m0
from qgraph.formats.block import BlockFormat, divide_blocks

BLOCK = 32
MXFP4 = BlockFormat(
    name="mxfp4",
    title="MXFP4",
    block=BLOCK,
    code_bits=4,
    values=e2m1.VALUES,
    scale_dtype=e8m0.DTYPE,
    has_global_scale=False,
)

_EMAX = 2  # the exponent of E2M1's largest number, 6 = 1.5 * 2^2


def amax_block_scale(amax: npt.NDArray[np.float32]) -> npt.NDArray:
    """The block scale 2^(floor(log2 amax) - 2), held to E8M0's range: as amax. 1 for a zero block.

    The conversion of MX v1.0, section 6.3. It brings amax into [4, 8), of which what exceeds 6 saturates.
    """
    code = e8m0.floor(amax).view(np.uint8)
    code = np.maximum(code, _EMAX) - np.uint8(_EMAX)
    return e8m0.from_codes(np.where(amax == 0, np.uint8(e8m0.ONE_CODE), code))


def quantize(W: npt.NDArray[np.float32], block_scale: npt.NDArray) -> npt.NDArray[np.uint8]:
    """Nearest codes of W at given scales: E2M1(W / s), uint8 [K, N], ties to even, saturating."""
    return e2m1.encode(divide_blocks(W, e8m0.decode(block_scale), BLOCK))
