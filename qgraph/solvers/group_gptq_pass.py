"""The first pass of `group_gptq`: rows rounded one after another, each making up for the errors before it.

With D = W - W' and H' = R R^T, R upper triangular, cut into the format's blocks of rows,

    tr(D^T H' D) = sum_b |R_bb^T (T_b - W'_b)|^2,   T_b = W_b + sum_{j < b} (R_jb R_bb^-1)^T D_j,

and inside a block, row by row,

    |R_bb^T (T - V)|^2 = sum_k R_kk^2 (t_k - v_k)^2,   t_k = T_k + sum_{j < k} (R_jk / R_kk) (T_j - v_j).

T is what GPTQ (arXiv 2210.17323) makes of the block's rows, and v_k, the level nearest to t_k, what it rounds
them to; no inverse of H' is needed (QuIP, arXiv 2307.13304).

A block's grid is found with this feedback in view (`search`). PT2-LLM's AGA (arXiv 2510.03267) fits scale and
mean in the norm of H'_bb; here it is that of R_bb R_bb^T, the block's true share of the sum, and rounding with
feedback and fitting go in turns, from several grids around the first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qgraph.formats import BlockFormat
from qgraph.solvers import group_grid, itf
from qgraph.solvers.group_gptq_problem import Block, Problem, Solution
from qgraph.solvers.group_grid import Array, Grid

# How the grid of a block is found: (problem, block, target [b, n]) -> levels [b, n] and grid
Choice = Callable[[Problem, Block, Array], tuple[Array, Grid]]

_FACTORS = (0.8, 0.9, 1.0, 1.1, 1.2)  # of the scale
_SHIFTS = (-0.3, 0.0, 0.3)  # of the grid, in steps of it
_ROUNDS = 2  # of fitting


def itf_grid(problem: Problem, block: Block, target: Array) -> tuple[Array, Grid]:
    """The grid of least weight error."""
    grid = itf.best_grid(problem.spec, target)
    return follow(problem, block, target, grid)[0], grid


def aga_grid(problem: Problem, block: Block, target: Array) -> tuple[Array, Grid]:
    """The grid of `itf_grid`, then PT2-LLM's AGA."""
    spec, grid = problem.spec, itf.best_grid(problem.spec, target)
    codes = group_grid.nearest(spec, target, grid)
    grid = group_grid.fit_hessian(spec, target, codes, grid, block.moment)
    return follow(problem, block, target, grid)[0], grid


def share_grid(problem: Problem, block: Block, target: Array) -> tuple[Array, Grid]:
    """The grid of `itf_grid`, then AGA in the norm of the block's share."""
    spec, grid = problem.spec, itf.best_grid(problem.spec, target)
    codes = group_grid.nearest(spec, target, grid)
    grid = group_grid.fit_hessian(spec, target, codes, grid, block.share)
    return follow(problem, block, target, grid)[0], grid


def search(problem: Problem, block: Block, target: Array) -> tuple[Array, Grid]:
    """The best of several grids, each rounded to with feedback and fitted to what came of it, in turns."""
    spec, n = problem.spec, target.shape[1]
    grid = _around(spec, itf.best_grid(spec, target))
    tried = len(grid.scale) // n
    target = np.tile(target, tried)
    best, least = None, None
    for turn in range(_ROUNDS + 1):
        levels, loss = follow(problem, block, target, grid)
        choice = loss.reshape(tried, n).argmin(axis=0) * n + np.arange(n)
        found = levels[:, choice], grid.scale[choice], grid.offset[choice]
        if best is None:
            best, least = found, loss[choice]
        else:
            better = loss[choice] < least
            best = tuple(np.where(better, new, old) for new, old in zip(found, best, strict=True))
            least = np.minimum(least, loss[choice])
        if turn < _ROUNDS:
            codes = (levels - problem.low).astype(np.uint8)
            grid = group_grid.fit_hessian(spec, target, codes, grid, block.share)
    return best[0], Grid(*best[1:])


CHOICES: dict[str, Choice] = {"itf": itf_grid, "aga": aga_grid, "share": share_grid, "search": search}


def first_pass(problem: Problem, target: Array, choose: Choice) -> Solution:
    """Block after block of the columns `target` [K, n]."""
    found = Solution(problem, target)
    for b, block in enumerate(problem.blocks):
        rows = block.rows
        aim = target[rows]
        if b:
            aim = aim + block.feedback @ found.error[: rows.start]
        found.levels[rows], grid = choose(problem, block, aim)
        found.grids.append(grid)
        found.update(b, rows)
    return found


def follow(problem: Problem, block: Block, target: Array, grid: Grid) -> tuple[Array, Array]:
    """A block [b, n] rounded row by row with feedback: (levels [b, n], its share of the error [n])."""
    factor = block.factor
    levels, error = np.empty_like(target), np.empty_like(target)  # error: target - value
    inverse = 1 / grid.scale
    for k, row in enumerate(target):
        v = levels[k]
        if k:
            np.dot(factor[:k, k], error[:k], out=v)
            v += row
            v -= grid.offset
        else:
            np.subtract(row, grid.offset, out=v)
        v *= inverse
        np.rint(v, out=v)
        np.maximum(v, problem.low, out=v)
        np.minimum(v, problem.high, out=v)
        e = error[k]
        np.multiply(v, grid.scale, out=e)
        e += grid.offset
        np.subtract(row, e, out=e)
    miss = factor.T @ error
    miss *= miss
    return levels, block.weight @ miss


def _around(spec: BlockFormat, grid: Grid) -> Grid:
    """Grids wider, narrower and shifted, one after another: [C * n]. A shift moves the middle of the grid."""
    middle = np.float32((spec.values[0] + spec.values[-1]) / 2)
    centre = grid.offset + middle * grid.scale
    shifts = _SHIFTS if spec.offset == "mean" else (0.0,)
    tried = []
    for factor in np.float32(_FACTORS):
        for shift in np.float32(shifts):
            scale = factor * grid.scale
            offset = (
                centre + shift * grid.scale - middle * scale
                if spec.offset == "mean"
                else factor * grid.offset
            )
            tried.append(group_grid.project(spec, scale, offset))
    return Grid(*(np.concatenate(parts) for parts in zip(*tried, strict=True)))
