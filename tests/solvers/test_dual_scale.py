"""Dual scales: the alternation step by step, what c is worth, and weights that leave it nothing to go by."""

from __future__ import annotations

import numpy as np
import pytest

from qgraph.errors import InputError, UsageError
from qgraph.formats import FORMATS
from qgraph.solvers import GROUP_NAMES, get_solver
from qgraph.solvers.balance import LIMIT, balanced
from qgraph.solvers.dual_scale import Alternation, channel_scales

LOW = ("ternary", "int2", "int3")


def uneven(K: int, N: int, spread: float = 1.0, seed: int = 0) -> np.ndarray:
    """Normal weights whose rows have log-normal ranges."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((K, N)) * np.exp(spread * rng.standard_normal((K, 1)))).astype(np.float32)


def error(W: np.ndarray, c: np.ndarray, format: str) -> float:
    """|W - diag(c) W'|^2 / |W|^2 with W' for W / c by `itf`."""
    back = get_solver("itf")(W / c[:, None], format=format, threads=1).dequantize()
    return float(np.square(W - c[:, None] * back).sum() / np.square(W).sum())


@pytest.mark.parametrize("format", GROUP_NAMES)
@pytest.mark.parametrize("shape", [(172, 64), (200, 33), (128, 16), (5, 40)])
def test_no_turn_raises_the_error(format: str, shape: tuple[int, int]):
    W = uneven(*shape)
    state = Alternation(W, format, np.arange(len(W), dtype=np.int32), len(W), threads=1)
    state.run(12)
    assert len(state.errors) >= 2
    assert (np.diff(state.errors) <= 1e-6 * state.errors[0]).all()
    assert state.errors[-1] < state.errors[0]


def test_a_turn_is_that_of_the_paper():
    """Against plain loops: c_k = <W_k, Q_k> / <Q_k, Q_k>, the grid by weighted least squares."""
    W = uneven(6, 3, spread=0.3)
    state = Alternation(W, "int2", np.arange(6, dtype=np.int32), 6, threads=1)
    state.grids = [state._first_grid(part) for part in state.parts]
    c, (scale, offset) = state.c.copy(), state.grids[0]
    Q = np.empty(W.shape)
    for n in range(3):
        V = W[:, n] / c
        t = np.clip(np.rint((V - offset[n]) / scale[n]), 0, 3)
        A = np.stack([t, np.ones(6)], axis=1)
        s, m = np.linalg.solve(A.T @ (c[:, None] ** 2 * A), A.T @ (c**2 * V))
        Q[:, n] = s * t + m
    state.turn()
    np.testing.assert_allclose(state.errors, np.square(W - c[:, None] * Q).sum(), rtol=1e-2)
    np.testing.assert_allclose(state.c, (W * Q).sum(axis=1) / (Q * Q).sum(axis=1), rtol=1e-2)


@pytest.mark.parametrize("format", LOW)
def test_rows_of_different_range(format: str):
    """The start already gains, the turns more."""
    W = uneven(256, 96, spread=0.5)
    errors = [error(W, np.ones(256, np.float32), format)]
    errors += [error(W, channel_scales(W, format, rounds=rounds, threads=1), format) for rounds in (0, 10)]
    assert errors[1] < 0.9 * errors[0] and errors[2] < 0.99 * errors[1], errors


@pytest.mark.parametrize("format", LOW)
def test_scales_that_were_put_in_are_found(format: str):
    rng = np.random.default_rng(3)
    levels = len(FORMATS[format].values)
    Q = rng.integers(0, levels, (128, 48)) - (levels - 1) / 2 + rng.normal(0, 0.02, (128, 48))
    c = balanced(0.8 * rng.standard_normal(128), np.ones(128, bool))
    W = (c[:, None] * Q).astype(np.float32)
    found = channel_scales(W, format, rounds=30, threads=1)
    np.testing.assert_allclose(found, c, rtol=0.03)
    assert error(W, found, format) < 2e-3 < 0.02 < error(W, np.ones_like(c), format)


def test_columns_count_as_much_as_they_are_large():
    W = uneven(128, 64)
    small = W.copy()
    small[:, ::2] = uneven(128, 32, seed=1) / 1000  # other ranges, which hardly matter
    half = channel_scales(np.ascontiguousarray(W[:, 1::2]), "int2", threads=1)
    np.testing.assert_allclose(channel_scales(small, "int2", threads=1), half, rtol=0.02)


def test_rows_that_share_a_channel():
    W = uneven(160, 32)
    channels = np.tile(np.arange(40, dtype=np.int32), 4)
    c = channel_scales(W, "int3", channels=channels, count=43, threads=1)
    assert c.shape == (43,) and (c[40:] == 1).all()
    folded = W.reshape(4, 40, 32).transpose(1, 0, 2).reshape(40, 128)
    start = channel_scales(folded, "int3", rounds=0)
    np.testing.assert_array_equal(
        channel_scales(W, "int3", channels=channels, count=40, rounds=0, threads=1), start
    )
    tied = c[channels]
    assert error(W, tied, "int3") < error(W, np.ones(160, np.float32), "int3")


# -- weights that leave it nothing to go by -----------------------------------------------------------------


def degenerate() -> dict[str, np.ndarray]:
    zero_rows = uneven(140, 24)
    zero_rows[[3, 130]] = 0
    outlier = uneven(140, 24, spread=0.1)
    outlier[7, 5] = 1e4
    tiny = uneven(140, 24) * np.float32(1e-30)
    wild = uneven(140, 24) * np.exp2(np.linspace(-60, 10, 140, dtype=np.float32))[:, None]
    alike = np.full((140, 24), 0.25, np.float32)
    return {
        "zero rows": zero_rows,
        "zero": np.zeros((140, 24), np.float32),
        "outlier": outlier,
        "tiny": tiny,
        "wild": wild,
        "alike": alike,
        "one row": uneven(1, 24),
        "one column": uneven(140, 1),
        "zero columns": uneven(140, 24) * (np.arange(24) % 2).astype(np.float32),
    }


@pytest.mark.parametrize("format", ["ternary", "int2", "int4", "int4-sym"])
@pytest.mark.parametrize("case", degenerate())
def test_positive_and_finite(case: str, format: str):
    W = degenerate()[case]
    with np.errstate(all="raise", under="ignore"):
        c = channel_scales(W, format, threads=1)
    assert c.dtype == np.float32 and c.shape == (len(W),)
    assert (c >= 1 / LIMIT).all() and (c <= LIMIT).all()
    live = W.any(axis=1)
    assert (c[~live] == 1).all()
    if case != "wild":
        assert abs(np.log2(c[live]).mean() if live.any() else 0) < 0.01
    if case in ("zero", "alike", "one row"):
        np.testing.assert_allclose(c, 1, rtol=0.01)
    if case in ("zero rows", "wild"):
        assert error(W, c, format) <= 1.001 * error(W, np.ones_like(c), format)


@pytest.mark.parametrize("threads", [2, 3, None])
def test_threads_change_nothing(threads: int | None):
    W = uneven(700, 48)
    one = channel_scales(W, "ternary", threads=1)
    np.testing.assert_array_equal(channel_scales(W, "ternary", threads=threads), one)


def test_refusals():
    with pytest.raises(UsageError, match="not nvfp4"):
        channel_scales(uneven(16, 4), "nvfp4")
    bad = uneven(16, 4)
    bad[2, 3] = np.nan
    with pytest.raises(InputError, match="'w' holds 1 values"):
        channel_scales(bad, "int2", name="w")
    with pytest.raises(InputError, match="float16"):
        channel_scales(np.full((16, 4), 1e6, np.float32), "int2")
