"""One model in a process of its own, for benchmarks/models.py: timed where it runs, its memory not mixed up.

    python benchmarks/model_worker.py '{"path": "model.qg", "threads": 1, "kind": "decoder", "room": 576}'

Loads the model and runs it once, then takes orders from standard input and answers each with a line of JSON:
`run BATCH SEQUENCE` of an encoder, `prefill TOKENS` and `decode TOKENS` of a decoder, `memory` of all.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qgraph.errors import QGraphError
from qgraph.evaluate.decoders import open_decoder
from qgraph.evaluate.runners import open_runner

Times = tuple[float, float]  # seconds: of the wall clock, and on processors
LONG = 0.1  # seconds

Orders = Mapping[str, Callable[..., Any]]


def peak() -> int:
    """Bytes that this process had in memory at most, files that are mapped included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise OSError("the system does not say a process's peak memory (VmHWM)")


def engine(path: str | Path) -> str:
    """What runs the file, by its name."""
    return "ort" if str(path).endswith(".ort.onnx") else ""


def encoder(path: Path, threads: int) -> Orders:
    """Whole runs on seeded inputs."""
    runner = open_runner(path, engine=engine(path), threads=threads)
    feeds: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def run(batch: int, sequence: int) -> list[Times]:
        found = feeds.setdefault((batch, sequence), inputs(batch, sequence))
        first = seconds(lambda: runner.run(found))
        # Behind a wait cores are slow for some milliseconds, of which a long run does not take notice.
        return [first if first[0] > LONG else seconds(lambda: runner.run(found))]

    def inputs(batch: int, sequence: int) -> dict[str, np.ndarray]:
        shape, rng = (batch, sequence), np.random.default_rng(0)
        known = {"attention_mask": np.ones(shape, np.int64), "token_type_ids": np.zeros(shape, np.int64)}
        return {name: known.get(name, rng.integers(0, 20000, shape)) for name in runner.inputs}

    return {"first": lambda: run(1, 16), "run": run}


def decoder(path: Path, threads: int, room: int) -> Orders:
    """Reading a prompt, and token after token behind what was read; only the last logits are asked for."""
    model = open_decoder(path, engine=engine(path), threads=threads, room=room)
    rng = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return rng.integers(0, model.vocabulary, (1, count))

    def prefill(tokens: int) -> list[Times]:
        model.reset()
        text = ids(tokens)
        return [seconds(lambda: model.feed(text, last=True))]

    def decode(tokens: int) -> list[Times]:
        texts = [ids(1) for _ in range(tokens)]
        return [seconds(lambda text=text: model.feed(text, last=True)) for text in texts]

    return {"first": lambda: decode(1), "prefill": prefill, "decode": decode}


KINDS: dict[str, Callable[..., Orders]] = {"encoder": encoder, "decoder": decoder}


def seconds(run: Callable[[], object]) -> Times:
    start, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - cpu


def main(settings: dict[str, Any]) -> None:
    """Answer orders until standard input ends."""
    if settings["path"].endswith(".onnx"):
        import onnxruntime  # noqa: F401 # before the clock runs, and the memory is looked at
    else:
        from qgraph.runtime import _native

        _native.library()
    before, start = peak(), time.perf_counter()
    orders = KINDS[settings.pop("kind")](**settings)
    load = time.perf_counter() - start
    orders["first"]()
    answer({"load": load, "first": time.perf_counter() - start})
    for line in sys.stdin:
        order, *numbers = line.split()
        if order == "memory":
            answer({"before": before, "peak": peak()})
        else:
            answer(orders[order](*map(int, numbers)))


def answer(found: Any) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except QGraphError as error:
        sys.exit(f"error: {error}")
