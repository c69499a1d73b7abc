"""GPTQ: against a plain reference in float64, its guarantees, degenerate input, determinism."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from calibrated import broken, every_broken, inputs, moment, weight
from threadpoolctl import threadpool_limits
from weights import awkward, relative_error

from qgraph.errors import InputError, UsageError
from qgraph.formats import QTensor, e4m3
from qgraph.solvers import SOLVERS, gptq
from qgraph.solvers.gptq_search import SCALE
from qgraph.solvers.hessian import damp, output_error

PLAIN = {"order": False, "beams": 1, "rounds": 0}


def error(W: np.ndarray, q: QTensor, H: np.ndarray, damping: float = 0.03) -> float:
    """What gptq minimises, relative to W's own."""
    H = damp(H, damping)
    return output_error(W - q.dequantize(), H) / output_error(W, H)


def reference(W: np.ndarray, H: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """GPTQ as its paper has it, row by row, by the inverse of H; amax scales. (codes, scale bits)."""
    K, N = W.shape
    a = float(np.float32(np.abs(W).max() / (6 * 256)))
    H = H + damping * H.diagonal().mean() * np.eye(K)
    U = np.linalg.cholesky(np.linalg.inv(H)).T  # upper: H^-1 = U^T U
    w = W.astype(np.float64) / a
    codes, bits = np.zeros((K, N), np.uint8), np.zeros((-(-K // 16), N), np.uint8)
    for k in range(K):
        if k % 16 == 0:
            d = np.abs(w[k : k + 16]).max(axis=0) / 6
            bits[k // 16] = np.clip(d, 2**-9, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        d = SCALE[bits[k // 16]].astype(np.float64)
        q = np.clip(w[k] / d, -6, 6).astype(ml_dtypes.float4_e2m1fn)
        codes[k] = q.view(np.uint8)
        codes[k][codes[k] == 8] = 0
        w[k + 1 :] -= U[k, k + 1 :, None] * ((w[k] - q.astype(np.float64) * d) / U[k, k])
    return codes, bits


@pytest.mark.parametrize("K", [5, 16, 40, 300])  # 300: more than one panel
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_plain_gptq_is_the_paper(K: int, damping: float):
    W, H = weight(K, 5), moment(inputs(K))
    q = gptq.solve(W, H=H, scales="amax", damping=damping, **PLAIN)
    codes, bits = reference(W, H, damping)
    assert np.array_equal(q.block_scale.view(np.uint8), bits)
    assert np.array_equal(q.codes, codes)


@pytest.mark.parametrize("K", [40, 300])
def test_order_is_a_permutation_of_inputs(K: int):
    """What is found in an order is what is found for inputs permuted to it, put back."""
    W, H = weight(K, 6), moment(inputs(K))
    rows = gptq.energy_order(H, 16)
    q = gptq.solve(W, H=H)
    permuted = gptq.solve(W[rows], H=H[np.ix_(rows, rows)], order=False)
    assert np.array_equal(q.codes[rows], permuted.codes)
    assert np.array_equal(q.dequantize()[rows], permuted.dequantize())


def test_search_is_better_step_by_step():
    """What each part is for, on average over the columns."""
    W, H = weight(272, 96), moment(inputs(272))
    steps = [
        error(W, SOLVERS["rtn"](W), H),
        error(W, SOLVERS["sweep"](W), H),
        error(W, gptq.solve(W, H=H, scales="amax", **PLAIN), H),
        error(W, gptq.solve(W, H=H, scales="sweep", **PLAIN), H),
        error(W, gptq.solve(W, H=H, **PLAIN), H),
        error(W, gptq.solve(W, H=H, beams=8, rounds=0, order=False), H),
        error(W, gptq.solve(W, H=H, beams=8, rounds=1, order=False), H),
        error(W, gptq.solve(W, H=H, beams=8, rounds=4, order=False), H),
    ]
    assert steps == sorted(steps, reverse=True), steps
    assert steps[-1] < 0.5 * steps[1]
    assert error(W, gptq.solve(W, H=H), H) < 1.01 * steps[-1]  # the order: here it matters little


@pytest.mark.parametrize("K", [30, 272])
@pytest.mark.parametrize("order", [False, True])
def test_refinement_never_raises_the_error(K: int, order: bool):
    """In any column, from a good start or a bad one."""
    H = moment(inputs(K))
    rows = gptq.energy_order(H, 16) if order else np.arange(K)
    problem = gptq._Problem(H[np.ix_(rows, rows)], 0.03, "")
    damped = damp(H[np.ix_(rows, rows)], 0.03)
    X = weight(K, 20) * np.float32(5000)
    values, scale = gptq._pass(problem, X, gptq.SCALES["amax"], 1)
    values[:, 10:], scale[:, 10:] = 0, 56

    def columns() -> np.ndarray:
        D = (X - values).astype(np.float64)
        return (D * (damped @ D)).sum(axis=0)

    before = columns()
    for _ in range(5):
        gptq.refine(problem, X, values, scale)
        now = columns()
        assert (now <= before * (1 + 1e-6)).all()
        q = values / np.repeat(SCALE[scale], 16, axis=0)[:K]
        assert np.isin(np.abs(q), [0, 0.5, 1, 1.5, 2, 3, 4, 6]).all()
        before = now


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(16, 1), (17, 3), (48, 31), (100, 7), (260, 5)])
def test_never_worse_than_sweep(seed: int, shape: tuple[int, int]):
    """Not for inputs without correlation, nor for few tokens, nor for weights with outliers."""
    K, N = shape
    rng = np.random.default_rng(seed)
    W = weight(K, N, seed)
    x = inputs(K, tokens=(2, 20, 500)[seed % 3], seed=seed)
    H = moment(x) if seed < 4 else np.diag(np.exp(rng.standard_normal(K)))
    if seed % 2:
        W[rng.random(shape) < 0.02] *= 20
    q = gptq.solve(W, H=H)
    assert q.shape == shape and (q.block_scale.astype(np.float32) > 0).all()
    assert error(W, q, H) <= error(W, SOLVERS["sweep"](W), H) * (1 + 1e-4)


@pytest.mark.parametrize("gain", [1e-30, 1.0, 1e30])
def test_without_correlation_it_is_sweep(gain: float):
    W = weight(64, 400)
    ours, sweep = gptq.solve(W, H=gain * np.eye(64)), SOLVERS["sweep"](W)
    assert relative_error(W, ours) == pytest.approx(relative_error(W, sweep), rel=2e-4)


@pytest.mark.parametrize("gain", [1e-38, 1e-30, 1e-3, 1e3, 1e35])
def test_the_size_of_weights_does_not_matter(gain: float):
    W, H = weight(48, 9), moment(inputs(48))
    W[0, 0] = 1  # so that the smallest scales stay normal numbers
    expected = gptq.solve(W, H=H)
    q = gptq.solve(W * np.float32(2.0) ** np.round(np.log2(gain)).astype(np.float32), H=H)
    if gain > 1e-37:
        assert np.array_equal(q.codes, expected.codes)
    assert np.isfinite(q.dequantize()).all()


def test_zero_moment_gives_sweep():
    W = weight(40, 6)
    ours, sweep = gptq.solve(W, H=np.zeros((40, 40))), SOLVERS["sweep"](W)
    assert np.array_equal(ours.codes, sweep.codes)
    assert np.array_equal(ours.dequantize(), sweep.dequantize())


def test_zero_weights_and_blocks():
    H = moment(inputs(32))
    q = gptq.solve(np.zeros((32, 3), np.float32), H=H)
    assert q.global_scale == 1 and not q.codes.any() and (q.block_scale.astype(np.float32) == 1).all()
    W = weight(32, 3)
    W[:, 1] = 0
    q = gptq.solve(W, H=H)
    assert not q.codes[:, 1].any() and (q.block_scale[:, 1].astype(np.float32) == 1).all()
    W[16:, 2] = 0  # a block of zeros takes part in the feedback like any other
    assert error(W, gptq.solve(W, H=H), H) < error(W, SOLVERS["sweep"](W), H)


def test_awkward_blocks():
    W = awkward((96 + 5, 24))
    H = moment(inputs(101))
    q = gptq.solve(W, H=H)
    assert np.isfinite(q.dequantize()).all()
    assert error(W, q, H) < error(W, SOLVERS["sweep"](W), H)


@pytest.mark.parametrize("tokens", [1, 3, 30])
def test_fewer_tokens_than_inputs(tokens: int):
    """H is singular. On those tokens the error falls far; on others it stays bounded."""
    W, x = weight(64, 10), inputs(64, tokens)
    q = gptq.solve(W, H=moment(x))
    sweep = SOLVERS["sweep"](W)
    D, D0 = (W - q.dequantize()).astype(float), (W - sweep.dequantize()).astype(float)
    assert np.square(x @ D).sum() < (0.1 if tokens < 10 else 0.5) * np.square(x @ D0).sum()
    assert relative_error(W, q) < 5 * relative_error(W, sweep)


@pytest.mark.parametrize("damping", [0.0, 0.03])
def test_dead_inputs_are_rounded_not_dropped(damping: float):
    W, x = weight(64, 10), inputs(64)
    dead = np.arange(64) % 5 == 0
    x[:, dead] = 0
    q = gptq.solve(W, H=moment(x), damping=damping)
    back = q.dequantize()
    share = np.square(W[dead] - back[dead]).sum() / np.square(W[dead]).sum()
    assert share < (0.05 if damping else 0.5)


def test_duplicate_inputs():
    """Two channels that are always equal: their errors can cancel."""
    x = inputs(32)
    x[:, 1::2] = x[:, ::2]
    W = weight(32, 50)
    H = moment(x)
    assert error(W, gptq.solve(W, H=H), H) < 0.4 * error(W, SOLVERS["sweep"](W), H)


@every_broken
def test_what_is_no_second_moment_is_refused(change: str, message: str):
    with pytest.raises(InputError, match=message):
        gptq.solve(weight(32, 2), H=broken(change), name="layer7")


def test_weights_that_are_not_finite_are_refused():
    W = weight(32, 2)
    W[3, 1] = np.nan
    with pytest.raises(InputError, match=r"layer7.*\[3, 1\]"):
        gptq.solve(W, H=np.eye(32), name="layer7")


@pytest.mark.parametrize("option", [{"scales": "none"}, {"beams": 0}, {"rounds": -1}, {"damping": -1.0}])
def test_wrong_options_are_refused(option: dict):
    with pytest.raises(UsageError):
        gptq.solve(weight(16, 2), H=np.eye(16), **option)


def test_needs_calibration():
    with pytest.raises(UsageError, match="needs calibration"):
        SOLVERS["gptq"](weight(16, 2))


def test_nothing_is_changed_or_shared():
    W, H = weight(40, 6), moment(inputs(40))
    W0, H0 = W.copy(), H.copy()
    q = SOLVERS["gptq"](W, H=H)
    assert np.array_equal(W, W0) and np.array_equal(H, H0)
    assert q.codes.flags.c_contiguous and q.block_scale.flags.c_contiguous


def test_threads_do_not_matter():
    """Neither our own nor BLAS's: byte for byte."""
    W, H = weight(272, 700), moment(inputs(272))
    results = [gptq.solve(W, H=H, threads=threads, rounds=1) for threads in (1, 2, 3)]
    with threadpool_limits(1, user_api="blas"):
        results.append(gptq.solve(W, H=H, threads=2, rounds=1))
    for q in results[1:]:
        assert q.codes.tobytes() == results[0].codes.tobytes()
        assert q.block_scale.tobytes() == results[0].block_scale.tobytes()


def test_scales_stay_in_e4m3():
    """Feedback can lift a block beyond the largest scale; it is clipped, and the rest makes up for it."""
    rng = np.random.default_rng(0)
    u = rng.standard_normal((64, 1))
    H = u @ u.T + 1e-6 * np.eye(64)
    W = weight(64, 8)
    W[20] = 3
    q = gptq.solve(W, H=H, damping=1e-6)
    assert (q.block_scale.astype(np.float32) <= e4m3.MAX).all()
    assert error(W, q, H, 1e-6) < error(W, SOLVERS["sweep"](W), H, 1e-6)


def test_damping_follows_the_number_of_tokens():
    W, H = weight(64, 8), moment(inputs(64))
    for tokens, damping in ((0, 0.03), (100, 0.3), (320, 0.1), (10**6, 0.01)):
        found, wanted = gptq.solve(W, H=H, tokens=tokens), gptq.solve(W, H=H, damping=damping)
        assert found.codes.tobytes() == wanted.codes.tobytes()
    assert gptq.solve(W, H=H, tokens=100).codes.tobytes() != gptq.solve(W, H=H).codes.tobytes()
