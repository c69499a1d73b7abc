"""Both solvers: against plain numpy references, on awkward inputs, and their known figures."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from qgraph.errors import InputError, UsageError
from qgraph.formats import QTensor, e4m3
from qgraph.solvers import SOLVERS, get_solver

SCALES = e4m3.from_codes(np.arange(1, 127, dtype=np.uint8)).astype(np.float64)


def relative_error(W: np.ndarray, q: QTensor) -> float:
    W = W.astype(np.float64)
    return float(((W - q.dequantize()) ** 2).sum() / (W**2).sum())


def naive_rtn(W: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """(codes, block scale bits, a), one block at a time, rounding by ml_dtypes."""
    K, N = W.shape
    amax = np.abs(W).max()
    a = np.float32(float(amax) / (6 * 448)) if amax else np.float32(1)
    codes = np.zeros((K, N), np.uint8)
    scale = np.zeros((-(-K // 16), N), np.uint8)
    for b in range(len(scale)):
        for n in range(N):
            w = W[16 * b : 16 * b + 16, n]
            largest = np.abs(w).max()
            d = np.minimum(largest / (np.float32(6) * a), np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
            if largest == 0:
                d = np.float32(1).astype(ml_dtypes.float8_e4m3fn)
            elif d == 0:
                d = np.float32(2**-9).astype(ml_dtypes.float8_e4m3fn)
            s = np.float32(d) * a
            codes[16 * b : 16 * b + 16, n] = (w / s).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
            scale[b, n] = d.view(np.uint8)
    return codes, scale, a


def brute_force_errors(W: np.ndarray, a: np.float32) -> np.ndarray:
    """Smallest squared error of each block over all 126 scales at global scale a, in float64: [blocks, N]."""
    K, N = W.shape
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = np.concatenate([-values, values])
    best = np.full((-(-K // 16), N), np.inf)
    for b in range(len(best)):
        w = W[16 * b : 16 * b + 16].astype(np.float64)
        for d in SCALES:
            distance = np.abs(w[..., None] - grid * d * float(a)).min(axis=-1)
            best[b] = np.minimum(best[b], (distance**2).sum(axis=0))
    return best


def block_errors(W: np.ndarray, q: QTensor) -> np.ndarray:
    squares = (W.astype(np.float64) - q.dequantize()) ** 2
    return np.array([squares[b : b + 16].sum(axis=0) for b in range(0, len(W), 16)])


def assert_optimal(W: np.ndarray, q: QTensor) -> None:
    """No block is further from its weights than at the best of 126 scales, but for float32 rounding."""
    norm = np.array([np.linalg.norm(W[b : b + 16].astype(np.float64), axis=0) for b in range(0, len(W), 16)])
    ours, best = np.sqrt(block_errors(W, q)), np.sqrt(brute_force_errors(W, q.global_scale))
    assert (ours <= best + 2e-7 * norm).all()


def awkward(shape: tuple[int, int] = (80, 24)) -> np.ndarray:
    """Blocks that are normal, heavy-tailed, constant, on the grid, zero, one-hot, tiny, and subnormal."""
    rng = np.random.default_rng(7)
    W = rng.standard_normal(shape).astype(np.float32)
    W[:, 1] = rng.standard_t(2, shape[0])
    W[:, 2] = 0.7
    W[:, 3] = rng.choice([0, 0.5, -1, 1.5, 2, -3, 4, 6], shape[0])
    W[:, 4] = 0
    W[:, 5] = 0
    W[5::16, 5] = -2.5
    for n in range(6, 20):  # from the normal range of E4M3 down to blocks below its smallest number
        W[:, n] *= np.float32(10.0) ** np.float32(4 - n)
    W[:, 20] *= 1e-40
    W[:16, 21] = [1] * 15 + [30]
    W[:, 22] = np.float32(4.5 * 2**-9 / 1000)
    return W


@pytest.mark.parametrize("shape", [(1, 1), (16, 3), (17, 5), (3, 7), (64, 33), (100, 20)])
@pytest.mark.parametrize("scale", [1e-38, 1e-6, 1.0, 1e37])
def test_rtn_is_the_formula(shape: tuple[int, int], scale: float):
    W = (np.random.default_rng(0).standard_normal(shape) * scale).astype(np.float32)
    if scale == 1e-38:
        W[0, 0] = 1e-30  # keeps `a` normal: the smallest blocks then fall below E4M3's range
    q = SOLVERS["rtn"](W)
    codes, block_scale, a = naive_rtn(W)
    assert q.global_scale == a
    assert np.array_equal(q.block_scale.view(np.uint8), block_scale)
    assert np.array_equal(q.codes, codes)


def test_rtn_of_awkward_blocks_is_the_formula():
    W = awkward()
    q = SOLVERS["rtn"](W)
    codes, block_scale, _ = naive_rtn(W)
    assert np.array_equal(q.block_scale.view(np.uint8), block_scale)
    assert np.array_equal(q.codes, codes)


@pytest.mark.parametrize("gain", [1.0, 3.7, 1e-3, 1e3])
def test_sweep_is_optimal_block_by_block(gain: float):
    W = awkward() * np.float32(gain)
    W[3, 4 if gain == 1.0 else 0] = np.float32(
        700 * gain
    )  # a large tensor maximum puts most blocks low in E4M3
    assert_optimal(W, SOLVERS["sweep"](W))


def test_sweep_is_optimal_for_extreme_blocks():
    """Blocks whose best scale is far from amax / 6: constants; values on the grid of a larger scale; and one
    outlier that is best clipped, because all the others are on the grid of a smaller scale."""
    rng = np.random.default_rng(3)
    unit = e4m3.from_codes(rng.integers(1, 127, 600).astype(np.uint8)).astype(np.float32)
    W = rng.choice(np.array([0.5, 1, 1.5, 2, 3, 4], np.float32), (16, 600)) * unit
    W[:, 0::3] = unit[0::3] * rng.choice(np.array([0.5, 1, 1.5, 2, 3, 4], np.float32), 200)
    W[0, 1::3] = unit[1::3] * rng.uniform(6, 9, 200).astype(np.float32)
    assert_optimal(W, SOLVERS["sweep"](W))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (15, 3), (16, 16), (17, 3), (33, 65)])
def test_every_shape(solver: str, shape: tuple[int, int]):
    W = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    q = SOLVERS[solver](W)
    assert q.shape == shape and q.block_scale.shape == (-(-shape[0] // 16), shape[1])
    assert relative_error(W, q) < 0.03


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_blocks_and_zero_tensors(solver: str):
    q = SOLVERS[solver](np.zeros((40, 3), np.float32))
    assert q.global_scale == 1 and not q.codes.any() and (q.block_scale.astype(np.float32) == 1).all()
    W = np.zeros((32, 2), np.float32)
    W[:16] = 3
    q = SOLVERS[solver](W)
    assert not q.codes[16:].any() and (q.block_scale[1].astype(np.float32) == 1).all()
    assert np.abs(q.dequantize() - W).max() < 0.11


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [1e-45, 1e-42, 1e-38, 1e-30, 1e30, 1e36])
def test_the_ends_of_float32(solver: str, scale: float):
    W = (np.random.default_rng(2).uniform(-8, 8, (64, 8)) * scale).astype(np.float32)
    q = SOLVERS[solver](W)
    back = q.dequantize()
    assert np.isfinite(back).all()
    smallest_step = 2.0**-136  # half of 2^-9 (E4M3) times 2^-126 (the smallest global scale)
    assert np.abs(back - W).max() <= np.abs(W).max() / 5 + smallest_step
    if scale >= 1e-38:
        assert relative_error(W.astype(np.float64) / scale, _rescaled(q, scale)) < 0.02


def _rescaled(q: QTensor, scale: float) -> QTensor:
    return QTensor(q.format, q.shape, q.codes, q.block_scale, np.float32(float(q.global_scale) / scale))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(solver: str, bad: float):
    W = np.ones((32, 4), np.float32)
    W[17, 3] = bad
    with pytest.raises(InputError, match=r"weight 'layer\.7' holds 1 values that are not finite.*\[17, 3\]"):
        SOLVERS[solver](W, name="layer.7")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "W",
    [np.ones((4, 4)), np.ones(4, np.float32), np.ones((0, 4), np.float32), np.full((2, 2), 3e38, np.float32)],
)
def test_what_is_no_weight_is_refused(solver: str, W: np.ndarray):
    with pytest.raises(InputError, match="weight 'w'"):
        SOLVERS[solver](W, name="w")


@pytest.mark.parametrize("solver", SOLVERS)
def test_threads_memory_layout_and_repetition_do_not_matter(solver: str):
    W = np.random.default_rng(5).standard_normal((1040 + 5, 700)).astype(np.float32)
    results = [
        SOLVERS[solver](w, threads=t) for w, t in ((W, 1), (W, 2), (W, 5), (np.asfortranarray(W), None))
    ]
    for q in results[1:]:
        assert q.global_scale == results[0].global_scale
        assert np.array_equal(q.codes, results[0].codes)
        assert q.block_scale.tobytes() == results[0].block_scale.tobytes()


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_input_is_not_changed(solver: str):
    W = np.random.default_rng(6).standard_normal((33, 9)).astype(np.float32)
    before = W.copy()
    W.flags.writeable = False
    SOLVERS[solver](W)
    assert np.array_equal(W, before)


@pytest.mark.parametrize(
    ("distribution", "solver", "bound"),
    [("normal", "rtn", 0.0092), ("t4", "rtn", 0.0086), ("normal", "sweep", 0.0067), ("t4", "sweep", 0.0069)],
)
def test_relative_weight_error(distribution: str, solver: str, bound: float):
    rng = np.random.default_rng(0)
    draw = rng.standard_normal if distribution == "normal" else lambda shape: rng.standard_t(4, shape)
    W = draw((256, 1024)).astype(np.float32)
    assert bound * 0.95 < relative_error(W, SOLVERS[solver](W)) < bound


def test_sweep_is_never_worse_than_rtn():
    rng = np.random.default_rng(8)
    for seed in range(20):
        W = (rng.standard_t(1 + seed / 4, (48, 16)) * 10.0 ** rng.integers(-6, 6)).astype(np.float32)
        assert relative_error(W, SOLVERS["sweep"](W)) <= relative_error(W, SOLVERS["rtn"](W))


def test_unknown_solver():
    with pytest.raises(UsageError, match=r"unknown solver 'sweeep'.*did you mean 'sweep'"):
        get_solver("sweeep")
