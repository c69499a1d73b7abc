"""Choosing a token: against a reference that sorts everything, and against the probabilities themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qgraph.errors import InputError, UsageError
from qgraph.generation.sampling import Sampler, Sampling, draw, penalize, probabilities


def plain(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The definition, one token after the other, likely ones first."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    weight = {i: math.exp((logits[i] - max(logits)) / temperature) for i in order}
    total = math.fsum(weight.values())
    kept, reached = [], 0.0
    for i in order:
        kept.append(i)
        reached += weight[i] / total
        if top_p < 1 and reached >= top_p:
            break
    total = math.fsum(weight[i] for i in kept)
    return [weight[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 40, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.01])
def test_against_the_definition(temperature: float, top_k: int, top_p: float) -> None:
    for seed in range(5):
        logits = np.random.default_rng(seed).standard_normal(60).astype(np.float32).astype(np.float64) * 3
        found = probabilities(logits, temperature, top_k, top_p)
        np.testing.assert_allclose(found, plain(logits.tolist(), temperature, top_k, top_p), rtol=1e-12)
        assert found.sum() == pytest.approx(1, rel=1e-12)


def test_of_equals_the_first_are_candidates() -> None:
    assert np.flatnonzero(probabilities(np.array([1.0, 2, 1, 2, 1]), 1, top_k=3)).tolist() == [0, 1, 3]
    assert np.flatnonzero(probabilities(np.zeros(10), 1, top_k=4)).tolist() == [0, 1, 2, 3]
    assert np.flatnonzero(probabilities(np.zeros(10), 1, top_p=0.35)).tolist() == [0, 1, 2, 3]


def test_extremes() -> None:
    logits = np.array([0.0, -np.inf, 1000.0, 999.0])
    assert probabilities(logits, 1e-3).tolist() == [0, 0, 1, 0]
    assert probabilities(logits, 5e-324).tolist() == [0, 0, 1, 0]
    assert probabilities(logits, 1.0)[1] == 0
    assert probabilities(logits, 1.0, top_k=4)[1] == 0
    flat = probabilities(np.full(32000, -1e4), 1.0, top_p=0.999999)
    assert 31900 < np.count_nonzero(flat) <= 32000


@pytest.mark.parametrize(
    "how",
    [Sampling(temperature=1.0), Sampling(temperature=0.7, top_k=6), Sampling(temperature=1.5, top_p=0.8)],
)
def test_draws_have_the_probabilities(how: Sampling) -> None:
    logits = np.random.default_rng(3).standard_normal(12).astype(np.float32)
    wanted = np.array(plain(logits.astype(np.float64).tolist(), how.temperature, how.top_k, how.top_p))
    sampler, n = Sampler(how), 20000
    counts = np.bincount([sampler.next(logits, []) for _ in range(n)], minlength=12)
    assert not counts[wanted == 0].any()
    possible = wanted > 0
    chi2 = ((counts - n * wanted)[possible] ** 2 / (n * wanted[possible])).sum()
    freedom = possible.sum() - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


def test_draws_reach_both_ends() -> None:
    class Fixed:
        def __init__(self, value: float) -> None:
            self.random = lambda: value

    p = np.array([0, 0.25, 0.5, 0.25, 0])
    for value, token in ((0.0, 1), (0.2499, 1), (0.25, 2), (0.7499, 2), (0.75, 3), (1 - 2**-53, 3)):
        assert draw(p, Fixed(value)) == token  # type: ignore[arg-type]
    thirds = np.full(3, 1 / 3) * (1 - 1e-9)  # sums to less than 1
    assert draw(thirds, Fixed(1 - 2**-53)) == 2  # type: ignore[arg-type]


def test_seeds_and_samples() -> None:
    logits = np.zeros(1000, np.float32)

    def drawn(seed: int, index: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), index)
        return [sampler.next(logits, []) for _ in range(8)]

    runs = [drawn(0, 0), drawn(0, 1), drawn(1, 0)]
    assert len({tuple(run) for run in runs}) == 3
    assert drawn(0, 1) == runs[1]


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert Sampler(Sampling()).next(np.array([1, 5, 5, 2], np.float32), []) == 1


def test_repetition_penalty() -> None:
    logits = np.array([2.0, -2.0, 4.0, 0.0])
    assert penalize(logits, [0, 1, 1, 3], 2.0).tolist() == [1, -4, 4, 0]
    assert logits.tolist() == [2, -2, 4, 0]
    assert penalize(logits, [], 2.0).tolist() == logits.tolist()
    how = Sampling(repetition_penalty=3.0)
    assert Sampler(how).next(logits.astype(np.float32), [2]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0: it must be not negative"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 1.0, "top_k": -1}, "top_k"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0: it must be above 0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-320}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"top_k": 5}, "top_k says what is drawn from, and temperature 0 draws nothing"),
        ({"top_p": 0.5}, "top_p says"),
        ({"temperature": 1.0, "top_k": 40.0}, "top_k is 40.0: it must be an integer"),
        ({"temperature": "0.8"}, "temperature is '0.8': it must be a number"),
        ({"seed": True}, "seed is True: it must be an integer"),
    ],
)
def test_what_cannot_be_sampled(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**options)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers(bad: float) -> None:
    with pytest.raises(InputError, match="NaN or infinity"):
        Sampler(Sampling()).next(np.array([0, bad], np.float32), [])
    with pytest.raises(InputError, match="NaN or infinity"):
        Sampler(Sampling()).next(np.full(3, -np.inf, np.float32), [])
