"""SOAR against the alternation written out block by block, and its relation to the exact sweep."""

from __future__ import annotations

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import GRID, SCALES, awkward, relative_error

from qgraph.formats import QTensor, e4m3
from qgraph.solvers import SOLVERS, soar
from qgraph.solvers.sweep import best_block_scales

FIRST = 0.9 * (1.75 / 0.9) ** (np.arange(10) / 9)


def e2m1(v: np.ndarray) -> np.ndarray:
    return v.astype(np.float32).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)


def naive_soar(W: np.ndarray) -> np.ndarray:
    """The dequantized weight of CJSO and DSS, in float64, every dd tried."""
    K, N = W.shape
    blocks = [np.abs(W[k : k + 16, n].astype(np.float64)) for k in range(0, K, 16) for n in range(N)]
    a = float(np.abs(W).max()) / (6 * 256)
    q = [np.zeros_like(w) for w in blocks]
    dd = np.ones(len(blocks))
    last = np.inf
    for turn in range(6):
        if turn:
            wq = sum(d * (w @ c) for w, c, d in zip(blocks, q, dd, strict=True))
            a = wq / sum(d * d * (c @ c) for c, d in zip(q, dd, strict=True))
        error = 0.0
        for i, w in enumerate(blocks):
            if not w.any():
                continue
            if turn:
                ideal = (w @ q[i]) / (a * (q[i] @ q[i]))
                trials = [q[i], *(e2m1(w / (a * ideal * f)) for f in (0.97, 1.03))]
            else:
                trials = [e2m1(w / (w.max() / 6 * f)) for f in FIRST]
            errors = np.array([[((w - a * d * c) ** 2).sum() for d in SCALES] for c in trials])
            best = np.unravel_index(errors.argmin(), errors.shape)
            q[i], dd[i] = trials[best[0]], SCALES[best[1]]
            error += errors[best]
        if turn and last - error <= 1e-4 * last:
            break
        last = error
    back = iter(a * d * c for c, d in zip(q, dd, strict=True))
    result = np.zeros((K, N))
    for k in range(0, K, 16):
        for n in range(N):
            result[k : k + 16, n] = next(back)
    return np.copysign(result, W)


@pytest.mark.parametrize("seed", range(3))
def test_soar_is_the_alternation(seed: int):
    rng = np.random.default_rng(seed)
    W = rng.standard_t(2 + 3 * seed, (40, 7)).astype(np.float32)
    W[:16, 3] = 0
    assert np.allclose(SOLVERS["soar"](W).dequantize(), naive_soar(W), rtol=1e-5, atol=0)


@pytest.mark.parametrize("distribution", ["normal", "t4"])
def test_soar_is_within_1_percent_of_the_exact_optimum(distribution: str):
    rng = np.random.default_rng(1)
    W = (
        rng.standard_normal((256, 512)) if distribution == "normal" else rng.standard_t(4, (256, 512))
    ).astype(np.float32)
    assert relative_error(W, SOLVERS["soar"](W)) < 1.01 * relative_error(W, SOLVERS["sweep"](W))


def test_rounds_never_raise_the_error(monkeypatch: pytest.MonkeyPatch):
    for W in (awkward(), np.random.default_rng(2).standard_t(3, (64, 40)).astype(np.float32)):
        monkeypatch.setattr(soar, "MIN_GAIN", -1)
        errors = []
        for rounds in range(1, 7):
            monkeypatch.setattr(soar, "MAX_ROUNDS", rounds)
            errors.append(relative_error(W, soar.solve(W)))
        assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
        assert errors[-1] < errors[0]


def block_error(w: np.ndarray, a: float, dq: float, dd: float) -> float:
    """|w - a dd E2M1(w / (a dq))|^2 in float64."""
    nearest = GRID[np.abs(w[:, None] / (a * dq) - GRID).argmin(axis=1)]
    return float(((w - a * dd * nearest) ** 2).sum())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    freedom=st.floats(0.7, 30),
    log_scale=st.floats(-6, 6),
    factor=st.floats(0.3, 3),
    dd_code=st.integers(1, 126),
)
def test_no_decoupled_pair_beats_the_sweep(
    seed: int, freedom: float, log_scale: float, factor: float, dd_code: int
):
    """At the same a: sweep(a) <= nearest rounding at a dd <= any codes with dd, so those of (dq, dd)."""
    rng = np.random.default_rng(seed)
    block = (rng.standard_t(freedom, (16, 1)) * 10**log_scale).astype(np.float32)
    w = np.abs(block[:, 0].astype(np.float64))
    a = np.float32(w.max() / rng.uniform(1, 6 * 448))
    best = SCALES[best_block_scales(block, a)[0] - 1]
    exact = block_error(w, float(a), best, best)
    near = SCALES[np.abs(SCALES - w.max() / float(a) / 5).argmin()]  # a dd where the optimum often is
    for dd in (SCALES[dd_code - 1], best, near):
        coupled = block_error(w, float(a), dd, dd)
        assert coupled <= block_error(w, float(a), factor * dd, dd) * (1 + 1e-12)
        assert np.sqrt(exact) <= np.sqrt(coupled) + 2e-7 * np.linalg.norm(w)


def test_the_sweep_bounds_soar_at_its_own_global_scale():
    """For the `a` that SOAR ends with, the best scale of every block is at least as good as SOAR's."""
    W = np.random.default_rng(3).standard_normal((64, 50)).astype(np.float32)
    q = SOLVERS["soar"](W)
    for b in range(4):
        part = W[16 * b : 16 * b + 16]
        d = e4m3.from_codes(best_block_scales(part, q.global_scale))[None]
        exact = QTensor("nvfp4", part.shape, _nearest(part, d, q.global_scale), d, q.global_scale)
        ours = ((part - q.dequantize()[16 * b : 16 * b + 16]).astype(np.float64) ** 2).sum(axis=0)
        least = ((part - exact.dequantize()).astype(np.float64) ** 2).sum(axis=0)
        assert (least <= ours * (1 + 1e-5)).all()


def _nearest(W: np.ndarray, d: np.ndarray, a: np.float32) -> np.ndarray:
    return (W / (d.astype(np.float32) * a)).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
