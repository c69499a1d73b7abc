"""NVFP4, round to nearest, scales from the largest magnitude (amax) as NVIDIA's Model-Optimizer sets them.

a = max|W| / (6 * 448); d_b = E4M3(max|w_b| / (6 a)); q = E2M1(w / (d_b a)). A zero block has d_b = 1, a zero
tensor a = 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qgraph.formats import QTensor, nvfp4
from qgraph.formats.block import block_amax
from qgraph.solvers._tiles import Tile, check_weight, fill


def solve(W: npt.NDArray[np.float32], *, name: str = "", threads: int | None = None) -> QTensor:
    """W float32 [K, N] -> NVFP4, as above. Raises InputError for weights that are not finite."""
    a = nvfp4.global_scale(check_weight(W, name))

    def work(_: int, tile: Tile) -> tuple[npt.NDArray, npt.NDArray[np.uint8]]:
        part = W[tile.rows, tile.columns]
        d = nvfp4.amax_block_scale(block_amax(part, nvfp4.BLOCK), a)
        return d, nvfp4.quantize(part, d, a)

    return fill("nvfp4", W.shape, a, work, threads)
