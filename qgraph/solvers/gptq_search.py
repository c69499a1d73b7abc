"""The nearest NVFP4 numbers to a target, in the norm of a positive definite matrix: the core of `gptq`.

With that matrix as R R^T, R upper triangular, the squared distance of values V from a target T is

    sum_k R_kk^2 (t_k - v_k)^2,   t_k = T_k + sum_{j < k} F_jk (T_j - v_j),   F_jk = R_jk / R_kk.

Row by row, v_k = the number nearest to t_k: GPTQ's error feedback (arXiv 2210.17323), in QuIP's form of it,
LDLQ (arXiv 2307.13304, theorem 6), or Babai's nearest plane; no inverse of the matrix is needed. What comes
on top:

* **Scales that know of the feedback.** A block's scale is chosen when its first row comes up. Every candidate
  is tried on all rows of the block, feedback included, and judged by its true share of the sum.
* **Several paths.** The best `beams` ways to have quantized the blocks so far are kept, not one (the
  M-algorithm, known from decoding): a scale that costs more now may leave errors that the next blocks cancel.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from qgraph.formats import e2m1, e4m3
from qgraph.formats.nvfp4 import BLOCK
from qgraph.solvers.sweep import best_block_scales

Array = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
# (targets [rows, M], weights [rows]) -> codes [C, M] of the scales to try
Candidates = Callable[[Array, Array], Codes]

SCALE = e4m3.from_codes(np.arange(127, dtype=np.uint8)).astype(np.float32)  # of each E4M3 code

# E4M3 codes around that of amax / 6. Nearly all best ones lie here: on MiniLM a wider window changes nothing.
_BELOW, _ABOVE = -2, 6


def amax_scale(target: Array, weight: Array) -> Codes:
    """The scale that maps the block's largest magnitude to 6."""
    amax = np.maximum(target.max(axis=0), -target.min(axis=0))
    d = np.maximum(amax / np.float32(e2m1.MAX), np.float32(e4m3.SMALLEST))
    return e4m3.encode(d).view(np.uint8)[None]


def swept_scale(target: Array, weight: Array) -> Codes:
    """The scale of least squared error without feedback."""
    return best_block_scales(target, np.float32(1))[None]


def weighted_scale(target: Array, weight: Array) -> Codes:
    """The scale of least error without feedback, the squares weighted by R_kk^2."""
    return best_block_scales(target, np.float32(1), weight)[None]


def window(target: Array, weight: Array) -> Codes:
    """All scales from about amax / 7 to amax / 3.5, for the search to choose among."""
    codes = amax_scale(target, weight) + np.arange(_BELOW, _ABOVE + 1, dtype=np.int16)[:, None]
    return np.clip(codes, 1, e4m3.MAX_CODE).astype(np.uint8)


def block_factor(R: npt.NDArray[np.float64]) -> tuple[Array, Array]:
    """(factor, weight): what `nearest` needs of R [K, K], in float32.

    weight_k is R_kk^2. The blocks on factor's diagonal are those of F. The others, F_ij F_jj^-1, give the
    feedback on a whole block at once: the values that would be best for it if nothing had to be rounded,
    which are GPTQ's current weights and what a scale is chosen for. (t_k above has that on row k alone.)
    """
    diagonal = R.diagonal()
    factor = R / diagonal
    for start in range(BLOCK, len(R), BLOCK):
        block = slice(start, start + BLOCK)
        factor[:start, block] = np.linalg.solve(factor[block, block].T, factor[:start, block].T).T
    return factor.astype(np.float32), np.square(diagonal).astype(np.float32)


def nearest(
    target: Array, base: Array, factor: Array, weight: Array, candidates: Candidates, beams: int
) -> tuple[Array, Codes]:
    """The values near `target`, [rows, n] in units of the global scale, and their block scales' codes.

    Args:
        target: float32 [rows, n], n independent columns. Blocks start at multiples of 16.
        base: float32 [rows, n]: between blocks, feedback is of base - v. The target itself; or, where rows
            before these have been quantized and `target` holds their feedback already, what it was without.
        factor, weight: from `block_factor`, [rows, rows] and [rows].
    """
    rows, n = target.shape
    column = np.arange(n)
    paths = 1
    # One column for each path of each column of the target: [.., paths * n].
    error = np.empty((rows, beams * n), np.float32)  # base - v
    codes = np.empty((-(-rows // BLOCK), beams * n), np.uint8)
    total = np.zeros(n, np.float32)
    for start in range(0, rows, BLOCK):
        block, b = slice(start, min(start + BLOCK, rows)), start // BLOCK
        t = np.tile(target[block], paths)
        if start:
            t += factor[:start, block].T @ error[:start, : paths * n]
        tried = candidates(t, weight[block])
        found, loss = _round_block(t, factor[block, block], weight[block], SCALE[tried])
        loss += total

        keep = 1 if block.stop == rows else min(beams, len(tried) * paths)
        picked = (_lowest(loss.reshape(-1, n), keep) * n + column).reshape(-1)  # of [C, paths * n], flat
        parent = picked % (paths * n)
        if start:
            error[:start, : keep * n] = error[:start, : paths * n].take(parent, axis=1)
            codes[:b, : keep * n] = codes[:b, : paths * n].take(parent, axis=1)
        error[block, : keep * n] = (
            found.take(picked, axis=1) - t.take(parent, axis=1) + np.tile(base[block], keep)
        )
        codes[b, : keep * n] = tried.reshape(-1)[picked]
        total, paths = loss.reshape(-1)[picked], keep
    return _snap(base - error[:, :n], codes[:, :n]), codes[:, :n].copy()


def _round_block(t: Array, factor: Array, weight: Array, scale: Array) -> tuple[Array, Array]:
    """One block at several scales: (t - v [rows, C * M], the sum of weight (t_k - v_k)^2 [C, M]).

    t: [rows, M], feedback of earlier blocks included. scale: [C, M].
    """
    rows = len(t)
    error = np.empty((rows, *scale.shape), np.float32)
    flat = error.reshape(rows, -1)
    loss, magic = np.zeros(scale.shape, np.float32), np.empty(scale.shape, np.float32)
    aim, v = np.empty(scale.shape, np.float32), np.empty(scale.shape, np.float32)
    inverse = 1 / scale
    for k in range(rows):
        if k:
            np.dot(factor[:k, k], flat[:k], out=aim.reshape(-1))
            aim += t[k]
        else:
            aim[:] = t[0]
        np.multiply(aim, inverse, out=v)
        e2m1.round_values(v, magic)
        v *= scale
        np.subtract(t[k], v, out=error[k])
        aim -= v
        np.square(aim, out=aim)
        aim *= weight[k]
        loss += aim
    return flat, loss


def _snap(values: Array, codes: Codes) -> Array:
    """Values that rounding took off the numbers that they stand for, put back."""
    scale = np.repeat(SCALE[codes], BLOCK, axis=0)[: len(values)]
    q = values / scale
    e2m1.round_values(q, np.empty_like(q))
    return q * scale


def _lowest(loss: Array, keep: int) -> npt.NDArray[np.intp]:
    """Rows of the `keep` smallest of each column of [M, n]: [keep, n], in no particular order."""
    if keep == 1:
        return loss.argmin(axis=0)[None]
    if keep >= len(loss):
        return np.broadcast_to(np.arange(len(loss))[:, None], loss.shape)
    return np.argpartition(np.ascontiguousarray(loss.T), keep - 1, axis=1)[:, :keep].T
