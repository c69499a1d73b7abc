"""Differences of outputs, and latencies."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qgraph.errors import InputError
from qgraph.evaluate.compare import compare, difference
from qgraph.evaluate.latency import BATCH, measure


def test_difference_by_hand() -> None:
    found = difference(np.array([3.0, 4.0]), np.array([3.0, 0.0]))
    assert found.rel_error == pytest.approx(4 / 3)
    assert found.cosine == pytest.approx(9 / 15)
    assert found.max_abs == 4


def test_equal_and_zero() -> None:
    for array in (np.arange(6.0).reshape(2, 3), np.zeros(3), np.zeros((0, 3)), np.array([True, False])):
        found = difference(array, array)
        assert (found.rel_error, found.max_abs) == (0, 0) and found.cosine == pytest.approx(1)
    assert difference(np.ones(2), np.zeros(2)).rel_error == math.inf
    assert difference(np.zeros(2), np.ones(2)).cosine == 0


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_must_be_the_same(odd: float) -> None:
    """A NaN is never hidden: it agrees with a NaN in the same place and with nothing else."""
    with_it, without = np.array([1.0, odd, 2.0]), np.array([1.0, 5.0, 2.0])
    assert difference(with_it, with_it).rel_error == 0
    for got, wanted in ((with_it, without), (without, with_it), (with_it, with_it[::-1][[0, 2, 1]])):
        assert difference(got, wanted).rel_error == math.inf
    assert difference(np.array([odd]), np.array([-odd])).rel_error == (0 if math.isnan(odd) else math.inf)


def test_shapes_must_be_the_same() -> None:
    assert difference(np.ones((2, 1)), np.ones((1, 2))).rel_error == math.inf


def test_compare_wants_every_output() -> None:
    found = compare({"a": np.ones(2), "b": np.ones(2)}, {"a": np.ones(2)})
    assert list(found) == ["a"]
    with pytest.raises(InputError, match="no output 'c': it has a"):
        compare({"a": np.ones(2)}, {"c": np.ones(2)})


def test_measure_takes_turns_and_counts() -> None:
    calls: list[str] = []
    found = measure(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeat=BATCH + 1, warmup=1
    )
    assert {name: latency.runs for name, latency in found.items()} == {"a": 2 * BATCH, "b": 2 * BATCH}
    turn = BATCH + 1  # one of a turn's runs is not counted
    assert "".join(calls) == "ab" + ("a" * turn + "b" * turn) * 2
    for latency in found.values():
        assert 0 <= latency.min_ms <= latency.median_ms <= latency.p90_ms
