"""PT2-LLM: against a plain reference in float64, what each of its steps gains, degenerate input."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from threadpoolctl import threadpool_limits
from weights import relative_error

from qgraph.errors import InputError, UsageError
from qgraph.formats import FORMATS, QTensor
from qgraph.solvers import SOLVERS, group_rtn, itf, pt2_llm
from qgraph.solvers.hessian import damp, output_error


def moment(K: int, tokens: int = 3000, seed: int = 0) -> np.ndarray:
    """Of inputs as layers see them: correlated, of unequal power, with a mean."""
    rng = np.random.default_rng(seed)
    mix = (np.eye(K) + 2 * rng.standard_normal((K, K)) / np.sqrt(K)) * np.exp(rng.standard_normal(K) / 2)
    x = rng.standard_normal((tokens, K)) @ mix + 0.5 * rng.standard_normal(K)
    H = x.T @ x / tokens
    return (H + H.T) / 2


def weight(K: int, N: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((K, N)) * 0.05 + 0.02 * rng.standard_normal(N)).astype(np.float32)


def error(W: np.ndarray, q: QTensor, H: np.ndarray) -> float:
    return output_error(W - q.dequantize(), H) / output_error(W, H)


def reference(W: np.ndarray, H: np.ndarray, damping: float, aga: bool = True) -> np.ndarray:
    """The paper's steps, one column and one block at a time, by the inverse of H; grids stay in float64."""
    K, N = W.shape
    H = H + damping * H.diagonal().mean() * np.eye(K)
    U = np.linalg.cholesky(np.linalg.inv(H)).T  # upper: H^-1 = U^T U
    w, result = W.astype(np.float64), np.empty((K, N))
    for start in range(0, K, 128):
        rows, later = slice(start, min(start + 128, K)), slice(min(start + 128, K), K)
        for n in range(N):
            x = w[rows, n]
            mu = x.mean()
            T = np.sign(x - mu) * (np.abs(x - mu) > 0.75 * np.abs(x - mu).mean())
            for _ in range(50):
                A = np.stack([T, np.ones_like(T)], axis=1)
                alpha, mu = np.linalg.lstsq(A, x, rcond=None)[0]
                following = np.clip(np.rint((x - mu) / alpha), -1, 1)
                if np.array_equal(following, T):
                    break
                T = following
            if aga:
                A = np.stack([T, np.ones_like(T)], axis=1)
                alpha, mu = np.linalg.solve(A.T @ H[rows, rows] @ A, A.T @ H[rows, rows] @ x)
            result[rows, n] = alpha * T + mu
        w[later] -= U[rows, later].T @ np.linalg.solve(U[rows, rows].T, w[rows] - result[rows])
    return result


@pytest.mark.parametrize(("K", "N"), [(128, 12), (300, 8), (172, 6)])
@pytest.mark.parametrize("aga", [0, 1])
def test_it_is_the_paper(K: int, N: int, aga: int):
    """But for float16: a code may flip on a boundary, and later blocks then differ."""
    W, H = weight(K, N), moment(K)
    expected = reference(W, H, 0.1, bool(aga))
    back = pt2_llm.solve(W, H=H, damping=0.1, aga=aga).dequantize()
    close = np.isclose(back, expected, atol=2e-3 * np.abs(W).max())
    assert close[:128].mean() > 0.97 and close.mean() > 0.9
    ours, theirs = output_error(W - back, H), output_error(W - expected, H)
    assert ours == pytest.approx(theirs, rel=0.03)


def test_each_step_gains():
    """The rows of the table in the docs, on correlated inputs with a mean."""
    K, N = 400, 96
    W, H = weight(K, N), moment(K)
    solve = pt2_llm.solve
    rows = [
        group_rtn.solve(W, format="ternary"),
        itf.solve(W, format="ternary", starts=0),
        solve(W, H=H, compensate=False),
        solve(W, H=H),
    ]
    errors = [error(W, q, H) for q in rows]
    assert all(after < 0.97 * before for before, after in pairwise(errors)), errors
    assert errors[-1] < 0.97 * error(W, solve(W, H=H, aga=0), H)
    # AGA alone leaves the codes as they are, and trades weight error for output error.
    assert np.array_equal(rows[1].codes, rows[2].codes)
    assert relative_error(W, rows[2]) > relative_error(W, rows[1])
    assert error(W, solve(W, H=H, starts=1), H) < 1.02 * errors[-1]


def test_what_goes_beyond_the_paper_gains():
    """ITF by the power of inputs, and AGA in turns with rounding, each with and without feedback."""
    W, H = weight(400, 96), moment(400)
    solve = partial(pt2_llm.solve, W, H=H)
    for compensate in (False, True):
        plain, power = (
            error(W, solve(compensate=compensate, aga=0, starts=1, power=power), H) for power in (False, True)
        )
        assert power < 0.97 * plain
        once, turns = (error(W, solve(compensate=compensate, aga=aga), H) for aga in (1, 5))
        assert turns < 0.97 * once


def test_without_either_step_it_is_itf():
    W = weight(200, 40)
    q = pt2_llm.solve(W, H=moment(200), compensate=False, aga=0)
    expected = itf.solve(W, format="ternary", starts=0)
    assert np.array_equal(q.codes, expected.codes)
    assert q.block_scale.tobytes() == expected.block_scale.tobytes()
    assert q.block_offset.tobytes() == expected.block_offset.tobytes()


@pytest.mark.parametrize("format", ["ternary", "int2", "int4", "int4-sym"])
def test_no_turn_of_aga_raises_the_error_of_a_block(format: str):
    W, H = weight(200, 60), moment(200)
    damped = damp(H, 0.1)
    results = [
        pt2_llm.solve(W, format=format, H=H, compensate=False, aga=aga).dequantize().astype(np.float64)
        for aga in (0, 1, 2, 3, 8)
    ]
    size = FORMATS[format].block
    blocks = [slice(k, min(k + size, 200)) for k in range(0, 200, size)]
    errors = [
        np.stack([((W - b)[rows] * (damped[rows, rows] @ (W - b)[rows])).sum(axis=0) for rows in blocks])
        for b in results
    ]
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-9)).all()
    assert errors[1].sum() < 0.98 * errors[0].sum() and errors[2].sum() < 0.99 * errors[1].sum()


@pytest.mark.parametrize("K", [1, 2, 127, 129, 172, 200, 256])
def test_every_number_of_inputs(K: int):
    W, H = weight(K, 5), moment(K)
    q = SOLVERS["pt2-llm"](W, H=H, tokens=3000)
    assert q.format == "ternary" and q.block_scale.shape == (-(-K // 128), 5)
    assert error(W, q, H) <= error(W, itf.solve(W, format="ternary", starts=0), H) + 1e-6


def test_inputs_that_calibration_never_saw():
    """They are rounded as they are, and disturb nobody."""
    K = 200
    W, H = weight(K, 30), moment(K)
    dead = np.arange(150, 200)
    H[dead] = 0
    H[:, dead] = 0
    q = pt2_llm.solve(W, H=H)
    assert np.isfinite(q.dequantize()).all()
    live = slice(0, 128)
    alone = pt2_llm.solve(W[live], H=np.ascontiguousarray(H[live, live]) * 1, damping=0.1)
    assert error(W[live], alone, H[live, live]) < 0.2
    seen = W.astype(np.float64) - q.dequantize()
    assert ((seen[dead] ** 2).sum() / (W[dead].astype(np.float64) ** 2).sum()) < 0.35


def test_without_any_input_it_is_itf():
    W = weight(172, 30)
    q = pt2_llm.solve(W, H=np.zeros((172, 172)))
    expected = itf.solve(W, format="ternary", starts=0)
    assert np.array_equal(q.codes, expected.codes) and np.array_equal(q.block_scale, expected.block_scale)


def test_singular_moments():
    """One token, and inputs that are all the same: H has rank 1, and only damping separates them."""
    W = weight(172, 30)
    for x in (np.random.default_rng(0).standard_normal(172), np.ones(172)):
        H = np.outer(x, x)
        for damping in (0.0, 0.1):
            q = pt2_llm.solve(W, H=H, damping=damping)
            assert np.isfinite(q.dequantize()).all()
            assert error(W, q, H) < 0.01


def test_threads_do_not_matter():
    W, H = weight(300, 600), moment(300)
    first = pt2_llm.solve(W, H=H, threads=1)
    with threadpool_limits(2):
        others = [pt2_llm.solve(W, H=H, threads=t) for t in (2, 3)]
    for q in others:
        assert np.array_equal(q.codes, first.codes)
        assert q.block_scale.tobytes() == first.block_scale.tobytes()
        assert q.block_offset.tobytes() == first.block_offset.tobytes()


@pytest.mark.parametrize("format", ["int2", "int4", "int4-sym"])
def test_other_formats_by_the_same_steps(format: str):
    """Not in the table of solvers, but the ablation needs them."""
    W, H = weight(200, 40), moment(200)
    q = pt2_llm.solve(W, format=format, H=H)
    assert q.format == format
    assert error(W, q, H) < error(W, itf.solve(W, format=format, starts=0), H)


@pytest.mark.parametrize("options", [{"damping": -1.0}, {"damping": np.nan}, {"starts": -1}, {"aga": -1}])
def test_bad_options_are_refused(options: dict):
    with pytest.raises(UsageError, match="pt2-llm: "):
        pt2_llm.solve(weight(8, 2), H=np.eye(8), **options)


@pytest.mark.parametrize("H", [np.full((8, 8), np.nan), np.eye(7), np.eye(8, dtype=np.float32), -np.eye(8)])
def test_what_is_no_moment_is_refused_by_name(H: np.ndarray):
    with pytest.raises(InputError, match="weight 'w'"):
        pt2_llm.solve(weight(8, 2), H=H, name="w")
