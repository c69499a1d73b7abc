"""Exact block scales for NVFP4: all useful E4M3 scales of every block, alternated with the best global scale.

At given scales a and d the nearest E2M1 value of each weight is optimal, so a block's squared error is a
function of d alone, E(d) = sum_i h_i (w_i - a d E2M1(w_i / (a d)))^2, and trying the 126 positive E4M3
numbers finds its minimum. (The same idea as ScaleSweep, arXiv 2606.07618; the bounds below are ours.) The
weights h_i >= 0 are 1, or one an input channel: see `sweep_diagonal`. Then, with codes and block scales
fixed, the error is a parabola in a with its minimum at a = sum(h w d q) / sum(h d^2 q^2). Both steps can only
lower the error, so alternating them converges. The second one rarely has anything left to do: it is skipped
when its own share, which is known in advance, is below MIN_GAIN.

**Which scales are tried.** Let M = max|w_b| / a, so v = M / d is the largest magnitude to round. Not all 126:

1. *From above.* Write codes of E4M3 as integers c = 1..126, ordered as their values d_c. If c > 15 and v <=
   3.5, then c is not better than c - 8. Proof: c > 15 is d_c >= 2^-5, so d_c / 2 >= 2^-6 is a normal number
   with the same mantissa: d_c / 2 = d_{c-8}. With v <= 3.5 every weight has a nearest value among 0, .5, 1,
   1.5, 2, 3 (3.5 is halfway from 3 to 4). Their doubles 0, 1, 2, 3, 4, 6 are E2M1 values as well, hence
   whatever each weight becomes with d_c it can become with d_c / 2, where nearest rounding is at least as
   good. That holds weight by weight, so for the sum with any h. Repeating the argument, some c <= max(15, C)
   is as good as any above, where d_C is the largest E4M3 number below M / 3.5.
2. *From below.* A weight above 6 d clips to 6 d. So for every i, E(d) / a^2 >= h_i (|w_i| / a - 6 d)^2 while
   6 d < |w_i| / a, which grows as d falls: once that reaches the best error found so far, neither d nor any
   smaller scale improves on it. Any one weight may be this *guard*. For equal h the largest stops soonest;
   otherwise it is the one with the largest h_i w_i^6, which costs a few percent more scales than the bound
   with all weights in it would.
3. A block without error cannot improve.

So the sweep starts at max(15, C) and walks down until 2 or 3 stops it: 8 or 9 scales for a normal
distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qgraph.formats import QTensor, e2m1, e4m3, nvfp4
from qgraph.solvers._tiles import Tile, check_weight, columns, fill, map_ordered, round_at, scratch, tiles

MAX_ROUNDS = 4
MIN_GAIN = 1e-4  # a step of the global scale that lowers the error by less than this share is not taken

Array = npt.NDArray[np.float32]

_D = e4m3.from_codes(np.arange(127, dtype=np.uint8)).astype(np.float32)  # value of each non-negative code
_D[0] = np.nan  # zero is no scale
_INVERSE = np.reciprocal(_D)
_ALWAYS = 15  # codes up to here may have no half in E4M3
_TINY = np.finfo(np.float32).tiny
_KEEP = 0.7  # share of live blocks below which the others are dropped


def solve(W: Array, *, name: str = "", threads: int | None = None) -> QTensor:
    """W float32 [K, N] -> NVFP4 with block scales that are each optimal for the global scale found.

    Optimal up to the float32 evaluation of E: two scales whose errors differ by a few 1e-6 of them count as
    equal. Deterministic, whatever `threads`. Memory beyond the result: two bytes a block and a few MiB a
    thread. Raises InputError for weights that are not finite.
    """
    return solve_weighted(W, None, name=name, threads=threads)


def solve_weighted(W: Array, h: Array | None, *, name: str = "", threads: int | None = None) -> QTensor:
    """`solve` with squared errors weighted by h: float32 [K] in 0..1, one weight an input channel."""
    # Four Over Six's choice of `a` puts both M/6 and M/4 of the largest block on the grid of scales.
    a = nvfp4.global_scale(check_weight(W, name), top=256)
    K, N = W.shape
    grid = list(tiles(K, N, nvfp4.BLOCK))
    swept, error = _sweep(W, h, a, grid, threads)
    for _ in range(MAX_ROUNDS - 1):
        wq, qq = sum(s.wq for s in swept), sum(s.qq for s in swept)
        if qq == 0:  # so close to subnormal that every code is 0
            break
        step = wq / qq
        if (step - 1) ** 2 * qq <= MIN_GAIN * error:  # what the step alone takes off the error
            break
        next_a = np.float32(a * step)
        next_swept, next_error = _sweep(W, h, next_a, grid, threads)
        if next_error * float(next_a) ** 2 >= error * float(a) ** 2:
            break
        a, swept, error = next_a, next_swept, next_error

    def encode(i: int, tile: Tile) -> tuple[npt.NDArray, npt.NDArray[np.uint8]]:
        part = W[tile.rows, tile.columns]
        d = e4m3.from_codes(swept[i].scale_codes).reshape(-1, part.shape[1])
        return d, nvfp4.quantize(part, d, a)

    return fill("nvfp4", (K, N), a, encode, threads)


def best_block_scales(block: Array, a: np.float32, weights: Array | None = None) -> npt.NDArray[np.uint8]:
    """The optimal E4M3 code (1..126) of each block, a column of `block`, at the global scale a.

    Args:
        block: the weights, float32 [rows, N], rows <= 16, finite.
        a: positive.
        weights: of the squared errors, float32, not negative, [rows] or [rows, N]. None: all 1.

    A block of zeros gets scale 1, one without any weight some scale at which nothing clips. Works in the
    calling thread's `scratch`.
    """
    rows, N = block.shape
    x, *buffers = scratch(4, block.size)
    x = columns(block, nvfp4.BLOCK, a, out=x)
    h = None
    if weights is not None:
        h = weights.reshape(rows, -1) / np.maximum(weights.max(), _TINY)  # so that no square underflows
        h = np.broadcast_to(h, (rows, N))
    return sweep_blocks(x, buffers, h)[0].astype(np.uint8)


@dataclass(frozen=True)
class _Swept:
    """The optimum of a tile's blocks at one global scale, and the sums that the next global scale needs."""

    scale_codes: npt.NDArray[np.uint8]  # best E4M3 code of each block
    error: float  # sum of h squared errors / a^2
    wq: float  # sum of h (w / a) d q
    qq: float  # sum of h (d q)^2


def _sweep(
    W: Array, h: Array | None, a: np.float32, grid: list[Tile], threads: int | None
) -> tuple[list[_Swept], float]:
    """The optimum of every tile of W at the global scale a, and the squared error / a^2 in all."""

    def work(tile: Tile) -> _Swept:
        part = W[tile.rows, tile.columns]
        x, *buffers = scratch(4, part.size)
        x = columns(part, nvfp4.BLOCK, a, out=x)
        weights = None if h is None else np.repeat(h[tile.rows].reshape(-1, len(x)).T, part.shape[1], axis=1)
        scale_codes, errors = sweep_blocks(x, buffers, weights)

        v, q = round_at(x, _INVERSE[scale_codes], buffers)
        d = _D[scale_codes].astype(np.float64)
        qh = q if weights is None else np.multiply(q, weights, out=buffers[2].reshape(q.shape))
        # Sums of products, not matrix products: BLAS and fused multiply-adds would make the result, and so
        # the file, depend on the machine and its number of threads.
        wq = np.add.reduce(np.multiply(x, qh, out=v), axis=0) * d
        qq = np.add.reduce(np.multiply(q, qh, out=v), axis=0) * d * d
        error = float(errors.sum(dtype=np.float64))
        return _Swept(scale_codes.astype(np.uint8), error, float(wq.sum()), float(qq.sum()))

    swept = map_ordered(work, grid, threads)
    return swept, sum(s.error for s in swept)


def sweep_blocks(
    X: Array, buffers: Sequence[Array], weights: Array | None = None
) -> tuple[npt.NDArray[np.intp], Array]:
    """(code, error) of the exact optimum of each block, a column of X = |w| / a: float32 [rows, blocks].

    rows <= 16. buffers: three float32 arrays [X.size] to work in. weights: of the squared errors, like X.
    The error is E(d) / a^2. A block of zeros gets code 56, scale 1.
    """
    count = X.shape[1]
    m = amax = X.max(axis=0)
    x, weight, h = X, weights, None
    if weight is not None:
        # The guard of a block: large enough to clip early, and heavy enough to cost much then.
        square, cost = (b[: X.size].reshape(X.shape) for b in buffers[:2])
        np.multiply(X, 1 / np.maximum(amax, _TINY), out=square)
        np.square(square, out=square)
        np.square(square, out=cost)
        cost *= square
        cost *= weight
        guard = cost.argmax(axis=0)[None]
        m, h = (np.take_along_axis(array, guard, axis=0)[0] for array in (X, weight))
    # The bits of a positive float32 less the last 20 are an E4M3 code, rounded down, plus (127 - 7) << 3.
    code = ((amax / np.float32(3.5)).view(np.int32) >> 20) - 960
    code = np.clip(code, _ALWAYS, e4m3.MAX_CODE).astype(np.intp)

    scale_codes, errors = np.empty(count, np.intp), np.empty(count, np.float32)
    column = np.arange(count)  # of the blocks that are still in the sweep
    best, e = code.copy(), np.full(count, np.inf, np.float32)
    while column.size:
        v, q = round_at(x, _INVERSE.take(code), buffers)
        np.subtract(v, q, out=v)
        np.square(v, out=v)
        if weight is not None:
            np.multiply(v, weight, out=v)
        trial = np.add.reduce(v, axis=0) * np.square(_D.take(code))
        better = trial < e
        np.copyto(e, trial, where=better)
        np.copyto(best, code, where=better)
        code -= 1
        ceiling = np.float32(e2m1.MAX) * _D.take(code)
        clipped = np.square(m - ceiling)
        if h is not None:
            clipped *= h
        # Code 0 has no scale (NaN): both comparisons with its ceiling are false.
        live = (e > 0) & ((ceiling >= m) | (clipped < e))
        # Leaving finished blocks in is harmless, and cheaper than copying the others until there are many.
        if np.count_nonzero(live) <= _KEEP * column.size:
            scale_codes[column], errors[column] = best, e
            column, m, code, best, e = column[live], m[live], code[live], best[live], e[live]
            x = np.compress(live, x, axis=1)
            if weight is not None and h is not None:
                weight, h = np.compress(live, weight, axis=1), h[live]
        np.maximum(code, 1, out=code)
    scale_codes[amax == 0] = e4m3.ONE_CODE
    return scale_codes, errors
