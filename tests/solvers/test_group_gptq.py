"""GPTQ for groups: against plain references in float64, its guarantees, degenerate input, determinism."""

from __future__ import annotations

import numpy as np
import pytest
from calibrated import broken, every_broken, inputs, moment, weight
from threadpoolctl import threadpool_limits
from weights import awkward, relative_error

from qgraph.errors import InputError, UsageError
from qgraph.formats import FORMATS, QTensor
from qgraph.formats.group import GROUP_FORMATS
from qgraph.solvers import SOLVERS, group_gptq, group_gptq_anneal, itf
from qgraph.solvers.group_gptq_anneal import sweep
from qgraph.solvers.group_gptq_pass import CHOICES, first_pass, follow
from qgraph.solvers.group_gptq_problem import Problem, Solution
from qgraph.solvers.group_grid import Grid
from qgraph.solvers.hessian import damp, output_error

FORMAT_NAMES = [spec.name for spec in GROUP_FORMATS]
PLAIN = {"grids": "itf", "order": False, "sweeps": 0}

every_format = pytest.mark.parametrize("name", FORMAT_NAMES)
few_formats = pytest.mark.parametrize("name", ["ternary", "int3", "int4", "int4-sym"])  # all kinds of offset


def error(W: np.ndarray, q: QTensor, H: np.ndarray, damping: float = 0.03) -> float:
    """What gptq minimises, relative to W's own."""
    H = damp(H, damping)
    return output_error(W - q.dequantize(), H) / output_error(W, H)


def losses(now: Solution, H: np.ndarray) -> np.ndarray:
    """Of the levels and grids themselves, in float64; what is kept of the errors must agree."""
    block = now.problem.spec.block
    scale, offset = (np.repeat(a, block, axis=0)[: len(now.levels)] for a in (now.scale, now.offset))
    D = now.target.astype(np.float64) - (now.levels.astype(np.float64) * scale + offset)
    assert np.allclose(D, now.error, atol=1e-6 * np.abs(now.target).max())
    return (D * (H @ D)).sum(axis=0)


def reference(W: np.ndarray, H: np.ndarray, damping: float, q: QTensor) -> tuple[np.ndarray, np.ndarray]:
    """GPTQ as its paper has it, row by row, by the inverse of H, on the grids of q.

    Codes, and the weights as they were when their block's turn came.
    """
    K, spec = len(W), FORMATS[q.format]
    H = H + damping * H.diagonal().mean() * np.eye(K)
    U = np.linalg.cholesky(np.linalg.inv(H)).T  # upper: H^-1 = U^T U
    scale, offset = grids_of(q)
    w, codes, seen = W.astype(np.float64), np.zeros(W.shape, np.uint8), np.zeros(W.shape)
    for k in range(K):
        b = k // spec.block
        if k % spec.block == 0:
            seen[k : k + spec.block] = w[k : k + spec.block]
        levels = np.clip(np.rint((w[k] - offset[b]) / scale[b]), spec.values[0], spec.values[-1])
        codes[k] = levels - spec.values[0]
        w[k + 1 :] -= U[k, k + 1 :, None] * ((w[k] - levels * scale[b] - offset[b]) / U[k, k])
    return codes, seen


def grids_of(q: QTensor) -> tuple[np.ndarray, np.ndarray]:
    spec, scale = FORMATS[q.format], q.block_scale.astype(np.float64)
    if spec.offset == "none":
        return scale, np.zeros_like(scale)
    if spec.offset == "zero_point":
        return scale, -spec.values[q.block_offset] * scale
    return scale, q.block_offset.astype(np.float64)


@every_format
@pytest.mark.parametrize("K", [5, 40, 300])
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_plain_gptq_is_the_paper(name: str, K: int, damping: float):
    """Up to a code on a boundary now and then, after which a column goes its own way."""
    W, H = weight(K, 40), moment(inputs(K))
    q = group_gptq.solve(W, format=name, H=H, damping=damping, **PLAIN)
    codes, seen = reference(W, H, damping, q)
    same = (q.codes == codes).all(axis=0)
    assert same.sum() >= (30 if name == "int8" else 38)
    spec = FORMATS[name]
    for b, (scale, offset) in enumerate(zip(*grids_of(q), strict=True)):
        aim = seen[b * spec.block : (b + 1) * spec.block].astype(np.float32)
        best = itf.squared_error(spec, aim, itf.best_grid(spec, aim))
        ours = itf.squared_error(spec, aim, Grid(scale.astype(np.float32), offset.astype(np.float32)))
        assert (ours <= best * (1 + 1e-3))[same].all()


@few_formats
def test_a_block_costs_its_share(name: str):
    """What `follow` says a block costs is its part of the sum; all parts make the error."""
    K, spec = 300, FORMATS[name]
    W, H = weight(K, 7), moment(inputs(K))
    problem = Problem(spec, H, 0.03, "")
    found, total = first_pass(problem, W, CHOICES["search"]), 0
    for b, block in enumerate(problem.blocks):
        aim = W[block.rows] + (block.feedback @ found.error[: block.rows.start] if b else 0)
        levels, cost = follow(problem, block, aim, Grid(found.scale[b], found.offset[b]))
        assert np.array_equal(levels, found.levels[block.rows])
        total += cost
    assert np.allclose(total, losses(found, damp(H, 0.03)), rtol=1e-4)


@few_formats
def test_a_cold_sweep_is_coordinate_descent(name: str):
    """Level by level, the one of least error, all others as they are."""
    K, spec = 150, FORMATS[name]  # more than a panel, more than a block
    W, H = weight(K, 30), moment(inputs(K))
    now = first_pass(Problem(spec, H, 0.03, ""), W, CHOICES["itf"])
    H, values = damp(H, 0.03), now.levels.astype(np.float64)
    scale, offset = (np.repeat(a.astype(np.float64), spec.block, axis=0)[:K] for a in (now.scale, now.offset))
    for k in range(K):
        D = W - (values * scale + offset)
        best = values[k] + H[k] @ D / (H[k, k] * scale[k])
        values[k] = np.clip(np.rint(best), spec.values[0], spec.values[-1])
    sweep(now, fit=False)
    assert (now.levels == values).all(axis=0).sum() >= 28  # a tie may go either way


@few_formats
@pytest.mark.parametrize("good", [True, False])
def test_cold_sweeps_never_raise_the_error(name: str, good: bool):
    """In any column, from a good start or a bad one, fits of the grid included."""
    K, spec = 300, FORMATS[name]
    W, H = weight(K, 20), moment(inputs(K))
    now = first_pass(Problem(spec, H, 0.03, ""), W, CHOICES["itf"])
    if not good:
        now.levels[:] = np.random.default_rng(0).choice(spec.values, now.levels.shape)
        now.update(slice(0, K))
    H = damp(H, 0.03)
    before = start = losses(now, H)
    for _ in range(6):
        sweep(now)
        after = losses(now, H)
        assert (after <= before * (1 + 1e-5)).all()
        assert np.isin(now.levels, spec.values).all()
        before = after
    assert after.sum() < 0.98 * start.sum()


@few_formats
@pytest.mark.parametrize("sweeps", [1, 5])
def test_annealing_never_raises_the_error(name: str, sweeps: int):
    K, spec = 140, FORMATS[name]
    W, H = weight(K, 50), moment(inputs(K))
    found = first_pass(Problem(spec, H, 0.03, ""), W, CHOICES["search"])
    H = damp(H, 0.03)
    before = losses(found, H)
    group_gptq_anneal.anneal(found, sweeps, seed=1)
    assert (losses(found, H) <= before * (1 + 1e-5)).all()
    assert losses(found, H).sum() < 0.98 * before.sum()


def test_levels_are_drawn_from_the_heat_bath():
    """A single weight between two levels takes each as often as exp(-error / T) says."""
    n, target, T = 4000, np.float32(0.3), 0.25
    problem = Problem(FORMATS["ternary"], np.ones((1, 1)), 0.0, "")
    now = Solution(problem, np.full((1, n), target))
    now.levels[:], now.scale[:], now.offset[:] = 0, 2, -0.5
    now.update(slice(0, 1))
    noise, ones = group_gptq_anneal._Noise(0), 0.0
    for _ in range(20):
        sweep(now, np.full(n, T, np.float32), noise, fit=False)
        assert np.isin(now.levels, [0, 1]).mean() > 0.99
        ones += (now.levels == 1).mean() / 20
    odds = np.exp(-((target - 1.5) ** 2 - (target + 0.5) ** 2) / T)
    assert ones == pytest.approx(odds / (1 + odds), abs=0.005)


@every_format
def test_each_step_gains(name: str):
    """What each part is for, on average over the columns."""
    W, H = weight(272, 96), moment(inputs(272))

    def ours(**options) -> float:
        return error(W, group_gptq.solve(W, format=name, H=H, **options), H)

    steps = [
        error(W, SOLVERS["rtn"](W, format=name), H),
        error(W, SOLVERS["itf"](W, format=name), H),
        ours(**PLAIN),
        ours(grids="share", order=False, sweeps=0),
        ours(order=False, sweeps=0),
        ours(order=False, sweeps=4),
        ours(order=False, sweeps=16),
    ]
    assert steps == sorted(steps, reverse=True), steps
    assert steps[-1] < 0.75 * steps[1]
    assert ours(sweeps=16) < 1.02 * steps[-1]  # the order: here it matters little


def test_it_is_better_than_pt2_llm():
    W, H = weight(272, 60), moment(inputs(272))
    ours, published = (SOLVERS[name](W, format="ternary", H=H) for name in ("gptq", "pt2-llm"))
    assert error(W, ours, H) < 0.8 * error(W, published, H)


@few_formats
@pytest.mark.parametrize("seed", [0, 2, 3, 5])
@pytest.mark.parametrize("shape", [(1, 1), (17, 3), (48, 31), (129, 7), (260, 1)])
def test_never_worse_than_itf(name: str, seed: int, shape: tuple[int, int]):
    """Not for inputs without correlation, nor for few tokens, nor for weights with outliers."""
    K, N = shape
    rng = np.random.default_rng(seed)
    W = weight(K, N, seed)
    x = inputs(K, tokens=(2, 20, 500)[seed % 3], seed=seed)
    H = moment(x) if seed < 4 else np.diag(np.exp(rng.standard_normal(K)))
    if seed % 2:
        W[rng.random(shape) < 0.02] *= 20
    q = group_gptq.solve(W, format=name, H=H, sweeps=4)
    assert q.shape == shape and (q.block_scale > 0).all()
    assert error(W, q, H) <= error(W, SOLVERS["itf"](W, format=name), H) * (1 + 1e-4)


@few_formats
@pytest.mark.parametrize("gain", [1e-30, 1.0, 1e30])
def test_without_correlation_it_is_itf_or_better(name: str, gain: float):
    W = weight(160, 100)
    ours, plain = group_gptq.solve(W, format=name, H=gain * np.eye(160)), SOLVERS["itf"](W, format=name)
    assert relative_error(W, plain) * 0.9 < relative_error(W, ours) < relative_error(W, plain) * 1.0001


@few_formats
@pytest.mark.parametrize("exponent", [-6, 5, 12])
def test_the_size_of_weights_does_not_matter(name: str, exponent: int):
    """As long as scales and means are normal numbers of float16: subnormal means make a difference."""
    W, H = weight(140, 9) + np.float32(0.05), moment(inputs(140))
    expected = group_gptq.solve(W, format=name, H=H, sweeps=4)
    q = group_gptq.solve(W * np.float32(2.0**exponent), format=name, H=H, sweeps=4)
    assert (q.codes == expected.codes).all(axis=0).mean() > 0.7
    scaled = expected.dequantize() * 2.0**exponent
    assert np.abs(q.dequantize() - scaled).mean() < 0.02 * np.abs(scaled).mean()


@every_format
def test_zero_moment_gives_itf(name: str):
    W = weight(40, 6)
    ours, plain = group_gptq.solve(W, format=name, H=np.zeros((40, 40))), SOLVERS["itf"](W, format=name)
    assert np.array_equal(ours.codes, plain.codes)
    assert np.array_equal(ours.dequantize(), plain.dequantize())


@every_format
def test_zero_weights_and_blocks(name: str):
    K, block = 200, FORMATS[name].block
    H = moment(inputs(K))
    q = group_gptq.solve(np.zeros((K, 3), np.float32), format=name, H=H)
    assert not q.dequantize().any() and (q.block_scale == 1).all()
    W = weight(K, 3)
    W[:, 1] = 0
    q = group_gptq.solve(W, format=name, H=H)
    assert not q.dequantize()[:, 1].any() and (q.block_scale[:, 1] == 1).all()
    W[block:, 2] = 0  # a block of zeros takes part in the feedback like any other
    plain = SOLVERS["itf"](W, format=name)
    assert error(W, group_gptq.solve(W, format=name, H=H), H) < error(W, plain, H)


@every_format
def test_awkward_blocks(name: str):
    """Constant, heavy-tailed, subnormal weights; those far below float16 stay what ITF makes of them."""
    W, H = awkward((256 + 5, 24)), moment(inputs(261))
    q = group_gptq.solve(W, format=name, H=H, sweeps=4)
    assert np.isfinite(q.dequantize()).all() and (q.block_scale > 0).all()
    plain = SOLVERS["itf"](W, format=name)
    for n in range(W.shape[1]):
        D, D0 = ((W - p.dequantize())[:, n].astype(np.float64) for p in (q, plain))
        assert D @ damp(H, 0.03) @ D <= D0 @ damp(H, 0.03) @ D0 * (1 + 1e-4)


@few_formats
@pytest.mark.parametrize("tokens", [1, 3, 30])
def test_fewer_tokens_than_inputs(name: str, tokens: int):
    """H is singular. On those tokens the error falls far; on others it stays bounded."""
    W, x = weight(160, 10), inputs(160, tokens)
    q, plain = group_gptq.solve(W, format=name, H=moment(x)), SOLVERS["itf"](W, format=name)
    D, D0 = (W - q.dequantize()).astype(float), (W - plain.dequantize()).astype(float)
    assert np.square(x @ D).sum() < (0.1 if tokens < 10 else 0.3) * np.square(x @ D0).sum()
    assert relative_error(W, q) < 5 * relative_error(W, plain)


@pytest.mark.parametrize("damping", [0.0, 0.03])
def test_dead_inputs_are_rounded_not_dropped(damping: float):
    W, x = weight(160, 10), inputs(160)
    dead = np.arange(160) % 5 == 0
    x[:, dead] = 0
    q = group_gptq.solve(W, format="int4", H=moment(x), damping=damping)
    back = q.dequantize()
    share = np.square(W[dead] - back[dead]).sum() / np.square(W[dead]).sum()
    assert share < (0.05 if damping else 0.5)


def test_duplicate_inputs():
    """Two channels that are always equal: their errors can cancel."""
    x = inputs(64)
    x[:, 1::2] = x[:, ::2]
    W, H = weight(64, 50), moment(x)
    plain = SOLVERS["itf"](W, format="ternary")
    assert error(W, group_gptq.solve(W, format="ternary", H=H), H) < 0.4 * error(W, plain, H)


@pytest.mark.parametrize("name", ["ternary", "int4"])
@pytest.mark.parametrize("K", [40, 300])
def test_order_is_a_permutation_of_inputs(name: str, K: int):
    """What is found in an order is what is found for inputs permuted to it, put back."""
    W, H = weight(K, 6), moment(inputs(K))
    rows = group_gptq.energy_order(H, FORMATS[name].block)
    q = group_gptq.solve(W, format=name, H=H, sweeps=2)
    permuted = group_gptq.solve(W[rows], format=name, H=H[np.ix_(rows, rows)], order=False, sweeps=2)
    assert np.array_equal(q.codes[rows], permuted.codes)
    assert np.array_equal(q.dequantize()[rows], permuted.dequantize())


@every_broken
def test_what_is_no_second_moment_is_refused(change: str, message: str):
    with pytest.raises(InputError, match=message):
        group_gptq.solve(weight(32, 2), format="ternary", H=broken(change), name="layer7")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e5])
def test_weights_that_cannot_be_quantized_are_refused(bad: float):
    W = weight(32, 2)
    W[3, 1] = bad
    with pytest.raises(InputError, match="layer7"):
        group_gptq.solve(W, format="int2", H=np.eye(32), name="layer7")


def test_the_largest_weights():
    W = weight(140, 5)
    W *= np.float32(60000) / np.abs(W).max()
    for name in FORMAT_NAMES:
        q = group_gptq.solve(W, format=name, H=moment(inputs(140)), sweeps=4)
        assert np.isfinite(q.dequantize()).all()


@pytest.mark.parametrize("option", [{"grids": "none"}, {"sweeps": -1}, {"damping": -1.0}])
def test_wrong_options_are_refused(option: dict):
    with pytest.raises(UsageError):
        group_gptq.solve(weight(16, 2), format="ternary", H=np.eye(16), **option)


def test_nothing_is_changed_or_shared():
    W, H = weight(40, 6), moment(inputs(40))
    W0, H0 = W.copy(), H.copy()
    q = SOLVERS["gptq"](W, format="int4", H=H)
    assert np.array_equal(W, W0) and np.array_equal(H, H0)
    assert q.codes.flags.c_contiguous and q.block_scale.flags.c_contiguous


@pytest.mark.parametrize("name", ["ternary", "int4"])
def test_threads_do_not_matter(name: str):
    """Neither our own nor BLAS's: byte for byte."""
    W, H = weight(40, 1600), moment(inputs(40))

    def solve(threads: int) -> tuple[bytes, ...]:
        q = group_gptq.solve(W, format=name, H=H, threads=threads, sweeps=2)
        return q.codes.tobytes(), q.block_scale.tobytes(), q.block_offset.tobytes()

    results = [solve(threads) for threads in (1, 2, 3)]
    with threadpool_limits(1, user_api="blas"):
        results.append(solve(2))
    assert len(set(results)) == 1


def test_damping_follows_the_number_of_tokens():
    W, H = weight(64, 8), moment(inputs(64))
    few = {"format": "ternary", "sweeps": 2, "H": H}
    for tokens, damping in ((0, 0.03), (100, 0.3), (320, 0.1), (10**6, 0.03)):
        found, wanted = group_gptq.solve(W, tokens=tokens, **few), group_gptq.solve(W, damping=damping, **few)
        assert found.codes.tobytes() == wanted.codes.tobytes()
    assert (
        group_gptq.solve(W, tokens=100, **few).codes.tobytes() != group_gptq.solve(W, **few).codes.tobytes()
    )
