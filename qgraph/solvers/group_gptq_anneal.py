"""Refinement of `group_gptq`: levels drawn anew one row at a time, all others fixed, as it grows colder.

Changing the level of row k moves tr(D^T H' D) along a parabola with its lowest point at v_k + (H' D)_k / (H'_kk
s), in levels. Rounding that to the nearest level is coordinate descent, which soon ends in a local optimum.
With logistic noise of scale T / (2 H'_kk s^2) added before, a level and the next are chosen with the
probabilities of a heat bath at temperature T, exp(-error / T): Gibbs sampling, and with T falling from sweep to
sweep simulated annealing (Kirkpatrick, Gelatt and Vecchi 1983). It is as cheap as descent, and leaves the local
optima that feedback leads to. Grids are fitted to their levels in between.

T is in units of a column's error a row, after the first pass. By measurement, for layers of any shape and
spectrum: at 1 the error stays what it is, at 2 it rises by a tenth, at 4 most of what was gained is lost.
"""

from __future__ import annotations

import numpy as np

from qgraph.solvers import group_grid
from qgraph.solvers.group_gptq_problem import Problem, Solution
from qgraph.solvers.group_grid import Array, Moments

_PANEL = 64  # rows whose gradients are made by one matrix product
_START, _END = 1.5, 0.5  # temperatures
_FIT = 4  # sweeps from one fit of the grids to the next
_COLD = 3  # sweeps at temperature 0 at the end, each with a fit


def anneal(found: Solution, sweeps: int, seed: int) -> None:
    """Lower the error of every column, or leave it; in place. The noise depends on `seed` alone."""
    problem, tried = found.problem, found.copy()
    unit = problem.loss(found.error) / np.float32(len(found.error))
    noise = _Noise(seed)
    for i in range(sweeps):
        heat = np.float32(_START * (_END / _START) ** (i / max(sweeps - 1, 1)))
        sweep(tried, heat * unit, noise)
        if i % _FIT == _FIT - 1:
            fit(tried)
    for _ in range(_COLD):
        sweep(tried)
        fit(tried)
    found.take_better(tried)


def sweep(now: Solution, temperature: Array | None = None, noise: _Noise | None = None) -> None:
    """Every level once, in the order of the rows. temperature: float32 [n]; None is 0."""
    problem = now.problem
    for b, block in enumerate(problem.blocks):
        inverse = 1 / now.grids[b].scale
        warmth = None if temperature is None else np.float32(0.5) * temperature * np.square(inverse)
        for start in range(block.rows.start, block.rows.stop, _PANEL):
            rows = slice(start, min(start + _PANEL, block.rows.stop))
            own = 1 / problem.diagonal[rows, None]
            aim = problem.moment[rows] @ now.error
            aim *= inverse
            if warmth is not None:
                assert noise is not None
                drawn = noise.draw(*aim.shape)
                drawn *= warmth
                aim += drawn
            aim *= own
            aim += now.levels[rows]
            _settle(problem, now.levels[rows], aim, problem.moment[rows, rows] * own)
            now.update(b, rows)


def _settle(problem: Problem, levels: Array, aim: Array, coupling: Array) -> None:
    """Round `aim` [r, n] row by row into `levels`; each row's change moves the aims of those after it."""
    change = np.empty_like(aim)
    for k, v in enumerate(aim):
        if k:
            v += np.dot(coupling[k, :k], change[:k])
        np.rint(v, out=v)
        np.maximum(v, problem.low, out=v)
        np.minimum(v, problem.high, out=v)
        np.subtract(levels[k], v, out=change[k])
        levels[k] = v


def fit(now: Solution) -> None:
    """The best grid of each block for its levels, all other blocks fixed."""
    problem = now.problem
    for b, block in enumerate(problem.blocks):
        t = now.levels[block.rows].astype(np.float64)
        g = (problem.moment[block.rows] @ now.error).astype(np.float64)  # (H' D)_b
        ht, h1 = block.moment @ t, block.moment.sum(axis=1)
        n = np.broadcast_to(h1.sum(), t.shape[1:])
        moments = Moments((t * ht).sum(0), h1 @ t, n, (t * g).sum(0), g.sum(0))
        now.grids[b] = group_grid.improve(problem.spec, now.grids[b], moments)
        now.update(b, block.rows)


class _Noise:
    """Numbers of the standard logistic distribution."""

    _pool: Array | None = None

    def __init__(self, seed: int) -> None:
        if _Noise._pool is None:
            quantiles = (np.arange(1 << 18) + 0.5) / (1 << 18)
            np.random.default_rng(0).shuffle(quantiles)
            _Noise._pool = np.log(quantiles / (1 - quantiles)).astype(np.float32)
        self._bits = np.random.PCG64(seed)

    def draw(self, rows: int, n: int) -> Array:
        """float32 [rows, n]."""
        assert _Noise._pool is not None
        first = self._bits.random_raw() % (len(_Noise._pool) - rows * n)
        return _Noise._pool[first : first + rows * n].reshape(rows, n).copy()
