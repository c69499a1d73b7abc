"""The ternary grid of least weight error, exactly: the best of all ways to cut the sorted weights in three.

On any grid, nearest rounding cuts a block's sorted weights into those at -1, at 0 and at 1. With i and p of b
weights at -1 and 1, and A the sum of the weights at 1 less that of those at -1 after the mean is taken off
all, least squares explains A^2 / (i + p - (p - i)^2 / b) of a block's variance. So b^2 / 2 pairs of cuts,
a few operations each, hold the global optimum of ||w - alpha T - mu||^2, of which alternating between grid
and rounding (`itf`) finds a local one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def best_cuts(W: Array) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(alpha, mu) float64 [n] of each column of W, float32 [b, n]; alpha is 0 where all weights are alike."""
    b, n = W.shape
    x = np.sort(W, axis=0).astype(np.float64)
    mean = x.mean(axis=0)
    x -= mean
    # low[i]: minus the sum of the i lowest, which is also the sum of all the others. Not negative.
    low = np.zeros((b + 1, n), np.float32)
    np.negative(np.cumsum(x, axis=0), out=low[1:], casting="same_kind")
    norm = _norms(b)
    best, first = np.zeros(n, np.float32), np.zeros(n, np.intp)
    work = np.empty((b + 1, n), np.float32)
    for i in range(b):
        explained = np.add(low[i:], low[i], out=work[i:])
        explained *= norm[i, i:, None]
        found = explained.max(axis=0)
        first[found > best] = i
        np.maximum(best, found, out=best)
    column = np.arange(n)
    last = ((low + low[first, column]) * norm[first].T).argmax(axis=0)
    positive = b - last
    spread = first + positive - (positive - first) ** 2 / b
    alpha = np.divide(
        low[first, column].astype(np.float64) + low[last, column], spread, out=np.zeros(n), where=best > 0
    )
    return alpha, mean - alpha * (positive - first) / b


def _norms(b: int) -> Array:
    """1 / sqrt(i + p - (p - i)^2 / b) for i weights at -1 and p = b - j at 1: float32 [b + 1, b + 1] of i, j.

    0 where all weights share a level, or j < i.
    """
    i = np.arange(b + 1)[:, None]
    p = b - np.arange(b + 1)[None]
    spread = i + p - (p - i) ** 2 / b
    usable = (spread > 0) & (i + p <= b)
    return (usable / np.sqrt(np.where(usable, spread, 1))).astype(np.float32)
