"""H, the second moment of a linear layer's inputs, as second-order solvers use it.

The output error of a weight W that becomes W' is E|x W - x W'|^2 = tr(D^T H D) with D = W - W': up to a
factor of 2, H is the Hessian of that error, as GPTQ (arXiv 2210.17323) calls it. All arrays [K, K] float64.

BLAS runs on one thread here (`one_blas_thread`): how it splits a product over threads changes the last bits,
and so, now and then, a code. What it computes still depends on the kernels that it has for the CPU at hand.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph.errors import InputError
from qgraph.solvers._tiles import map_ordered

Array = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]

HADAMARD_SIZES = (16, 32, 64, 128)
_COLUMNS = 256  # at a time
_ASYMMETRY = 1e-6  # of the largest element; what sums in another order may leave
_LEAST_DAMPING, _MOST_DAMPING = 1e-6, 1.0
_LEAST_COMPENSATION = 0.03
_UNKNOWN_DAMPING, _MOST_DEFAULT_DAMPING = 0.03, 0.3  # of `default_damping`


class _BlasLimit:
    """numpy's BLAS on one thread while anybody wants it so.

    threadpoolctl obeys the thread that was the first to set a limit and leaves others without one, so the
    same thread sets and restores for all.
    """

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._setter: ThreadPoolExecutor | None = None
        self._limit: Any = None

    def enter(self) -> None:
        from threadpoolctl import threadpool_limits

        with self._lock:
            if not self._users:
                self._setter = self._setter or ThreadPoolExecutor(1, "qgraph-blas")
                self._limit = self._setter.submit(threadpool_limits, 1, user_api="blas").result()
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                assert self._setter is not None
                self._setter.submit(self._limit.restore_original_limits).result()


_blas = _BlasLimit()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Holds numpy's BLAS to one thread, in the whole process, until the last such block ends."""
    _blas.enter()
    try:
        yield
    finally:
        _blas.leave()


def check_second_moment(H: Matrix, K: int, name: str) -> None:
    """InputError, naming the layer, unless H is float64 [K, K], finite, symmetric, its diagonal >= 0."""
    what = f"the second moment of the inputs of weight '{name}'" if name else "the second moment"
    if H.dtype != np.float64 or H.shape != (K, K):
        raise InputError(f"{what} is {H.dtype} {list(H.shape)}, not float64 [{K}, {K}]")
    if not np.isfinite(H).all():
        i, j = (int(n) for n in np.argwhere(~np.isfinite(H))[0])
        raise InputError(
            f"{what} holds {H[i, j]} at [{i}, {j}]: the calibration data drives the model out of the range "
            "of float32; use other data or exclude the layer"
        )
    largest = max(float(H.max()), -float(H.min()))
    if any(np.abs(H[k] - H[:, k]).max() > _ASYMMETRY * largest for k in range(K)):
        raise InputError(f"{what} is not symmetric")
    if H.diagonal().min() < 0 or H.diagonal().max() == 0 < largest:
        raise InputError(f"{what} has a negative diagonal, or nothing on it: it is no mean of x^T x")


def damp(H: Matrix, damping: float) -> Matrix:
    """H / m + damping I with m the mean of H's diagonal, which must be positive: a copy."""
    damped = H / H.diagonal().mean()
    damped[np.diag_indices(len(H))] += damping
    return damped


def default_damping(K: int, tokens: int, least: float) -> float:
    """The damping of GPTQ for K inputs: K / (2 tokens), from `least` to 0.3; 0.03 where `tokens` is 0, not
    known."""
    if not tokens:
        return _UNKNOWN_DAMPING
    return min(max(0.5 * K / tokens, least), _MOST_DEFAULT_DAMPING)


def factorize(H: Matrix, damping: float, name: str = "") -> tuple[Matrix, Matrix]:
    """(H', R): the damped H' = H / m + damping I = R R^T, with R upper triangular, its diagonal positive.

    Then tr(D^T H' D) = sum_k |sum_{j <= k} R_jk D_j|^2, a sum in which row k of D meets but the rows before
    it. (The Cholesky factor of H with rows and columns in reverse, itself reversed.)

    Where rounding leaves H' short of positive definite, damping grows tenfold until it is. InputError when
    even 1 is not enough: H is no second moment then.
    """
    while True:
        damped = damp(H, damping)
        try:
            return damped, reversed_cholesky(damped)
        except np.linalg.LinAlgError:
            if damping >= _MOST_DAMPING:
                what = f"the second moment of the inputs of weight '{name}'" if name else "the second moment"
                raise InputError(f"{what} is not positive semidefinite: it is no mean of x^T x") from None
            damping = min(max(10 * damping, _LEAST_DAMPING), _MOST_DAMPING)


def reversed_cholesky(H: Matrix) -> Matrix:
    """R with H = R R^T, upper triangular, its diagonal positive. LinAlgError where H is not definite."""
    return np.linalg.cholesky(H[::-1, ::-1])[::-1, ::-1].astype(np.float64, copy=False)


def block_feedback(R: Matrix, rows: slice) -> Array:
    """(R_jb R_bb^-1)^T for block b of `rows` and all rows j before it, float32 [rows of b, start of b].

    Times the errors of earlier rows it is what GPTQ adds to a block's target. R [K, K] is of `factorize`.
    """
    return np.linalg.solve(R[rows, rows].T, R[: rows.start, rows].T).astype(np.float32)


def output_error(D: npt.NDArray, H: Matrix) -> float:
    """tr(D^T H D) for D [K, N], in float64."""
    D = D.astype(np.float64)
    return float((D * (H @ D)).sum())


def relative_output_error(W: Array, back: Array, H: Matrix, threads: int | None = None) -> float:
    """E|x W - x W'|^2 / E|x W|^2 with `back` = W', both [K, N]; 0 where x W is zero.

    By slices of columns, so that float64 copies of a whole weight are never made; these are of one size and
    added in order, whatever `threads` is.
    """

    def energies(n: int) -> tuple[float, float]:
        part = W[:, n : n + _COLUMNS].astype(np.float64)
        return output_error(part - back[:, n : n + _COLUMNS], H), output_error(part, H)

    with one_blas_thread():
        parts = map_ordered(energies, range(0, W.shape[1], _COLUMNS), threads)
    noise, signal = (sum(column) for column in zip(*parts, strict=True))
    return max(noise, 0.0) / signal if signal > 0 else 0.0


def energy_order(H: Matrix, block: int) -> npt.NDArray[np.intp]:
    """A permutation of 0..K-1: whole blocks by falling sum of diag(H), and inside each likewise.

    GPTQ's activation order, held to the blocks that share a scale. A shorter last block stays last, so that
    the others keep to multiples of `block`.
    """
    power = H.diagonal()
    whole = len(H) - len(H) % block
    inside = np.argsort(-power[:whole].reshape(-1, block), axis=1, kind="stable")
    blocks = np.argsort(-power[:whole].reshape(-1, block).sum(axis=1), kind="stable")
    order = (inside + np.arange(0, whole, block)[:, None])[blocks].reshape(-1)
    return np.concatenate([order, whole + np.argsort(-power[whole:], kind="stable")])


def compensated_target(
    W: Array,
    H: Matrix,
    cross: Matrix,
    residual: Matrix | None = None,
    *,
    damping: float,
    strength: float = 1.0,
) -> Array:
    """The W~ that makes up for what layers before have already changed: float32 [K, N].

    Minimises E|(r_float + x_float W) - (r + x W~)|^2 + lambda |W~ - W|^2, where the layer's output is added
    to r: W~ = W + (H + lambda I)^-1 (C W + P), with C = `cross`, the mean of x^T (x_float - x), P =
    `residual`, that of x^T (r_float - r), and lambda = damping times the mean of diag(H). Without r it is the
    asymmetric calibration of GPTAQ (arXiv 2504.02692), whose target is the float layer's output, in closed
    form, before any rounding. With r (ours) the layer also takes back, as far as its inputs tell, what went
    wrong on the residual stream. W itself where H, or C and P, are zero.

    strength: share of the way from W to W~ that is gone. Where x is noisy, W~ is what regression on a noisy
    variable is: too small.
    """
    check_second_moment(H, len(W), "")
    mean = H.diagonal().mean()
    if mean == 0:
        return W.copy()
    with one_blas_thread():
        wanted = cross @ W.astype(np.float64)
        if residual is not None:
            wanted += residual
        shift = np.linalg.solve(damp(H, max(damping, _LEAST_DAMPING)), wanted / mean)
    return (W + strength * shift).astype(np.float32)


def compensation_damping(K: int, tokens: int) -> float:
    """The damping for `compensated_target` of a layer of K inputs, known from so many tokens: K / tokens.

    C and P are means over tokens of what is mostly noise, and the smaller the share of tokens an input gets,
    the more of it is learnt by heart. Measured on MiniLM at 1200, 5000 and 20,000 tokens: factors of 0.3 to 3
    make no difference, 0.01 throughout is worse than no compensation at 1200.
    """
    return max(_LEAST_COMPENSATION, K / tokens)


def hadamard(size: int) -> Array:
    """The Sylvester matrix of +-1, [size, size]: symmetric, H H = size I."""
    H = np.ones((1, 1), np.float32)
    while len(H) < size:
        H = np.block([[H, H], [H, -H]])
    return H


def rotate(A: npt.NDArray, size: int) -> npt.NDArray:
    """R^T A with R block diagonal, its blocks normalised Hadamard matrices [size, size]: float as A, [K, N].

    R is orthogonal and symmetric: x W = (x R) (R^T W), and H becomes R^T H R (`rotate_moment`). MR-GPTQ
    (arXiv 2509.23202) rotates blocks like that so that outliers spread over their block.
    """
    K = len(A)
    if size not in HADAMARD_SIZES or K % size:
        raise InputError(
            f"blocks of {size} cannot rotate {K} inputs: a divisor of them out of {HADAMARD_SIZES}"
        )
    blocks = A.reshape(K // size, size, -1)
    return ((hadamard(size) / np.sqrt(size)).astype(A.dtype) @ blocks).reshape(A.shape)


def rotate_moment(H: Matrix, size: int) -> Matrix:
    """R^T H R: the second moment of x R, see `rotate`."""
    half = rotate(H, size)
    return rotate(np.ascontiguousarray(half.T), size)
