"""Grids of group formats: against brute force, numpy's least squares, and gradients in float64."""

from __future__ import annotations

import numpy as np
import pytest

from qgraph.errors import InputError
from qgraph.formats import FORMATS, BlockFormat
from qgraph.formats.group import GROUP_FORMATS
from qgraph.solvers import group_grid
from qgraph.solvers.group_grid import Grid

every_format = pytest.mark.parametrize("spec", GROUP_FORMATS, ids=lambda spec: spec.name)


def block(spec: BlockFormat, n: int = 60, rows: int | None = None, seed: int = 0) -> np.ndarray:
    """Weights [b, n] of several kinds."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((rows or spec.block, n)) * 0.05
    W[:, 1::4] += 0.1
    W[:, 2::4] = rng.standard_t(3, W[:, 2::4].shape)
    return W.astype(np.float32)


def random_grid(spec: BlockFormat, n: int, seed: int = 0) -> Grid:
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.uniform(-12, 6, n))
    if spec.offset == "zero_point":
        offset = -rng.choice(spec.values, n) * scale
    else:
        offset = rng.standard_normal(n) * scale * 3
    return group_grid.project(spec, scale, offset)


def error(W: np.ndarray, back: np.ndarray, H: np.ndarray | None = None) -> np.ndarray:
    D = W.astype(np.float64) - back
    return (D * (D if H is None else H @ D)).sum(axis=0)


def moment(rows: int, seed: int = 3) -> np.ndarray:
    """Of inputs with a mean, so that H has a strong first eigenvector."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * rows + 8, rows)) * rng.uniform(0.3, 2, rows) + rng.standard_normal(rows)
    return x.T @ x / len(x)


def float16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float64)


@every_format
def test_a_grid_is_what_is_stored(spec: BlockFormat):
    grid = random_grid(spec, 500)
    assert (grid.scale > 0).all() and np.array_equal(grid.scale, float16(grid.scale))
    codes = np.random.default_rng(1).integers(0, len(spec.values), (spec.block, 500)).astype(np.uint8)
    q = group_grid.assemble(spec, codes, *(part[None] for part in grid))
    assert q.dequantize().tobytes() == group_grid.values(spec, codes, grid).tobytes()
    assert np.array_equal(q.block_scale[0], grid.scale)


@every_format
def test_projecting_clips_to_float16_and_drops_the_sign(spec: BlockFormat):
    grid = group_grid.project(
        spec, np.array([-2, 1e9, 1e-9, 0, 0.1]), np.array([-3, 0, 0, -1e6, 0.1], np.float64)
    )
    assert np.array_equal(grid.scale, np.float32([2, 65504, 2**-24, 2**-24, np.float16(0.1)]))
    assert np.isfinite(grid.offset).all()
    expected = {"none": [0, 0], "mean": [-3, -65504], "zero_point": [-4, -15 * 2**-24]}[spec.offset]
    assert np.array_equal(grid.offset[[0, 3]], np.float32(expected))


@every_format
def test_nearest_is_nearest(spec: BlockFormat):
    W, grid = block(spec), random_grid(spec, 60, seed=4)
    grid = grid._replace(scale=np.maximum(grid.scale, np.float32(2**-10)))
    if spec.offset == "zero_point":
        grid = group_grid.project(spec, grid.scale, -spec.values[7] * grid.scale)
    codes = group_grid.nearest(spec, W, grid)
    every = spec.values.astype(np.float64)[:, None, None] * grid.scale + grid.offset
    distance = np.abs(W - every)
    chosen = np.take_along_axis(distance, codes[None].astype(np.intp), axis=0)[0]
    noise = 1e-6 * (np.abs(W) + np.abs(grid.offset))
    assert codes.dtype == np.uint8 and (chosen <= distance.min(axis=0) + noise).all()


@every_format
def test_ties_go_to_the_even_level_and_the_rest_to_the_ends(spec: BlockFormat):
    grid = group_grid.project(spec, np.ones(1), np.zeros(1))
    low, high = spec.values[[0, -1]]
    W = np.array([[low - 9], [low + 0.5], [low + 1.5], [high + 1e4]], np.float32)
    levels = group_grid.values(spec, group_grid.nearest(spec, W, grid), grid)[:, 0]
    middle = [low + 0.5, low + 1.5]
    assert levels[0] == low and levels[3] == high
    assert list(levels[1:3]) == list(np.rint(middle)) and not (levels[1:3] % 2).any()


@every_format
def test_initial_ends_at_the_extremes(spec: BlockFormat):
    W = block(spec)
    grid, codes = group_grid.initial(spec, W)
    back = group_grid.values(spec, codes, grid)
    if spec.name == "ternary":
        mu = W.mean(axis=0)
        v = W - mu
        T = np.sign(v) * (np.abs(v) > 0.75 * np.abs(v).mean(axis=0))
        alpha = (v * T).sum(axis=0) / np.abs(T).sum(axis=0)
        assert np.array_equal(codes, T + 1)
        np.testing.assert_allclose(grid, [alpha, mu], rtol=6e-4, atol=1e-7)
        return
    step = grid.scale
    if spec.offset == "none":
        np.testing.assert_allclose(step, np.abs(W).max(axis=0) / spec.values[-1], rtol=6e-4)
    else:
        low, high = W.min(axis=0), W.max(axis=0)
        if spec.offset == "zero_point":
            low, high = np.minimum(low, 0), np.maximum(high, 0)
        np.testing.assert_allclose(step, (high - low) / (len(spec.values) - 1), rtol=6e-4)
    # Within half a step, or nearly a whole one where the zero point had to be rounded, and float16's share.
    most = 1.01 if spec.offset == "zero_point" else 0.51
    assert (np.abs(back - W) <= most * step + np.abs(W).max(axis=0) * 2**-9).all()


def least_squares(spec: BlockFormat, W: np.ndarray, t: np.ndarray, h: np.ndarray) -> tuple[float, float]:
    """(scale, offset) of one column by numpy.linalg.lstsq; rows weighted by h."""
    root = np.sqrt(h)

    def solve(A: np.ndarray) -> tuple[np.ndarray, float]:
        x = np.linalg.lstsq(A * root[:, None], W * root, rcond=None)[0]
        return x, float((h * (W - A @ x) ** 2).sum())

    if spec.offset == "mean":
        x, _ = solve(np.stack([t, np.ones_like(t)], axis=1))
        return x[0], x[1]
    if spec.offset == "none":
        return solve(t[:, None])[0][0], 0.0
    found = [(solve((t - z)[:, None]), z) for z in spec.values.astype(np.float64)]
    ((x, _), z) = min((f for f in found if f[0][0][0] > 0), key=lambda f: f[0][1])
    return x[0], -z * x[0]


@every_format
@pytest.mark.parametrize("weighted", [False, True])
def test_fit_is_the_least_squares_optimum(spec: BlockFormat, weighted: bool):
    W = block(spec, 24, rows=spec.block - 3)
    h = np.random.default_rng(2).uniform(0.1, 3, len(W)) if weighted else np.ones(len(W))
    start, codes = group_grid.initial(spec, W)
    grid = group_grid.fit(spec, W, codes, start, h if weighted else None)
    before, after = (
        (h[:, None] * (W - group_grid.values(spec, codes, g).astype(np.float64)) ** 2).sum(axis=0)
        for g in (start, grid)
    )
    assert (after <= before * (1 + 1e-6)).all()
    changed = (grid.scale != start.scale) | (grid.offset != start.offset)
    assert changed.mean() > (0.5 if len(spec.values) < 256 else 0.1)
    for n in np.flatnonzero(changed):
        t = spec.values[codes[:, n]].astype(np.float64)
        s, o = least_squares(spec, W[:, n].astype(np.float64), t, h)
        assert grid.scale[n] == pytest.approx(float16(np.array(s)), rel=2e-6)
        if spec.offset == "mean":  # the best for the scale as stored
            o = (h * (W[:, n] - grid.scale[n].astype(np.float64) * t)).sum() / h.sum()
            assert grid.offset[n] == pytest.approx(float16(np.array(o)), rel=2e-6)
        else:
            assert grid.offset[n] == -round(-o / s) * grid.scale[n]


@every_format
@pytest.mark.parametrize("rows", [None, 44, 5])
def test_aga_has_no_gradient_and_no_better_neighbour(spec: BlockFormat, rows: int | None):
    """Before rounding to float16: d/ds and d/do of (w - s t - o)^T H (w - s t - o) are zero."""
    W = block(spec, 30, rows=rows, seed=5).astype(np.float64)
    H = moment(len(W))
    start, codes = group_grid.initial(spec, W.astype(np.float32))
    t = spec.values[codes].astype(np.float64)
    # Where a short block's best scale is not positive the start's is kept: not what is looked at here.
    s, o = group_grid.optimum(spec, start, group_grid.hessian_moments(spec, W, codes, start, H))
    free = s != start.scale
    assert free.mean() > 0.8 and (s > 0).all()
    residual = W - (t * s + o)
    if spec.offset == "zero_point":  # o = -z s moves with s
        z = -o / s
        np.testing.assert_allclose(z, np.rint(z), atol=1e-9)
        t = t - np.rint(z)
    at_t, at_1 = (t * (H @ residual)).sum(axis=0), (H @ residual).sum(axis=0)
    size = (t * (H @ t)).sum(axis=0) * s
    assert (np.abs(at_t)[free] <= 1e-9 * size[free]).all()
    if spec.offset == "mean":
        assert (np.abs(at_1) <= 1e-9 * H.sum() * s).all()

    best, rng = error(W, W - residual, H), np.random.default_rng(0)
    for size in (1e-3, 0.03, 0.5):
        for _ in range(20):
            other = s * (1 + size * rng.standard_normal(len(s)))
            shift = size * s * rng.standard_normal(len(s)) if spec.offset == "mean" else 0
            back = t * other + shift + (o if spec.offset == "mean" else 0)
            assert (error(W, back, H)[free] >= best[free]).all()


@every_format
def test_zero_points_are_all_tried(spec: BlockFormat):
    if spec.offset != "zero_point":
        return
    W, H = block(spec, 30, seed=6), moment(spec.block)
    start, codes = group_grid.initial(spec, W)
    grid = group_grid.fit_hessian(spec, W, codes, start, H)
    found = error(W, group_grid.values(spec, codes, grid), H)
    for z in spec.values:
        t = (spec.values[codes] - z).astype(np.float64)
        s = (t * (H @ W)).sum(axis=0) / (t * (H @ t)).sum(axis=0)
        stored = float16(s)
        assert (found <= error(W, t * stored, H) * (1 + 1e-5)).all()


@every_format
def test_aga_is_stored_only_where_it_is_better(spec: BlockFormat):
    W, H = block(spec, 200, seed=7), moment(spec.block)
    start, codes = group_grid.initial(spec, W)
    for _ in range(3):
        grid = group_grid.fit_hessian(spec, W, codes, start, H)
        before, after = (error(W, group_grid.values(spec, codes, g), H) for g in (start, grid))
        assert (after <= before * (1 + 1e-9)).all()
        same = (grid.scale == start.scale) & (grid.offset == start.offset)
        assert (after < before)[~same].all()
        start = grid


@every_format
def test_singular_systems_keep_the_scale(spec: BlockFormat):
    """H = 0, inputs that are all one, and levels that are all alike leave the scale of `mean` open."""
    rows = spec.block
    W = block(spec, 8)
    start, codes = group_grid.initial(spec, W)
    kept = group_grid.fit_hessian(spec, W, codes, start, np.zeros((rows, rows)))
    assert all(np.array_equal(a, b) for a, b in zip(kept, start, strict=True))
    same = np.full_like(codes, 2 if spec.offset != "mean" else 1)
    for H in (np.ones((rows, rows)), np.eye(rows)):
        grid = group_grid.fit_hessian(spec, W, same, start, H)
        before, after = (error(W, group_grid.values(spec, same, g), H) for g in (start, grid))
        assert np.isfinite(grid).all() and (grid.scale > 0).all() and (after <= before).all()
        if spec.offset == "mean":
            assert np.array_equal(grid.scale, start.scale)
            np.testing.assert_allclose(
                grid.offset, W.mean(axis=0) - spec.values[1] * grid.scale, rtol=6e-4, atol=1e-6
            )


@every_format
def test_a_best_scale_that_is_negative_is_not_taken(spec: BlockFormat):
    W = block(spec, 8)
    W -= W.mean(axis=0)
    start, codes = group_grid.initial(spec, W)
    grid = group_grid.fit(spec, -W, codes, start)
    assert (grid.scale > 0).all()
    before, after = (error(-W, group_grid.values(spec, codes, g)) for g in (start, grid))
    assert (after <= before).all()


@every_format
@pytest.mark.parametrize("rows", [1, 2, 31])
def test_degenerate_blocks(spec: BlockFormat, rows: int):
    """All zero, all alike, one row: close to the weights, and nothing divides by zero."""
    W = np.zeros((rows, 6), np.float32)
    W[:, 1:4] = [0.3, -7, 2e-6]
    W[0, 4], W[0, 5] = 1, -65504
    with np.errstate(all="raise", under="ignore"):
        grid, codes = group_grid.initial(spec, W)
        grid = group_grid.fit(spec, W, codes, grid)
        grid = group_grid.fit_hessian(spec, W, codes, grid, moment(rows))
        back = group_grid.values(spec, group_grid.nearest(spec, W, grid), grid)
    assert np.array_equal(back[:, 0], np.zeros(rows))
    # The spacing of float16 is 2^-24 near zero, and so may cost half of that a level.
    assert (np.abs(back - W)[:, :4] <= 1e-3 * np.abs(W[:, :4]) + 2**-22).all()
    if rows == 1 or spec.name == "ternary":
        assert (np.abs(back - W) <= 2e-3 * np.abs(W).max(axis=0) + 2**-22).all()


@every_format
def test_zero_blocks_are_stored_with_scale_one(spec: BlockFormat):
    scale = np.float32([[0.25, 0.5]])
    grid = group_grid.project(spec, scale[0], np.zeros(2))
    zero = np.uint8(-spec.values[0])
    codes = np.full((spec.block, 2), zero)
    codes[3, 1] += 1
    q = group_grid.assemble(spec, codes, scale, grid.offset[None])
    assert list(q.block_scale[0]) == [1, 0.5]
    assert not q.dequantize()[:, 0].any() and q.dequantize()[3, 1] == 0.5
    if spec.offset == "zero_point":
        assert list(q.block_offset[0]) == [0, 0]


@every_format
@pytest.mark.parametrize("shape", [(1, 3), (172, 5), (200, 700), (129, 2), (2048, 1)])
def test_blocks_reach_their_place(spec: BlockFormat, shape: tuple[int, int]):
    """Every block alone gives the same as all together, whatever the tiles."""
    W = np.random.default_rng(9).standard_normal(shape).astype(np.float32)
    q = group_grid.solve_blocks(spec, W, lambda X: group_grid.initial(spec, X), threads=2)
    for start in range(0, shape[0], spec.block):
        rows = slice(start, start + spec.block)
        grid, codes = group_grid.initial(spec, np.ascontiguousarray(W[rows]))
        assert np.array_equal(q.codes[rows], codes)
        assert q.dequantize()[rows].tobytes() == group_grid.values(spec, codes, grid).tobytes()


def test_what_float16_cannot_hold_is_refused_by_name():
    group_grid.check_group_weight(np.full((2, 2), -65504, np.float32), "w")
    with pytest.raises(InputError, match=r"weight 'w' reaches 6\.6e\+04, beyond the 6\.55e\+04 that scales"):
        group_grid.check_group_weight(np.full((2, 2), -66000, np.float32), "w")


def test_every_group_format_is_known():
    assert all(FORMATS[spec.name] is spec for spec in GROUP_FORMATS)
