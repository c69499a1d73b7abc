"""Streaming sums against the same in float64 at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from calibration_harness import check, same_statistics

from qgraph.calibration import moments
from qgraph.calibration.moments import PANEL, ROWS, Moments, Peaks, accumulate
from qgraph.errors import InputError


def rows(count: int, K: int, seed: int = 0) -> np.ndarray:
    """float32 [count, K] with a mean, and channels of very different size."""
    rng = np.random.default_rng(seed)
    return ((rng.standard_normal((count, K)) + 0.5) * np.geomspace(0.01, 10, K)).astype(np.float32)


@pytest.mark.parametrize(
    ("count", "K"), [(1, 1), (3, 40), (ROWS, PANEL), (ROWS + 1, PANEL + 1), (2 * ROWS + 77, 2 * PANEL + 44)]
)
def test_against_float64(count: int, K: int) -> None:
    x, x_float = rows(count, K), rows(count, K, seed=1)
    plain, cross = Moments("x", K), Moments("x", K, cross=True)
    plain.add(x)
    cross.add(x, x_float)
    check(plain.finish(), x.astype(np.float64))
    found = cross.finish()
    check(found, x.astype(np.float64), x_float.astype(np.float64))


def test_many_tokens_lose_nothing() -> None:
    """A sum in float32 would have stopped growing; in float64 the last row counts as the first."""
    sums = Moments("x", 2)
    block = np.tile(np.array([[1000.0, 0.01]], np.float32), (ROWS, 1))
    for _ in range(200):
        sums.add(block)
        accumulate([sums], None)
    found = sums.finish()
    assert found.tokens == 200 * ROWS
    np.testing.assert_allclose(found.second_moment, np.array([[1e6, 10], [10, 1e-4]]), rtol=3e-6)


@pytest.mark.parametrize("cross", [False, True])
def test_batches_and_threads_change_nothing(cross: bool) -> None:
    """The same rows, cut in many ways, added by one thread or three: the same bits."""
    x, x_float = rows(3 * ROWS + 5, 300), rows(3 * ROWS + 5, 300, seed=1)
    found = []
    for cuts, threads in (([], 0), ([1, 2, 1500], 0), (range(100, 3000, 100), 3), ([ROWS, 2 * ROWS], 2)):
        sums = Moments("x", 300, cross=cross)
        with ThreadPoolExecutor(threads or 1) as pool:
            for part, part_float in zip(np.split(x, cuts), np.split(x_float, cuts), strict=True):
                sums.add(part, part_float if cross else None)
                accumulate([sums], pool if threads else None)
        found.append(sums.finish())
    assert all(same_statistics(found[0], other) for other in found[1:])


def test_products_are_made_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of additions must not follow a machine's number of cores: ONNX Runtime's session is asked for
    one thread, and numpy's BLAS, which has a setting of its own, is not asked."""
    sessions = []
    from qgraph.calibration import session

    original = session.open_session
    monkeypatch.setattr(session, "open_session", lambda *a: sessions.append(original(*a)) or sessions[-1])
    moments._transposed_product.cache_clear()
    sums = Moments("x", 20)
    sums.add(rows(10, 20))
    sums.finish()
    options = sessions[0].get_session_options()
    assert len(sessions) == 1 and options.intra_op_num_threads == options.inter_op_num_threads == 1
    moments._transposed_product.cache_clear()


def test_nothing_is_no_statistics() -> None:
    with pytest.raises(InputError, match="'x': the calibration data holds no token"):
        Moments("x", 3).finish()


def test_peaks() -> None:
    peaks = Peaks(3)
    for x in ([[1, -2, 0]], [], [[-3, 1, 0], [2, 2, 0]]):
        peaks.add(np.array(x, np.float32).reshape(-1, 3))
    assert peaks.amax.tolist() == [3, 2, 0]
