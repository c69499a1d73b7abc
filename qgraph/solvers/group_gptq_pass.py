"""The first pass of `group_gptq`: rows rounded one after another, each to make up for the errors before it.

With D = W - W' and H' = R R^T, R upper triangular, cut into the format's blocks of rows,

    tr(D^T H' D) = sum_b |R_bb^T (T_b - W'_b)|^2,   T_b = W_b + sum_{j < b} (R_jb R_bb^-1)^T D_j,

and in a block, row by row,

    |R_bb^T (T - V)|^2 = sum_k R_kk^2 (t_k - v_k)^2,   t_k = T_k + sum_{j < k} (R_jk / R_kk) (T_j - v_j).

T is what GPTQ (arXiv 2210.17323) has made of a block's rows when it comes to them, and the level nearest to
t_k what it rounds row k to; no inverse of H' is needed (QuIP, arXiv 2307.13304). Feedback inside blocks, not
only between them, is the first step beyond PT2-LLM (arXiv 2510.03267).

The second is how a block gets its grid. AGA, PT2-LLM's fit to given levels, is in the norm of H'_bb, while
what later blocks cannot make up for is the error in that of R_bb R_bb^T. Rounding with feedback and fits in
that norm go in turns, from several grids around the first (`search`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from qgraph.formats import BlockFormat
from qgraph.solvers import group_grid, itf
from qgraph.solvers.group_gptq_problem import Block, Problem, Solution, moments
from qgraph.solvers.group_grid import Array, Grid

# How a block's levels [b, n] and grid are found: of its T, float32 [b, n].
Choice = Callable[[Problem, Block, Array], tuple[Array, Grid]]

# Grids tried: scales, and shifts in units of them. Twice as many scales, or a wider range of them, gain less
# than 0.5 %.
_FACTORS = (0.9, 0.95, 1.0, 1.05, 1.1)
_SHIFTS = (-0.3, 0.0, 0.3)
_TURNS = 3  # of rounding, with fits in between


def first_pass(problem: Problem, target: Array, choose: Choice) -> Solution:
    """Block after block of the columns `target` [K, n]."""
    found = Solution(problem, target)
    for b, block in enumerate(problem.blocks):
        aim = target[block.rows]
        if b:
            aim = aim + block.feedback @ found.error[: block.rows.start]
        found.levels[block.rows], (found.scale[b], found.offset[b]) = choose(problem, block, aim)
        found.update(block.rows)
    return found


def fitted(problem: Problem, block: Block, target: Array, *, norm: str) -> tuple[Array, Grid]:
    """On the grid of the extremes (`rtn`), of least weight error as it is (`itf`) or with each row's in
    proportion to what it costs, R_kk^2 (`power`), or what AGA makes of `itf` in the norm of H'_bb (`aga`), or
    of R_bb R_bb^T (`share`)."""
    spec = problem.spec
    if norm == "rtn":
        grid, _ = group_grid.initial(spec, target)
    else:
        grid = itf.best_grid(spec, target, power=block.weight if norm == "power" else None)
    if norm in ("aga", "share"):
        M = problem.moment[block.rows, block.rows] if norm == "aga" else block.share
        levels = spec.values[group_grid.nearest(spec, target, grid)]
        grid = _fit(spec, target, levels, grid, M)
    return follow(problem, block, target, grid)[0], grid


def search(problem: Problem, block: Block, target: Array) -> tuple[Array, Grid]:
    """On the best of several grids, fitted to what rounding to them came to, in turns."""
    spec, n = problem.spec, target.shape[1]
    grid = _around(spec, itf.best_grid(spec, target))
    targets = np.tile(target, len(grid.scale) // n)
    levels, loss = follow(problem, block, targets, grid)
    best, least = _best(n, levels, grid, loss)
    for _ in range(_TURNS - 1):
        grid = _fit(spec, targets, levels, grid, block.share)
        levels, loss = follow(problem, block, targets, grid)
        found, error = _best(n, levels, grid, loss)
        for old, new in zip(best, found, strict=True):
            np.copyto(old, new, where=error < least)
        least = np.minimum(error, least)
    return best[0], Grid(*best[1:])


_NORMS = ("rtn", "itf", "power", "aga", "share")
CHOICES: dict[str, Choice] = {norm: partial(fitted, norm=norm) for norm in _NORMS}
CHOICES["search"] = search


def follow(problem: Problem, block: Block, target: Array, grid: Grid) -> tuple[Array, Array]:
    """A block [b, n] rounded row by row with feedback: (levels [b, n], its share of the error [n])."""
    wanted = target - grid.offset  # in levels
    wanted /= grid.scale
    levels, error = np.empty_like(target), np.empty_like(target)
    feedback = np.ascontiguousarray(block.factor.T)
    for k, v in enumerate(levels):
        if k:
            np.dot(feedback[k, :k], error[:k], out=v)
            v += wanted[k]
        else:
            np.copyto(v, wanted[k])
        np.rint(v, out=v)
        np.maximum(v, problem.low, out=v)
        np.minimum(v, problem.high, out=v)
        np.subtract(wanted[k], v, out=error[k])
    miss = feedback @ error
    miss *= miss
    return levels, (block.weight @ miss) * np.square(grid.scale)


def _fit(spec: BlockFormat, target: Array, levels: Array, grid: Grid, M: Array) -> Grid:
    error = target - (levels * grid.scale + grid.offset)
    return group_grid.improve(spec, grid, moments(M, levels, M @ error))


def _best(n: int, levels: Array, grid: Grid, loss: Array) -> tuple[list[Array], Array]:
    """Levels, scale and offset of the best of C grids a column, [.., C n], and its loss [n]."""
    choice = loss.reshape(-1, n).argmin(axis=0) * n + np.arange(n)
    return [levels[:, choice], grid.scale[choice], grid.offset[choice]], loss[choice]


def _around(spec: BlockFormat, grid: Grid) -> Grid:
    """Grids wider, narrower and shifted, [C n]. One that may lie anywhere is moved by its middle, others keep
    their level of 0."""
    anywhere = spec.offset == "mean"
    middle = np.float32(spec.values.mean()) if anywhere else np.float32(0)
    tried = []
    for factor in map(np.float32, _FACTORS):
        for shift in map(np.float32, _SHIFTS if anywhere else (0,)):
            scale, offset = factor * grid.scale, factor * grid.offset
            if anywhere:
                offset = grid.offset + (middle + shift) * grid.scale - middle * scale
            tried.append(group_grid.project(spec, scale, offset))
    return Grid(*(np.concatenate(parts) for parts in zip(*tried, strict=True)))
