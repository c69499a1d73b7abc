"""GPTQ for NVFP4: codes and scales of least output error tr((W - W')^T H (W - W')) on calibration data.

With D = W - W' and the damped H' = H / mean(diag H) + damping I = R R^T, R upper triangular,

    tr(D^T H' D) = |R^T D|^2 = sum_k R_kk^2 |t_k - w'_k|^2,
    t_k = w_k + sum_{j < k} (R_jk / R_kk) (w_j - w'_j).

Rounding t_k for k = 0, 1, .. is GPTQ (arXiv 2210.17323) without its inverse (QuIP, arXiv 2307.13304, shows
that the two are the same). Three things are added to it, each measured on held-out data by
`benchmarks/nvfp4_output_error.py`:

1. *Order*: blocks by falling power of their inputs, and so inside each block (`hessian.energy_order`).
2. *Pass*: panels of 256 rows, in which a block's scale is chosen with the feedback in view, and the best few
   ways through a panel are kept (`gptq_search`). Feedback between panels is a matrix product.
3. *Refinement*: a few rounds over all blocks. With all the others fixed, a block's error is the distance from
   a target in the norm of its part of H', so the same search gives codes and scale, which are taken for the
   columns where they lower the error. It never rises.

Inputs that calibration never saw (H_kk = 0) are damped like all others: their weights are rounded as they
are, not set to 0 as GPTQ does, as other data may use them. With H = 0 every W' is as good as another, and the
result is that of `sweep`.

The global scale is max|W| / (6 * 256), which leaves block scales room above; others, from 128 to 448, are no
better. Sums of many terms are matrix products in float32, so the result may differ between CPU models, by
which BLAS chooses its kernels; on one machine it is the same, byte for byte, for any number of threads, as
these work on fixed slices of columns and BLAS is held to one thread.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qgraph.errors import UsageError
from qgraph.formats import QTensor, e2m1, e4m3, nvfp4
from qgraph.formats.nvfp4 import BLOCK
from qgraph.solvers import gptq_search, sweep
from qgraph.solvers._tiles import check_weight, column_slices, map_ordered
from qgraph.solvers.gptq_search import SCALE, Array, Candidates, Codes, block_factor, nearest
from qgraph.solvers.hessian import (
    Matrix,
    check_second_moment,
    default_damping,
    energy_order,
    factorize,
    one_blas_thread,
    reversed_cholesky,
)

SCALES: dict[str, Candidates] = {
    "amax": gptq_search.amax_scale,
    "sweep": gptq_search.swept_scale,
    "sweep-diagonal": gptq_search.weighted_scale,
    "feedback": gptq_search.window,
}

_PANEL = 256  # rows; paths are followed inside one
_COLUMNS = 256  # of a slice, at most: the arrays of a step then fit the caches, and a thread is busy
_LEAST_DAMPING = 0.01  # by default
_MIN_GAIN = np.float32(1e-5)  # share of a block's error below which a change is rounding noise


def solve(
    W: Array,
    *,
    H: Matrix,
    tokens: int = 0,
    name: str = "",
    threads: int | None = None,
    damping: float | None = None,
    scales: str = "feedback",
    order: bool = True,
    beams: int = 8,
    rounds: int = 4,
) -> QTensor:
    """W float32 [K, N], H float64 [K, K], the mean of x^T x, -> NVFP4 of small output error.

    Args:
        tokens: that H is the mean of; 0 where that is not known.
        damping: in units of the mean of diag(H). None is K / (2 tokens), from 0.01 to 0.3: the best on MiniLM
            was 0.1 at 2,000 tokens, 0.03 at 8,000 and 0.003, hardly better than 0.01, at 30,000. 0.03 where
            the tokens are not known.
        scales: how a block's scale is chosen in the pass, a key of `SCALES`.
        order: whether blocks go by the power of their inputs, or from first to last.
        beams: paths that are kept; 1 is GPTQ.
        rounds: of refinement.

    The keywords after `threads` are there for comparisons. Deterministic, whatever `threads`. Memory beyond W
    and H: two or three times H in float64 while it is factorized, later as much once, and a few MiB a thread.

    Raises InputError for weights, or an H, that are not finite, and for an H that is no second moment.
    """
    if damping is None:
        damping = default_damping(len(W), tokens, _LEAST_DAMPING)
    if scales not in SCALES or beams < 1 or rounds < 0 or not 0 <= damping < np.inf:
        raise UsageError(f"gptq: scales={scales!r}, beams={beams}, rounds={rounds}, damping={damping}")
    a = nvfp4.global_scale(check_weight(W, name), top=256)
    K, N = W.shape
    check_second_moment(H, K, name)
    if not H.any() or not W.any():
        return sweep.solve(W, name=name, threads=threads)
    rows = energy_order(H, BLOCK) if order else np.arange(K)
    blocks = rows[::BLOCK] // BLOCK
    codes, block_scale = np.empty((K, N), np.uint8), np.empty((-(-K // BLOCK), N), np.uint8)

    with one_blas_thread():
        problem = _Problem(H[np.ix_(rows, rows)], damping, name)

        def work(part: slice) -> None:
            X = W[rows, part] / a
            values, scale = _pass(problem, X, SCALES[scales], beams)
            for _ in range(rounds):
                refine(problem, X, values, scale)
            q = values / np.repeat(SCALE[scale], BLOCK, axis=0)[:K]
            codes[rows, part] = e2m1.encode(q)
            scale[~_any_in_block(q)] = e4m3.ONE_CODE
            block_scale[blocks, part] = scale

        map_ordered(work, column_slices(N, _COLUMNS), threads)
    return QTensor("nvfp4", (K, N), codes, e4m3.from_codes(block_scale), a)


class _Problem:
    """H', its factor, and what refinement needs of each block on the diagonal, in float32."""

    def __init__(self, H: Matrix, damping: float, name: str) -> None:
        damped, R = factorize(H, damping, name)
        self.H = damped.astype(np.float32)
        self.factor, self.weight = block_factor(R)
        self.blocks = []
        for start in range(0, len(H), BLOCK):
            h = damped[start : start + BLOCK, start : start + BLOCK]
            factor, weight = block_factor(reversed_cholesky(h))
            self.blocks.append((factor, weight, np.linalg.inv(h).astype(np.float32)))


def _pass(problem: _Problem, X: Array, candidates: Candidates, beams: int) -> tuple[Array, Codes]:
    """GPTQ's pass over X [K, n], in units of the global scale: values and codes of the block scales."""
    K, n = X.shape
    F = problem.factor
    values, scale = np.empty_like(X), np.empty((-(-K // BLOCK), n), np.uint8)
    error = np.empty_like(X)
    for start in range(0, K, _PANEL):
        panel = slice(start, min(start + _PANEL, K))
        target = X[panel]
        if start:
            target = target + F[:start, panel].T @ error[:start]
        values[panel], scale[start // BLOCK : -(-panel.stop // BLOCK)] = nearest(
            target, X[panel], F[panel, panel], problem.weight[panel], candidates, beams
        )
        error[panel] = X[panel] - values[panel]
    return values, scale


def refine(problem: _Problem, X: Array, values: Array, scale: Codes) -> None:
    """One round over all blocks, in place. |R^T (X - values)|^2 falls, or stays, in every column.

    The error of block b, all others fixed, is (T - V)^T H_bb (T - V) plus what does not depend on V, with
    T = V_now + H_bb^-1 (H D)_b.
    """
    K = len(X)
    error = X - values
    for start in range(0, K, _PANEL):
        panel = slice(start, min(start + _PANEL, K))
        gradient = problem.H[panel] @ error
        for b in range(start // BLOCK, -(-panel.stop // BLOCK)):
            block = slice(b * BLOCK, min((b + 1) * BLOCK, K))
            factor, weight, inverse = problem.blocks[b]
            step = inverse @ gradient[block.start - start : block.stop - start]
            target = values[block] + step
            found, code = nearest(target, target, factor, weight, gptq_search.window, 1)
            now = _distance(step, weight, factor)
            better = _distance(target - found, weight, factor) < now * (1 - _MIN_GAIN)
            change = np.where(better, found - values[block], np.float32(0))
            values[block] = np.where(better, found, values[block])
            scale[b] = np.where(better, code[0], scale[b])
            error[block] -= change
            gradient -= problem.H[panel, block] @ change


def _distance(D: Array, weight: Array, factor: Array) -> Array:
    """sum_k weight_k (F^T D)_k^2 of each column."""
    return weight @ np.square(factor.T @ D)


def _any_in_block(values: Array) -> npt.NDArray[np.bool_]:
    """Whether a block [ceil(K/16), n] has anything but zeros."""
    return np.add.reduceat(values != 0, np.arange(0, len(values), BLOCK), axis=0) > 0
