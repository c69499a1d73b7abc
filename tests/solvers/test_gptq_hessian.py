"""What second-order solvers do with a second moment: factor, order, target, rotation."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from qgraph.errors import InputError
from qgraph.solvers import hessian


def moment(K: int, tokens: int = 400, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((tokens, K)) * np.linspace(0.2, 2, K)
    return x.T @ x / tokens


@pytest.mark.parametrize("damping", [0.0, 0.03])
def test_factor(damping: float):
    H = moment(37) * 1e-7
    damped, R = hessian.factorize(H, damping)
    assert np.allclose(damped, H / H.diagonal().mean() + damping * np.eye(37), rtol=1e-12)
    assert np.allclose(R, np.triu(R)) and (R.diagonal() > 0).all()
    assert np.allclose(R @ R.T, damped)
    D = np.random.default_rng(1).standard_normal((37, 4))
    assert np.square(R.T @ D).sum() == pytest.approx(hessian.output_error(D, damped))


def test_damping_grows_until_there_is_a_factor():
    H = np.ones((20, 20))
    damped, R = hessian.factorize(H, 0.0)
    assert np.allclose(R @ R.T, damped) and np.isfinite(R).all()
    assert 0 < damped[0, 0] - damped[0, 1] < 1e-3
    with pytest.raises(InputError, match="'fc1' is not positive semidefinite"):
        hessian.factorize(np.array([[1.0, 9.0], [9.0, 1.0]]), 0.01, "fc1")


@pytest.mark.parametrize("K", [1, 15, 16, 48, 53])
def test_energy_order(K: int):
    power = np.random.default_rng(K).random(K)
    order = hessian.energy_order(np.diag(power), 16)
    assert np.array_equal(np.sort(order), np.arange(K))
    blocks = [order[k : k + 16] for k in range(0, K, 16)]
    for b in blocks:
        assert len(set(b // 16)) == 1 and (np.diff(power[b]) <= 0).all()
    whole = [power[b].sum() for b in blocks if len(b) == 16]
    assert (np.diff(whole) <= 0).all()
    assert len(blocks[-1]) == (K % 16 or min(K, 16))


def test_energy_order_of_equals_is_the_given_one():
    assert np.array_equal(hessian.energy_order(np.eye(40), 16), np.arange(40))


def test_compensated_target_is_least_squares():
    rng = np.random.default_rng(0)
    x_float = rng.standard_normal((500, 24)) @ rng.standard_normal((24, 24))
    x = x_float + 0.2 * rng.standard_normal(x_float.shape) + 0.1
    W = rng.standard_normal((24, 7)).astype(np.float32)
    H, cross = x.T @ x / 500, x.T @ (x_float - x) / 500
    best = np.linalg.lstsq(x, x_float @ W, rcond=None)[0]
    assert np.allclose(hessian.compensated_target(W, H, cross, damping=0.0), best, atol=1e-3)

    def loss(T: np.ndarray) -> float:
        return float(np.square(x_float @ W - x @ T).sum())

    losses = [loss(hessian.compensated_target(W, H, cross, damping=d)) for d in (0.0, 0.01, 0.1, 1.0, 1e9)]
    assert losses == sorted(losses) and losses[1] < 0.95 * loss(W)
    assert losses[-1] == pytest.approx(loss(W), rel=1e-4)  # damping leads back to W


def test_compensated_target_without_change_is_the_weight():
    W = np.ones((16, 2), np.float32)
    zero = np.zeros((16, 16))
    assert np.array_equal(hessian.compensated_target(W, moment(16), zero, damping=0.01), W)
    assert np.array_equal(hessian.compensated_target(W, zero, zero, damping=0.01), W)
    dead = moment(16)
    dead[3] = dead[:, 3] = 0
    assert np.isfinite(hessian.compensated_target(W, dead, 0.1 * dead, damping=0.0)).all()


@pytest.mark.parametrize("size", hessian.HADAMARD_SIZES)
def test_rotation_is_orthogonal_and_keeps_the_output(size: int):
    K = 128
    R = hessian.rotate(np.eye(K), size)
    assert np.allclose(R @ R.T, np.eye(K)) and np.allclose(R, R.T)
    block = R[:size, :size] * np.sqrt(size)
    assert np.allclose(np.abs(block), 1) and not R[:size, size:].any()
    W, H = np.random.default_rng(0).standard_normal((K, 5)).astype(np.float32), moment(K)
    turned, H_turned = hessian.rotate(W, size), hessian.rotate_moment(H, size)
    assert turned.dtype == np.float32
    assert np.allclose(H_turned, R.T @ H @ R)
    assert hessian.output_error(turned, H_turned) == pytest.approx(hessian.output_error(W, H), rel=1e-5)


@pytest.mark.parametrize(("K", "size"), [(40, 16), (64, 128), (64, 8), (64, 0)])
def test_rotations_that_do_not_fit_are_refused(K: int, size: int):
    with pytest.raises(InputError, match=f"blocks of {size} cannot rotate {K} inputs"):
        hessian.rotate(np.eye(K), size)


def test_compensated_target_takes_back_what_its_inputs_tell_of_a_residual():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((500, 24))
    x_float = x + 0.1 * rng.standard_normal(x.shape)
    W = rng.standard_normal((24, 7)).astype(np.float32)
    r_float = rng.standard_normal((500, 7))
    r = r_float + 0.3 * x[:, :7] + 0.1 * rng.standard_normal(r_float.shape)
    H, cross, residual = x.T @ x / 500, x.T @ (x_float - x) / 500, x.T @ (r_float - r) / 500
    best = np.linalg.lstsq(x, r_float + x_float @ W - r, rcond=None)[0]
    found = hessian.compensated_target(W, H, cross, residual, damping=0.0)
    assert np.allclose(found, best, atol=1e-3)


def test_compensation_is_damped_where_data_are_few():
    assert hessian.compensation_damping(384, 1237) == pytest.approx(384 / 1237)
    assert hessian.compensation_damping(64, 10**6) == 0.03


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_blas_is_held_to_one_thread_from_any_thread():
    """Whichever thread was there first; until the last block ends, and then no longer."""
    before = blas_threads()
    with hessian.one_blas_thread():
        assert blas_threads() == {1}
    seen, inside, done = [], threading.Event(), threading.Event()

    def other() -> None:
        with hessian.one_blas_thread():
            inside.set()
            done.wait(10)
            seen.append(blas_threads())

    thread = threading.Thread(target=other)
    with hessian.one_blas_thread():
        thread.start()
        assert inside.wait(10)
    assert blas_threads() == {1}  # the other still needs it
    done.set()
    thread.join()
    assert seen == [{1}] and blas_threads() == before
