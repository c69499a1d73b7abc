"""Refinement of `group_gptq`: simulated annealing, levels drawn anew row by row with all other rows fixed.

As a function of one level v_k, tr(D^T H' D) is a parabola, its lowest point at v_k + (H' D)_k / (H'_kk s).
Rounding that to the nearest level is coordinate descent, which soon ends in a local optimum. With logistic
noise of scale T / (2 H'_kk s^2) added first, two neighbouring levels are chosen with the probabilities of a
heat bath, exp(-error / T): Gibbs sampling at temperature T, and simulated annealing (Kirkpatrick, Gelatt and
Vecchi, 1983) when T falls from sweep to sweep. It costs what descent costs, and comes out of the local optima
that error feedback leads to. Each grid is now and then fitted to its levels, all other blocks fixed.

A sweep goes by panels of rows. A matrix product says how the error depends on a panel, which is then visited
several times: for layers of many inputs the product is most of the work.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from qgraph.solvers import group_grid
from qgraph.solvers.group_gptq_problem import Solution, moments
from qgraph.solvers.group_grid import Array, Grid

_PANEL = 128  # rows, or a block if that is larger
_VISITS = 4  # of a panel in a sweep

# Temperatures, in units of a column's error a row after the first pass. By measurement, whatever the layer:
# at 1 the error stays what it is, at 2 it rises by a tenth, at 4 it nearly doubles. Starting at 1 or 2.5, or
# ending at 0.3, is about 1 % worse.
_START, _END = 1.5, 0.5
_FIT = 2  # sweeps from one fit of the grids to the next
_COLD = 2  # sweeps at temperature 0 at the end, each with a fit

_NOISE = 1 << 18  # numbers


def anneal(found: Solution, sweeps: int, seed: int) -> None:
    """Lower the error of columns, in place; it rises in none. The noise depends on `seed` alone."""
    tried, noise = found.copy(), _Noise(seed)
    unit = found.problem.losses(found.error) / np.float32(len(found.error))
    for i in range(sweeps):
        heat = np.float32(_START * (_END / _START) ** (i / max(sweeps - 1, 1)))
        sweep(tried, heat * unit, noise, fit=i % _FIT == _FIT - 1)
    for _ in range(_COLD):
        sweep(tried)
    found.take_better(tried)


def sweep(
    now: Solution, temperature: Array | None = None, noise: _Noise | None = None, *, fit: bool = True
) -> None:
    """One round over all rows, in place. With noise, temperature is float32 [n]; without, it is 0."""
    problem, K = now.problem, len(now.target)
    step = max(problem.spec.block, _PANEL - _PANEL % problem.spec.block)
    for start in range(0, K, step):
        rows = slice(start, min(start + step, K))
        gradient = problem.moment[rows] @ now.error
        before = now.error[rows].copy()
        _visit(now, rows, gradient, temperature, noise)
        now.update(rows)
        if fit:
            gradient += problem.moment[rows, rows] @ (now.error[rows] - before)
            _fit(now, rows, gradient)


def _visit(
    now: Solution, rows: slice, gradient: Array, temperature: Array | None, noise: _Noise | None
) -> None:
    """New levels for a panel. gradient: (H' D) of it, float32 [r, n]."""
    problem, levels, scale = now.problem, now.levels[rows], now.by_row(rows)[0]
    own, inverse = problem.diagonal[rows, None], 1 / scale
    best = gradient / own  # of each level, as long as no other changes
    best *= inverse
    best += levels
    if temperature is not None:
        warmth = np.float32(0.5) * temperature * np.square(inverse) / own
    coupling = problem.moment[rows, rows] / own
    np.fill_diagonal(coupling, 0)
    change = np.zeros_like(levels)  # of errors
    for _ in range(_VISITS if noise else 1):
        drawn = best
        if noise:
            drawn = noise.draw(*best.shape) * warmth
            drawn += best
        for k, v in enumerate(drawn):
            moved = np.dot(coupling[k], change)
            moved *= inverse[k]
            v += moved
            np.rint(v, out=v)
            np.maximum(v, problem.low, out=v)
            np.minimum(v, problem.high, out=v)
            np.subtract(levels[k], v, out=moved)
            moved *= scale[k]
            change[k] += moved
        np.copyto(levels, drawn)


def _fit(now: Solution, rows: slice, gradient: Array) -> None:
    """The best grid of each block of a panel in turn. gradient: (H' D) of the panel, overwritten."""
    problem, size = now.problem, now.problem.spec.block
    for b in range(rows.start // size, -(-rows.stop // size)):
        block = problem.blocks[b].rows
        M, part = problem.moment[block, block], slice(block.start - rows.start, block.stop - rows.start)
        sums = moments(M, now.levels[block], gradient[part])
        kept = Grid(now.scale[b], now.offset[b])
        now.scale[b], now.offset[b] = group_grid.improve(problem.spec, kept, sums)
        before = now.error[block].copy()
        now.update(block)
        gradient += problem.moment[rows, block] @ (now.error[block] - before)


class _Noise:
    """Numbers of the standard logistic distribution: its quantiles, shuffled, read from any place."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def draw(self, rows: int, n: int) -> Array:
        """float32 [rows, n], not to be changed."""
        pool = _quantiles()
        first = int(self._bits.random_raw()) % (len(pool) - rows * n)
        return pool[first : first + rows * n].reshape(rows, n)


@cache
def _quantiles() -> Array:
    p = (np.arange(_NOISE) + 0.5) / _NOISE
    np.random.Generator(np.random.PCG64(0)).shuffle(p)
    return np.log(p / (1 - p)).astype(np.float32)
