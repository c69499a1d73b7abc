"""MXFP4, round to nearest with the scales of OCP Microscaling Formats v1.0, section 6.3: a baseline.

s_b = 2^(floor(log2 max|w_b|) - 2), 2 being the largest exponent of E2M1; q = E2M1(w / s_b), saturating at 6.
A zero block has s_b = 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qgraph.formats import QTensor, mxfp4
from qgraph.formats.block import block_amax
from qgraph.solvers._tiles import Tile, check_weight, fill


def solve(W: npt.NDArray[np.float32], *, name: str = "", threads: int | None = None) -> QTensor:
    """W float32 [K, N] -> MXFP4, as above. Raises InputError for weights that are not finite."""
    check_weight(W, name)

    def work(_: int, tile: Tile) -> tuple[npt.NDArray, npt.NDArray[np.uint8]]:
        part = W[tile.rows, tile.columns]
        s = mxfp4.amax_block_scale(block_amax(part, mxfp4.BLOCK))
        return s, mxfp4.quantize(part, s)

    return fill("mxfp4", W.shape, np.float32(1), work, threads)
