"""Round to nearest with scales from the largest magnitude (amax), as NVIDIA's Model-Optimizer sets them.

a = max|W| / (6 * 448); d_b = E4M3(max|w_b| / (6 a)); q = E2M1(w / (d_b a)). A zero block has d_b = 1, a zero
tensor a = 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qgraph.formats import QTensor, nvfp4
from qgraph.formats.e4m3 import DTYPE
from qgraph.solvers._tiles import Tile, check_weight, map_ordered, tiles


def solve(W: npt.NDArray[np.float32], *, name: str = "", threads: int | None = None) -> QTensor:
    """W float32 [K, N] -> NVFP4, as above. Raises InputError for weights that are not finite."""
    a = nvfp4.global_scale(check_weight(W, name))
    K, N = W.shape
    codes = np.empty((K, N), np.uint8)
    block_scale = np.empty((nvfp4.NVFP4.blocks(K), N), DTYPE)

    def work(tile: Tile) -> None:
        part = W[tile.rows, tile.columns]
        d = nvfp4.amax_block_scale(nvfp4.block_amax(part), a)
        block_scale[tile.blocks, tile.columns] = d
        codes[tile.rows, tile.columns] = nvfp4.quantize(part, d, a)

    map_ordered(work, tiles(K, N, nvfp4.BLOCK), threads)
    return QTensor("nvfp4", (K, N), codes, block_scale, a)
