"""Logits -> the next token. Functions of arrays alone, in float64.

In this order: the repetition penalty (Keskar et al., "CTRL", section 4.1) on the logits, the temperature, the
k most likely tokens, and of these the fewest whose probabilities reach p (Holtzman et al., "The Curious Case
of Neural Text Degeneration", section 3.1, equations 2 and 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real

import numpy as np
import numpy.typing as npt

from qgraph.errors import InputError, UsageError

Logits = npt.NDArray[np.float32]
Probabilities = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: logits are divided by it; 0 always takes the most likely token.
        top_k: only so many of the most likely tokens are candidates; 0 is all.
        top_p: of these only the fewest whose probabilities, of all candidates', reach this; 1 is all.
        repetition_penalty: logits of tokens that the text has already are divided by it where positive, else
            multiplied; 1 is none.
        seed: of the draws. Sample i of a prompt has draws of its own, whatever the number of samples.

    Raises UsageError for a value out of its range, and for candidates that nothing is drawn from.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, whole = getattr(self, field.name), isinstance(field.default, int)
            if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
                raise UsageError(
                    f"{field.name} is {value!r}: it must be {'an integer' if whole else 'a number'}"
                )
        for name, good, what in (
            ("temperature", 0 <= self.temperature < np.inf, "not negative"),
            ("top_k", self.top_k >= 0, "not negative"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e3, "from 0.001 to 1000"),
            ("seed", self.seed >= 0, "not negative"),
        ):
            if not good:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be {what}")
        for name, default in (("top_k", 0), ("top_p", 1.0)):
            if not self.temperature and getattr(self, name) != default:
                raise UsageError(
                    f"{name} says what is drawn from, and temperature 0 draws nothing: give a temperature"
                )


class Sampler:
    """Draws the tokens of one sample. index: which of the samples of a prompt it is."""

    def __init__(self, sampling: Sampling, index: int = 0) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng([sampling.seed, index])

    def next(self, logits: Logits, text: Sequence[int]) -> int:
        """The token after `text`, whose logits are float32 [vocabulary]. InputError for NaN among them."""
        how = self._sampling
        values = np.asarray(logits, np.float64)
        if np.isnan(values).any() or not np.isfinite(values.max()):
            raise InputError("the model's logits hold NaN or infinity: no token can be chosen")
        if how.repetition_penalty != 1:
            values = penalize(values, text, how.repetition_penalty)
        if not how.temperature:
            return int(values.argmax())
        return draw(probabilities(values, how.temperature, how.top_k, how.top_p), self._random)


def penalize(logits: Probabilities, text: Sequence[int], penalty: float) -> Probabilities:
    """Makes the tokens of `text` less likely (penalty above 1), each once however often it is there."""
    seen = np.unique(np.asarray(text, np.int64))
    result = logits.copy()
    values = result[seen]
    result[seen] = np.where(values > 0, values / penalty, values * penalty)
    return result


def probabilities(
    logits: Probabilities, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Probabilities:
    """What to draw from, float64 [vocabulary]: sums to 1, and is 0 for what is no candidate.

    Of tokens that are equally likely those with the lower ids come first.
    """
    candidates = _largest(logits, top_k) if 0 < top_k < len(logits) else np.arange(len(logits))
    with np.errstate(over="ignore"):  # a low temperature: -inf, of which nothing is left
        p = np.exp((logits[candidates] - logits[candidates].max()) / temperature)
    p /= p.sum()
    if top_p < 1:
        kept = _nucleus(p, top_p)
        candidates, p = candidates[kept], p[kept] / p[kept].sum()
    result = np.zeros(len(logits))
    result[candidates] = p
    return result


def draw(p: Probabilities, random: np.random.Generator) -> int:
    """A token with the probabilities `p` [vocabulary]."""
    up_to = np.cumsum(p)
    # Rounding may leave the last sum a little off 1: its own measure is what is drawn from.
    return int(np.searchsorted(up_to, random.random() * up_to[-1], side="right"))


def _largest(values: Probabilities, count: int) -> npt.NDArray[np.int64]:
    """The indices of the `count` largest, in order of the indices; a partition, as a vocabulary is long."""
    least = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > least)
    return np.sort(np.concatenate([above, np.flatnonzero(values == least)[: count - len(above)]]))


def _nucleus(p: Probabilities, top_p: float) -> npt.NDArray[np.int64]:
    """The fewest indices, most likely first, whose probabilities reach `top_p`.

    Those below (1 - top_p) / len(p) sum to less than 1 - top_p: they are never needed, nor sorted.
    """
    likely = np.flatnonzero(p >= (1 - top_p) / len(p))
    order = likely[np.argsort(-p[likely], kind="stable")]
    count = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
    return order[:count]
