"""The weighted sweep as a calibrated solver: what it makes of H."""

from __future__ import annotations

import numpy as np
import pytest
from weights import assert_optimal, awkward, block_errors

from qgraph.errors import InputError, UsageError
from qgraph.solvers import SOLVERS

SOLVER = SOLVERS["sweep-diagonal"]


def second_moment(K: int, sigma: float = 1.0, tokens: int = 400) -> np.ndarray:
    """Of correlated channels of log-normal power."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, K)) * np.exp(sigma * rng.standard_normal(K)) + rng.standard_normal(
        (tokens, 1)
    )
    return x.T @ x / tokens


def test_optimal_for_the_damped_diagonal():
    W, H = awkward(), second_moment(80)
    h = np.diag(H) + 0.01 * np.diag(H).mean()
    assert_optimal(W, SOLVER(W, H=H), h)


def test_lowers_the_weighted_error():
    W = np.random.default_rng(1).standard_normal((256, 64)).astype(np.float32)
    H = second_moment(256)
    ours, plain = (block_errors(W, q, np.diag(H)).sum() for q in (SOLVER(W, H=H), SOLVERS["sweep"](W)))
    assert ours < 0.8 * plain


@pytest.mark.parametrize("H", [np.eye(80), 3e7 * np.eye(80), 1e-300 * np.eye(80), np.zeros((80, 80))])
def test_channels_of_equal_power_are_the_plain_sweep(H: np.ndarray):
    W = awkward()
    ours, plain = SOLVER(W, H=H), SOLVERS["sweep"](W)
    assert ours.global_scale == plain.global_scale
    assert np.array_equal(ours.codes, plain.codes)
    assert ours.block_scale.tobytes() == plain.block_scale.tobytes()


def test_only_the_diagonal_is_read():
    W, H = awkward(), second_moment(80)
    assert np.array_equal(SOLVER(W, H=H).codes, SOLVER(W, H=np.diag(np.diag(H))).codes)


def test_a_dead_channel_still_counts_a_little():
    """One that calibration never reached is neither the block's measure nor lost."""
    W = np.random.default_rng(2).standard_normal((16, 50)).astype(np.float32)
    H = np.eye(16)
    H[3, 3] = 0
    W[3] = 1000
    q = SOLVER(W, H=H)
    assert (np.abs(q.dequantize()[3] - 1000) < 400).all()


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_second_moments_of_low_rank(rank: int):
    x = np.random.default_rng(3).standard_normal((rank, 80))
    W = awkward()
    q = SOLVER(W, H=x.T @ x)
    assert np.isfinite(q.dequantize()).all()


@pytest.mark.parametrize(
    ("H", "message"),
    [
        (np.eye(79), r"weight 'w' \[80, 24\] needs a second moment \[K, K\], not \[79, 79\]"),
        (np.diag(np.r_[np.nan, np.ones(79)]), "'w' is negative or not finite on its diagonal"),
        (np.diag(np.r_[np.inf, np.ones(79)]), "'w' is negative or not finite on its diagonal"),
        (np.diag(np.r_[-1, np.ones(79)]), "'w' is negative or not finite on its diagonal"),
    ],
)
def test_what_is_no_second_moment_is_refused(H: np.ndarray, message: str):
    with pytest.raises(InputError, match=message):
        SOLVER(awkward(), H=H, name="w")


def test_needs_calibration():
    with pytest.raises(UsageError, match="'sweep-diagonal' needs calibration data"):
        SOLVER(awkward())
