"""SOAR (arXiv 2605.12245): all scales by closed forms, codes chosen at a scale other than the stored one.

The error to minimise is the sum over blocks of |w_b - a dd_b q_b|^2. Codes q_b = E2M1(w_b / (a dq_b)) come
from a *quantization scale* dq_b of full precision; the stored *dequantization scale* dd_b is an E4M3 number.
Two steps take turns until the error stops falling:

* **CJSO**, closed-form joint scale optimization. Given q the error is a parabola in each scale; their minima:

      a   = sum(w q dd) / sum(q^2 dd^2)      over the tensor,
      d_b = sum_b(w q) / (a sum_b(q^2))      over the block.

* **DSS**, decoupled scale search: a joint discrete search over (dq_b, dd_b) near d_b.

What follows is derived here, not published:

* *dd needs no neighbourhood.* A parabola is symmetric, so for given codes the best of all E4M3 numbers is the
  one nearest to d_b, with the error |w_b|^2 - (2 a dd sum_b(w q) - (a dd)^2 sum_b(q^2)). One rounding of the
  block therefore searches every dd, and only dq has a grid.
* *The grid of dq.* In the first round an octave, 10 factors from 0.9 to 1.75 of max|w_b| / (6 a): E2M1
  without its 6 is twice E2M1 without its 0.5, so that many a block is best with its largest weight at 4 or 3.
  (A grid of 0.8 to 1.2, however fine, ends 10 % above the exact optimum for want of these.) In later rounds
  the codes of the round before, and those at 0.97 and 1.03 of d_b. dq is never below the smallest dd.
* *The start*, a = max|W| / (6 * 256), leaves room for block scales above amax.

**Relation to `sweep`.** For given a and dd nearest rounding at a dd has the smallest error of all codes,
element by element. Decoupling cannot beat it: whatever a block is given by (dq, dd), (dd, dd) is at least as
good, and sweep(a), the best of all dd, at least as good as that. SOAR ends within 1 % of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qgraph.formats import QTensor, e2m1, e4m3, nvfp4
from qgraph.formats.block import divide_blocks
from qgraph.solvers._tiles import Tile, check_weight, columns, fill, map_ordered, scratch, tiles

MAX_ROUNDS = 6
MIN_GAIN = 1e-4  # a round that lowers the error by less than this share is the last

_FIRST = np.geomspace(0.9, 1.75, 10, dtype=np.float32)
_REFINE = np.array([0.97, 1.03], np.float32)

Array = npt.NDArray[np.float32]


@dataclass
class _Blocks:
    """The choice for a tile's blocks so far, [blocks] each, with x = |w| / a0 for the starting a0."""

    dq: Array  # quantization scale, times a / a0
    dd: Array  # dequantization scale: E4M3 numbers
    xq: Array  # sum_b(x q)
    qq: Array  # sum_b(q^2)
    gain: Array  # |x_b|^2 less the squared error / a0^2


def solve(W: Array, *, name: str = "", threads: int | None = None) -> QTensor:
    """W float32 [K, N] -> NVFP4, as above. Raises InputError for weights that are not finite.

    Memory beyond the result: 20 bytes a block and a few MiB a thread.
    """
    a0 = nvfp4.global_scale(check_weight(W, name), top=256)
    K, N = W.shape
    grid = list(tiles(K, N, nvfp4.BLOCK))
    r = np.float32(1)  # a / a0

    def first(tile: Tile) -> tuple[_Blocks, float]:
        part = W[tile.rows, tile.columns]
        x, *buffers = scratch(3, part.size)
        x = columns(part, nvfp4.BLOCK, a0, out=x)
        center = x.max(axis=0) / np.float32(e2m1.MAX)
        found = search(x, center[None] * _FIRST[:, None], r, None, buffers)
        return found, float(np.square(x, out=buffers[0].reshape(x.shape)).sum(dtype=np.float64))

    def refine(item: tuple[Tile, _Blocks]) -> _Blocks:
        tile, found = item
        part = W[tile.rows, tile.columns]
        x, *buffers = scratch(3, part.size)
        x = columns(part, nvfp4.BLOCK, a0, out=x)
        center = np.divide(found.xq, found.qq, out=found.dq.copy(), where=found.qq > 0)  # CJSO: a d_b
        return search(x, center[None] * _REFINE[:, None], r, found, buffers)

    blocks, squares = (list(part) for part in zip(*map_ordered(first, grid, threads), strict=True))
    total, gain = sum(squares), _total(blocks)
    for _ in range(MAX_ROUNDS - 1):
        dd = [b.dd.astype(np.float64) for b in blocks]
        qq = sum(float((b.qq * d * d).sum()) for b, d in zip(blocks, dd, strict=True))
        if qq == 0:  # so close to subnormal that every code is 0
            break
        xq = sum(float((b.xq * d).sum()) for b, d in zip(blocks, dd, strict=True))
        r = np.float32(xq / qq)  # CJSO: a
        blocks = map_ordered(refine, zip(grid, blocks, strict=True), threads)
        gain, before = _total(blocks), gain
        if gain - before <= MIN_GAIN * (total - before):
            break

    def encode(i: int, tile: Tile) -> tuple[npt.NDArray, npt.NDArray[np.uint8]]:
        part, found = W[tile.rows, tile.columns], blocks[i]
        dd = e4m3.encode(found.dd).reshape(-1, part.shape[1])
        s = (found.dq * a0).reshape(dd.shape)
        return dd, e2m1.encode(divide_blocks(part, s, nvfp4.BLOCK))

    return fill("nvfp4", (K, N), a0 * r, encode, threads)


def search(
    x: Array, trials: Array, r: np.float32, found: _Blocks | None, buffers: Sequence[Array]
) -> _Blocks:
    """DSS: the best of the codes at `trials`, and of those found before, with the best dd of each.

    x: [rows, blocks]; trials: quantization scales [trials, blocks]; buffers: two of x's size.
    """
    if found is not None:
        dd, gain = _dequantize(found.xq, found.qq, found.dd, r)
        best = _Blocks(found.dq.copy(), dd, found.xq.copy(), found.qq.copy(), gain)
    else:
        # A zero block keeps this: scale 1.
        count = x.shape[1]
        best = _Blocks(*(np.full(count, v, np.float32) for v in (1, 1, 0, 0, 0)))
    smallest = np.float32(e4m3.SMALLEST) * r
    q, product = (b[: x.size].reshape(x.shape) for b in buffers)
    for dq in np.maximum(trials, smallest):
        np.multiply(x, np.reciprocal(dq), out=q)
        e2m1.round_magnitudes(q, product)
        xq = np.add.reduce(np.multiply(x, q, out=product), axis=0)
        qq = np.add.reduce(np.square(q, out=product), axis=0)
        dd, gain = _dequantize(xq, qq, best.dd, r)
        better = gain > best.gain
        for kept, new in ((best.dq, dq), (best.dd, dd), (best.xq, xq), (best.qq, qq), (best.gain, gain)):
            np.copyto(kept, new, where=better)
    return best


def _dequantize(xq: Array, qq: Array, otherwise: Array, r: np.float32) -> tuple[Array, Array]:
    """(dd, gain): the E4M3 numbers nearest to d_b = sum(x q) / (r sum(q^2)); where q is 0, `otherwise`."""
    ideal = np.divide(xq, qq * r, out=otherwise.copy(), where=qq > 0)
    dd = e4m3.nearest_scale(ideal)
    s = dd * r
    return dd, s * (2 * xq - s * qq)


def _total(blocks: Sequence[_Blocks]) -> float:
    return sum(float(b.gain.sum(dtype=np.float64)) for b in blocks)
