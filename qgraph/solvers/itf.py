"""Iterative ternary fitting, PT2-LLM's (arXiv 2510.03267), generalised to any number of levels.

In turn, for each block: the levels nearest to the weights at the present grid, and the grid of least squares
for these levels. Neither step can raise the error, also because a grid is one that can be stored and is taken
only where it lowers the error; so the turns end, in a local optimum, which depends on the start. The paper
starts ternary from the threshold of `group_rtn`. Here (`starts`):

* ternary starts from the global optimum over all real grids (`ternary_cuts`), so that nothing is left to do
  but to settle into float16;
* the others from the best few of the grids that clip more or less of either end of a block's range.

The grid of `group_rtn` is always among the starts: no block comes out worse than there.

With `power`, the mean squares of a block's inputs, all of this is about sum_k power_k (w_k - w'_k)^2, the
output error of inputs that are not correlated. The nearest levels are the best in that norm as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qgraph.errors import UsageError
from qgraph.formats import FORMATS, BlockFormat, QTensor, group
from qgraph.solvers import group_grid
from qgraph.solvers.group_grid import Array, Codes, Double, Grid, Moments
from qgraph.solvers.ternary_cuts import best_cuts

MAX_ROUNDS = 50
_KEEP = 0.7  # share of columns still on the move below which the others are left out

# Shares of a block's range at which grids are tried, by the number of levels: (least, number of them up to
# the whole range). Measured on normal and t(4) weights; twice as many take less than 1 % off the error.
_SHARES = {4: (0.35, 4), 8: (0.55, 4), 16: (0.75, 4)}
_SYMMETRIC_SHARES = {16: (0.6, 17), 256: (0.85, 17)}


def solve(W: Array, *, format: str, name: str = "", threads: int | None = None, starts: int = 2) -> QTensor:
    """W float32 [K, N] -> `format`, as above.

    starts: how many of the grids tried are followed to their end; 0 follows that of `group_rtn` alone, as the
    paper does.

    Deterministic, whatever `threads`. InputError for weights that are not finite, or beyond float16.
    """
    if starts < 0:
        raise UsageError(f"itf: starts={starts}")
    group_grid.check_group_weight(W, name)
    spec = FORMATS[format]

    def work(X: Array) -> tuple[Grid, Codes]:
        grid = best_grid(spec, X, starts)
        return grid, group_grid.nearest(spec, X, grid)

    return group_grid.solve_blocks(spec, W, work, threads)


def best_grid(spec: BlockFormat, W: Array, starts: int = 2, power: Array | None = None) -> Grid:
    """The grids of the blocks W, float32 [b, n], that ITF ends in. `power` float32 [b]; None is all 1."""
    extremes, codes = group_grid.initial(spec, W)
    if not starts:
        return converge(spec, W, group_grid.fit(spec, W, codes, extremes, power), power)
    tried = [extremes, *_starts(spec, W, extremes)]
    errors = np.stack([squared_error(spec, W, grid, power) for grid in tried])
    scales, offsets = (np.stack(parts) for parts in zip(*tried, strict=True))
    column = np.arange(W.shape[1])
    best, least = extremes, np.full(W.shape[1], np.inf)
    for _ in range(min(starts, len(tried) - 1)):
        choice = errors.argmin(axis=0)
        errors[choice, column] = np.inf
        grid = converge(spec, W, Grid(scales[choice, column], offsets[choice, column]), power)
        error = squared_error(spec, W, grid, power)
        better = error < least
        best = Grid(*(np.where(better, new, old) for new, old in zip(grid, best, strict=True)))
        least = np.minimum(error, least)
    return best


def _starts(spec: BlockFormat, W: Array, extremes: Grid) -> Iterator[Grid]:
    """Grids to try besides that of the extremes."""
    if spec is group.TERNARY:
        alpha, mu = best_cuts(W)
        yield group_grid.project(spec, np.where(alpha > 0, alpha, 1), mu)
        return
    levels = len(spec.values)
    if spec.offset == "none":
        for share in _shares(_SYMMETRIC_SHARES, levels):
            yield group_grid.project(spec, extremes.scale * share, extremes.offset)
        return
    # The point that the ends of the range move towards.
    centre = W.mean(axis=0) if spec.offset == "mean" else np.zeros_like(extremes.offset)
    low, high = (spec.values[end] * extremes.scale + extremes.offset - centre for end in (0, -1))
    for below in _shares(_SHARES, levels):
        for above in _shares(_SHARES, levels):
            scale = (above * high - below * low) / np.float32(levels - 1)
            yield group_grid.project(spec, scale, centre + below * low - spec.values[0] * scale)


def converge(spec: BlockFormat, W: Array, grid: Grid, power: Array | None = None) -> Grid:
    """`step` until no grid changes, or MAX_ROUNDS times."""
    scale, offset = grid.scale.copy(), grid.offset.copy()
    active = np.arange(W.shape[1])
    for _ in range(MAX_ROUNDS):
        now = Grid(scale[active], offset[active])
        new = step(spec, W, now, power)
        scale[active], offset[active] = new
        moved = (new.scale != now.scale) | (new.offset != now.offset)
        count = np.count_nonzero(moved)
        if not count:
            break
        # Leaving settled columns in is harmless, and cheaper than copying the others until there are many.
        if count <= _KEEP * len(active):
            active, W = active[moved], np.compress(moved, W, axis=1)
    return Grid(scale, offset)


def step(spec: BlockFormat, W: Array, grid: Grid, power: Array | None = None) -> Grid:
    """One turn for blocks W, float32 [b, n]: the best grid for the levels that are nearest on this one."""
    v, e = _round(spec, W, grid)
    s = grid.scale.astype(np.float64)
    n = np.full(s.shape, float(len(W)) if power is None else power.sum(dtype=np.float64))
    t1, r1 = _sum(v, power), s * _sum(e, power)
    rt = s * _sum(np.multiply(e, v, out=e), power)
    tt = _sum(np.square(v, out=v), power)
    return group_grid.improve(spec, grid, Moments(tt, t1, n, rt, r1))


def squared_error(spec: BlockFormat, W: Array, grid: Grid, power: Array | None = None) -> Double:
    """sum_k power_k (w_k - w'_k)^2 at the nearest levels: float64 [n]."""
    _, e = _round(spec, W, grid)
    return _sum(np.square(e, out=e), power) * np.square(grid.scale, dtype=np.float64)


def _round(spec: BlockFormat, W: Array, grid: Grid) -> tuple[Array, Array]:
    """The nearest levels [b, n], and what they leave, in units of the scale."""
    e = W - grid.offset
    e /= grid.scale
    v = np.rint(e)
    np.clip(v, spec.values[0], spec.values[-1], out=v)
    e -= v
    return v, e


def _sum(X: Array, power: Array | None) -> Double:
    # A sum of products, not a matrix product: with BLAS or fused multiply-adds the file would depend on the
    # machine. Powers span orders of magnitude: float32 would make a change out of what changes nothing.
    if power is None:
        return X.sum(axis=0).astype(np.float64)
    return (X * power.astype(np.float64)[:, None]).sum(axis=0)


def _shares(table: dict[int, tuple[float, int]], levels: int) -> Array:
    return np.linspace(table[levels][0], 1, table[levels][1], dtype=np.float32)
