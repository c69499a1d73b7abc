"""ITF: what its steps promise, how close its local optimum is to the global one, and its ternary start."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from weights import awkward, block_errors, relative_error

from qgraph.errors import UsageError
from qgraph.formats import FORMATS, BlockFormat
from qgraph.formats.group import GROUP_FORMATS, TERNARY
from qgraph.solvers import SOLVERS, group_grid, group_rtn, itf
from qgraph.solvers.group_grid import Grid
from qgraph.solvers.ternary_cuts import best_cuts

every_format = pytest.mark.parametrize("spec", GROUP_FORMATS, ids=lambda spec: spec.name)


def block(rows: int, n: int = 80, seed: int = 0) -> np.ndarray:
    """Weights [b, n]: normal, heavy-tailed, off centre, and from awkward columns."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((rows, n)).astype(np.float32)
    W[:, ::3] = rng.standard_t(2, W[:, ::3].shape)
    W[:, 1::7] += 5
    W[:, -20:] = awkward((max(rows, 16), 24))[:rows, :20]
    return W


def powers(rows: int) -> np.ndarray:
    """Of inputs as layers see them, float32 [rows]: some hundred times as strong as others."""
    return np.exp(2 * np.random.default_rng(7).standard_normal(rows)).astype(np.float32)


def error(spec: BlockFormat, W: np.ndarray, grid: Grid, power: np.ndarray | None = None) -> np.ndarray:
    """Squared error [n] at the nearest levels, in float64, that of row k times power[k]."""
    back = group_grid.values(spec, group_grid.nearest(spec, W, grid), grid)
    squares = (W.astype(np.float64) - back) ** 2
    return squares.sum(axis=0) if power is None else power.astype(np.float64) @ squares


@every_format
@pytest.mark.parametrize("rows", [None, 44, 1])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_objective_never_rises_and_the_steps_end(spec: BlockFormat, rows: int | None, weighted: bool):
    W = block(rows or spec.block)
    power = powers(len(W)) if weighted else None
    norm = (W.astype(np.float64) ** 2).sum(axis=0)
    grid, _ = group_grid.initial(spec, W)
    trace, moved = [error(spec, W, grid, power)], []
    for _ in range(itf.MAX_ROUNDS):
        following = itf.step(spec, W, grid, power)
        moved.append((following.scale != grid.scale) | (following.offset != grid.offset))
        grid = following
        trace.append(error(spec, W, grid, power))
    falls = np.diff(trace, axis=0)
    # Each step is decided on float32 sums; 1e-6 of the error is their rounding.
    assert (falls <= 1e-6 * np.array(trace[:-1]) + 1e-13 * norm).all()
    # In a constant block many zero points are equally good, and weighted sums tell them apart by rounding.
    assert not moved[-1][np.ptp(W, axis=0) > 0 if weighted else slice(None)].any()
    if spec.block > 32 and rows != 1 and len(spec.values) < 256:
        assert np.sum(moved, axis=0).mean() > 1.5 and trace[-1].sum() < 0.99 * trace[0].sum()


@every_format
@pytest.mark.parametrize("weighted", [False, True])
def test_it_ends_where_no_step_helps(spec: BlockFormat, weighted: bool):
    W = block(spec.block, seed=1)
    power = powers(len(W)) if weighted else None
    grid = itf.best_grid(spec, W, power=power)
    assert all(np.array_equal(a, b) for a, b in zip(itf.step(spec, W, grid, power), grid, strict=True))
    # Nor does the plain computation of least squares, in float64, by more than the rounding of sums.
    codes = group_grid.nearest(spec, W, grid)
    other = group_grid.fit(spec, W, codes, grid, power)
    # (In a constant block all zero points are equally good until they are rounded.)
    varied = np.ptp(W, axis=0) > 0
    assert (error(spec, W, other, power) >= error(spec, W, grid, power) * (1 - 1e-5))[varied].all()


@every_format
def test_weighted_by_power_it_is_better_in_that_norm(spec: BlockFormat):
    W = block(spec.block, seed=1)
    power = powers(len(W))
    plain, weighted = (error(spec, W, itf.best_grid(spec, W, power=p), power) for p in (None, power))
    assert weighted.sum() < 0.99 * plain.sum()
    ones = error(spec, W, itf.best_grid(spec, W, power=np.ones(len(W), np.float32)))
    np.testing.assert_allclose(ones, error(spec, W, itf.best_grid(spec, W)), rtol=1e-3, atol=1e-9)


@every_format
@pytest.mark.parametrize("starts", [0, 1, 2])
@pytest.mark.parametrize("rows", [172, 129, 7])
def test_no_block_is_worse_than_round_to_nearest(spec: BlockFormat, starts: int, rows: int):
    W = np.concatenate([block(rows, seed=2), np.zeros((rows, 1), np.float32)], axis=1)
    coarse = block_errors(W, group_rtn.solve(W, format=spec.name))
    fine = block_errors(W, itf.solve(W, format=spec.name, starts=starts))
    assert (fine <= coarse * (1 + 1e-5) + 1e-14).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_the_ternary_start_is_the_global_optimum(rows: int):
    """Against all 3^rows ways to choose T, each with numpy's least squares."""
    W = np.random.default_rng(3).standard_normal((rows, 40)).astype(np.float32)
    W[:, 5] = 0.3
    W[:, 6] = 0
    least = np.full(40, np.inf)
    for T in product((-1.0, 0.0, 1.0), repeat=rows):
        A = np.stack([T, np.ones(rows)], axis=1)
        fitted = A @ np.linalg.lstsq(A, W.astype(np.float64), rcond=None)[0]
        least = np.minimum(least, ((W - fitted) ** 2).sum(axis=0))
    alpha, mu = best_cuts(W)
    assert (alpha >= 0).all() and not alpha[5:7].any()
    levels = mu + alpha * np.array([-1, 0, 1])[:, None, None]
    found = (np.abs(W - levels).min(axis=0) ** 2).sum(axis=0)
    np.testing.assert_allclose(found, least, rtol=1e-6, atol=1e-12)


def test_ternary_needs_no_other_start():
    """Many other starts, each followed to its end, find nothing better than float16's rounding."""
    W = block(128, seed=4)[:, :40]
    extremes, _ = group_grid.initial(TERNARY, W)
    least = np.full(W.shape[1], np.inf)
    for factor in np.linspace(0.5, 2, 6):
        for shift in np.linspace(-1, 1, 7):
            start = group_grid.project(
                TERNARY, extremes.scale * factor, extremes.offset + shift * extremes.scale
            )
            least = np.minimum(least, error(TERNARY, W, itf.converge(TERNARY, W, start)))
    found = error(TERNARY, W, itf.best_grid(TERNARY, W))
    assert (found <= least * (1 + 1e-4)).all()
    alone = error(TERNARY, W, itf.best_grid(TERNARY, W, starts=0))
    assert (found <= alone * (1 + 1e-5)).all() and found.sum() < 0.99 * alone.sum()


@pytest.mark.parametrize(("name", "most"), [("int4-sym", 1.02), ("int8", 1.05)])
def test_symmetric_grids_are_close_to_the_best_of_all_scales(name: str, most: float):
    spec = FORMATS[name]
    W = block(spec.block, 40, seed=5)[:, :20]
    amax = np.abs(W).max(axis=0)
    least = np.full(20, np.inf)
    for share in np.linspace(0.4, 1.05, 1500):
        grid = group_grid.project(spec, share * amax / spec.values[-1], np.zeros(20))
        least = np.minimum(least, error(spec, W, grid))
    assert error(spec, W, itf.best_grid(spec, W)).sum() <= most * least.sum()


@pytest.mark.parametrize("name", ["int2", "int3", "int4"])
def test_two_sided_grids_are_close_to_the_best_of_many_starts(name: str):
    spec = FORMATS[name]
    W = block(spec.block, 60, seed=6)[:, :40]
    low, high = W.min(axis=0), W.max(axis=0)
    if spec.offset == "zero_point":
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    middle = W.mean(axis=0) if spec.offset == "mean" else 0
    least = np.full(40, np.inf)
    for above, below in product(np.linspace(0.2, 1, 12), repeat=2):
        top, bottom = middle + above * (high - middle), middle + below * (low - middle)
        start = group_grid.project(spec, (top - bottom) / spec.values[-1], bottom)
        least = np.minimum(least, error(spec, W, itf.converge(spec, W, start)))
    relative = error(spec, W, itf.best_grid(spec, W)).sum() / least.sum()
    assert relative <= 1.03


@every_format
def test_more_starts_are_better(spec: BlockFormat):
    W = np.random.default_rng(8).standard_t(4, (2 * spec.block, 300)).astype(np.float32)
    paper, one, two = (relative_error(W, itf.solve(W, format=spec.name, starts=s)) for s in (0, 1, 2))
    assert two <= one < paper


def test_a_bad_number_of_starts_is_refused():
    with pytest.raises(UsageError, match="starts=-1"):
        itf.solve(np.ones((2, 2), np.float32), format="int4", starts=-1)


def test_other_formats_are_refused():
    with pytest.raises(UsageError, match="solver 'itf' is not for nvfp4; it is for ternary"):
        SOLVERS["itf"](np.ones((2, 2), np.float32), format="nvfp4")
