"""Four Over Six (arXiv 2512.02010): a block's largest magnitude becomes 6 or 4, whichever fits better.

The spacing of E2M1 between 4 and 6 is 2, so that a block's larger weights round badly when its largest is 6;
with it at 4 they have more levels, the small ones fewer. a = max|W| / (6 * 256), so that the larger of the
two scales of the largest block, 384, is an E4M3 number; per block, d = E4M3(max|w_b| / (6 a)) or
E4M3(max|w_b| / (4 a)), the one with the smaller sum (w - a d E2M1(w / (a d)))^2, the former on a tie.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qgraph.formats import QTensor, e4m3, nvfp4
from qgraph.formats.block import block_amax
from qgraph.solvers._tiles import Tile, check_weight, columns, fill, round_at, scratch

Array = npt.NDArray[np.float32]


def solve(W: Array, *, name: str = "", threads: int | None = None) -> QTensor:
    """W float32 [K, N] -> NVFP4, as above. Raises InputError for weights that are not finite.

    The errors are compared in float32: two that differ by a few 1e-6 of them count as equal.
    """
    a = nvfp4.global_scale(check_weight(W, name), top=256)

    def work(_: int, tile: Tile) -> tuple[npt.NDArray, npt.NDArray[np.uint8]]:
        part = W[tile.rows, tile.columns]
        x, *buffers = scratch(4, part.size)
        x = columns(part, nvfp4.BLOCK, a, out=x)
        amax = block_amax(part, nvfp4.BLOCK)
        six, four = (nvfp4.amax_block_scale(amax, a, code) for code in (6, 4))
        better = _errors(x, four, buffers) < _errors(x, six, buffers)
        d = np.where(better.reshape(six.shape), four, six)
        return d, nvfp4.quantize(part, d, a)

    return fill("nvfp4", W.shape, a, work, threads)


def _errors(x: Array, block_scale: npt.NDArray, buffers: Sequence[Array]) -> Array:
    """Squared error / a^2 of each block, a column of x = |w| / a, at its scale: [blocks]."""
    d = e4m3.decode(block_scale).reshape(-1)
    v, q = round_at(x, np.reciprocal(d), buffers)
    np.subtract(v, q, out=v)
    return np.add.reduce(np.square(v, out=v), axis=0) * np.square(d)
