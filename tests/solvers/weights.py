"""Weights to try solvers on, and what to measure of the results, in plain float64."""

from __future__ import annotations

import numpy as np

from qgraph.formats import FORMATS, QTensor, e4m3

SCALES = e4m3.from_codes(np.arange(1, 127, dtype=np.uint8)).astype(np.float64)  # of codes 1..126
GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # magnitudes of E2M1


def awkward(shape: tuple[int, int] = (80, 24)) -> np.ndarray:
    """Blocks that are normal, heavy-tailed, constant, on the grid, zero, one-hot, tiny, and subnormal."""
    rng = np.random.default_rng(7)
    W = rng.standard_normal(shape).astype(np.float32)
    W[:, 1] = rng.standard_t(2, shape[0])
    W[:, 2] = 0.7
    W[:, 3] = rng.choice([0, 0.5, -1, 1.5, 2, -3, 4, 6], shape[0])
    W[:, 4] = 0
    W[:, 5] = 0
    W[5::16, 5] = -2.5
    for n in range(6, 20):  # from the normal range of E4M3 down to blocks below its smallest number
        W[:, n] *= np.float32(10.0) ** np.float32(4 - n)
    W[:, 20] *= 1e-40
    W[:16, 21] = [1] * 15 + [30]
    W[:, 22] = np.float32(4.5 * 2**-9 / 1000)
    return W


def relative_error(W: np.ndarray, q: QTensor) -> float:
    """|W - W'|^2 / |W|^2."""
    W = W.astype(np.float64)
    return float(((W - q.dequantize()) ** 2).sum() / (W**2).sum())


def block_errors(W: np.ndarray, q: QTensor, h: np.ndarray | None = None) -> np.ndarray:
    """sum h (w - w')^2 of each block: [blocks, N]. h: [K]."""
    squares = (W.astype(np.float64) - q.dequantize()) ** 2 * _column(W, h)
    block = FORMATS[q.format].block
    return np.array([squares[k : k + block].sum(axis=0) for k in range(0, len(W), block)])


def assert_optimal(W: np.ndarray, q: QTensor, h: np.ndarray | None = None) -> None:
    """No block is further from its weights than at the best of 126 scales, but for float32 rounding."""
    squares = W.astype(np.float64) ** 2 * _column(W, h)
    norm = np.sqrt(np.array([squares[k : k + 16].sum(axis=0) for k in range(0, len(W), 16)]))
    best = np.sqrt(_brute_force(W, q.global_scale, h))
    assert (np.sqrt(block_errors(W, q, h)) <= best + 2e-7 * norm).all()


def _brute_force(W: np.ndarray, a: np.float32, h: np.ndarray | None) -> np.ndarray:
    """Smallest error of each block over all 126 scales at the global scale a: [blocks, N]."""
    K, N = W.shape
    best = np.full((-(-K // 16), N), np.inf)
    for b in range(len(best)):
        rows = slice(16 * b, 16 * b + 16)
        w = np.abs(W[rows].astype(np.float64))
        for d in SCALES:
            distance = np.abs(w[..., None] - GRID * d * float(a)).min(axis=-1)
            best[b] = np.minimum(best[b], (distance**2 * _column(W, h)[rows]).sum(axis=0))
    return best


def _column(W: np.ndarray, h: np.ndarray | None) -> np.ndarray:
    return np.ones((len(W), 1)) if h is None else h.astype(np.float64)[:, None]
