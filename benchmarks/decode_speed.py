"""How the time of a token grows with the text before it.

    python benchmarks/decode_speed.py MODEL.qg [MODEL.qg ...] [--onnx MODEL.onnx] [--tokens 1024] [--rounds 5]
        [--threads 0] [--plot FILE.svg]

Every model reads the same random tokens one by one, from an empty state to `--tokens`; the models take turns,
a whole text each, for `--rounds` rounds. A position's time is the median over rounds, a table row the median
of the positions around it. `growth`, what one more token of past costs, is the difference between the medians
of the last and the first third of the positions, by the distance of these thirds.

Of artifacts two more columns, from runs with every step timed: the attention steps, which read the past, and
all others, which should not depend on it. `--plot` needs matplotlib.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from qgraph.evaluate.decoders import Decoder, StatefulDecoder, open_decoder

ROWS = 8  # of a table
WINDOW = 16  # positions around a row's


def read(decoder: Decoder, ids: np.ndarray) -> np.ndarray:
    """Seconds of every token."""
    decoder.reset()
    times = np.empty(len(ids))
    for i, token in enumerate(ids):
        start = time.perf_counter()
        decoder.feed(token.reshape(1, 1), last=True)
        times[i] = time.perf_counter() - start
    return times


def profile(decoder: StatefulDecoder, ids: np.ndarray) -> np.ndarray:
    """Seconds [tokens, 2] of the steps of attention, and of the others."""
    decoder.reset()
    found = np.zeros((len(ids), 2))
    for i, token in enumerate(ids):
        for step, ns in decoder.profile(token.reshape(1, 1)).steps:
            found[i, 0 if "attention" in step.kernel else 1] += ns * 1e-9
    return found


def around(values: np.ndarray, position: int) -> np.ndarray:
    """The median near a position."""
    return np.median(values[max(0, position - WINDOW) : position + WINDOW], axis=0)


def growth(times: np.ndarray) -> float:
    """Seconds that a token of past adds to a token's time."""
    third = len(times) // 3
    return float(np.median(times[-third:]) - np.median(times[:third])) / (len(times) - third)


def table(name: str, times: np.ndarray, parts: np.ndarray | None) -> None:
    """Prints the markdown table of a model."""
    columns = ["past", "us a token", *(["attention", "all else"] if parts is not None else [])]
    print(f"\n### {name}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for position in np.linspace(WINDOW, len(times) - WINDOW, ROWS).astype(int):
        cells = [f"{position}", f"{1e6 * around(times, position):.1f}"]
        if parts is not None:
            cells += [f"{1e6 * part:.1f}" for part in around(parts, position)]
        print(f"| {' | '.join(cells)} |")
    rest = f", of all but attention {1e9 * growth(parts[:, 1]):.2f} ns" if parts is not None else ""
    print(f"\ngrowth: {1e9 * growth(times):.2f} ns a token of past{rest}", flush=True)


def plot(found: dict[str, np.ndarray], path: Path) -> None:
    """Times over positions, each smoothed by a running median."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, times in found.items():
        positions = np.arange(WINDOW, len(times) - WINDOW)
        axes.plot(positions, [1e6 * around(times, p) for p in positions], label=name)
    axes.set(xlabel="tokens before", ylabel="us a token", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    print(f"\nwrote {path}")


def main() -> None:
    """Print a table for every model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.qg")
    parser.add_argument("--onnx", type=Path, help="run by ONNX Runtime, beside them")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    decoders = {
        path.stem: open_decoder(path, threads=options.threads, room=options.tokens) for path in options.models
    }
    if options.onnx:
        decoders["ONNX Runtime"] = open_decoder(options.onnx, threads=options.threads)
    vocabulary = min(decoder.vocabulary for decoder in decoders.values())
    ids = np.random.default_rng(0).integers(0, vocabulary, options.tokens)
    rounds: dict[str, list[np.ndarray]] = {name: [] for name in decoders}
    for _ in range(options.rounds):
        for name, decoder in decoders.items():
            rounds[name].append(read(decoder, ids))
    found = {name: np.median(times, axis=0) for name, times in rounds.items()}
    for name, decoder in decoders.items():
        parts = None
        if isinstance(decoder, StatefulDecoder):
            parts = np.median([profile(decoder, ids) for _ in range(options.rounds)], axis=0)
        table(name, found[name], parts)
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
