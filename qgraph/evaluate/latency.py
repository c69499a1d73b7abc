"""Latency of several ways to run the same model, measured fairly in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from qgraph.evaluate.decoders import Decoder

BATCH = 5  # timed runs of one contender in a row
PAUSE_S = 0.1  # longer than thread pools spin after a run: the next contender gets the cores to itself


@dataclass(frozen=True)
class Latency:
    """Wall time of one run, in milliseconds, over `runs` runs."""

    median_ms: float
    p90_ms: float
    min_ms: float
    runs: int


def measure(
    contenders: Mapping[str, Callable[[], object]], repeat: int, warmup: int = 2
) -> dict[str, Latency]:
    """Time each of `contenders` at least `repeat` times, taking turns, so that a change of the machine's
    speed meets all of them. Before a turn of `BATCH` runs comes a pause and one run that is not counted."""
    for run in contenders.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(-(-repeat // BATCH)):
        for name, run in contenders.items():
            time.sleep(PAUSE_S)
            run()
            for _ in range(BATCH):
                start = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: _latency(samples) for name, samples in times.items()}


@dataclass(frozen=True)
class Decoding:
    """Wall times of a model that reads a prompt, and then token after token."""

    prompt: Latency
    step: Latency


def measure_decoding(
    contenders: Mapping[str, Decoder],
    prompt: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.int64],
    repeat: int,
) -> dict[str, Decoding]:
    """Time each decoder on `prompt` [batch, sequence], then on every column of `tokens` [batch, n]; `repeat`
    times, taking turns as `measure` does. Only the logits of the last position are asked for."""
    prompts: dict[str, list[float]] = {name: [] for name in contenders}
    steps: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeat + 1):
        for name, decoder in contenders.items():
            time.sleep(PAUSE_S)
            decoder.reset()
            decoder.feed(prompt, last=True)
            decoder.reset()
            times = []
            for ids in (prompt, *(tokens[:, i : i + 1] for i in range(tokens.shape[1]))):
                start = time.perf_counter()
                decoder.feed(ids, last=True)
                times.append(1e3 * (time.perf_counter() - start))
            if turn:  # the first warms up
                prompts[name].append(times[0])
                steps[name] += times[1:]
    return {name: Decoding(_latency(prompts[name]), _latency(steps[name])) for name in contenders}


def _latency(samples: list[float]) -> Latency:
    p90 = statistics.quantiles(samples, n=10, method="inclusive")[-1] if len(samples) > 1 else samples[0]
    return Latency(statistics.median(samples), p90, min(samples), len(samples))
