"""Relative weight error |W - W'|^2 / |W|^2 and speed of every solver that needs no calibration.

    python benchmarks/nvfp4_weight_error.py [--model minilm.onnx] [--threads 2]

A line of several weights has the error of all of them together: eight draws of a distribution, or the weights
of the model that qgraph would quantize. `/ sweep` is the error relative to that of the exact block optimum,
`peak / W` the memory a solver takes at its peak, the result included, relative to the largest float32 weight.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from pathlib import Path

import numpy as np

from qgraph.solvers import SOLVERS

SHAPE = (256, 1024)
DRAWS = 8


def distributions(seed: int) -> dict[str, list[np.ndarray]]:
    """Name -> weights of one "model"."""
    rng = np.random.default_rng(seed)
    return {
        "N(0, 1)": [rng.standard_normal(SHAPE).astype(np.float32) for _ in range(DRAWS)],
        "Student t(4)": [rng.standard_t(4, SHAPE).astype(np.float32) for _ in range(DRAWS)],
        "N(0, 1), large": [rng.standard_normal((4096, 4096)).astype(np.float32)],
    }


def model_weights(path: Path) -> list[np.ndarray]:
    """The float32 [K, N] weights that `SelectLayers` chooses in the prepared model."""
    from qgraph.passes import load_model, prepare_model
    from qgraph.passes.select_layers import DECISIONS, SelectLayers

    model = prepare_model(load_model(path))
    SelectLayers()(model)
    names = dict.fromkeys(d.weight for d in model.meta[DECISIONS] if d.quantize)
    return [model.graph.initializers[name].const_value.numpy() for name in names]


def measure(solver: str, weights: list[np.ndarray], threads: int) -> tuple[float, float, float]:
    """(relative error, bits per weight, million weights a second) of a solver."""
    noise = signal = seconds = 0.0
    nbytes = 0
    for W in weights:
        start = time.perf_counter()
        q = SOLVERS[solver](W, threads=threads)
        seconds += time.perf_counter() - start
        noise += float(np.square(W - q.dequantize(), dtype=np.float64).sum())
        signal += float(np.square(W, dtype=np.float64).sum())
        nbytes += q.nbytes()
    size = sum(W.size for W in weights)
    return noise / signal, 8 * nbytes / size, size / seconds / 1e6


def peak_memory(solver: str, W: np.ndarray, threads: int) -> float:
    """Bytes that the solver has allocated at its peak, over those of W."""
    tracemalloc.start()
    q = SOLVERS[solver](W, threads=threads)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del q
    return peak / W.nbytes


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="an ONNX file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cases = distributions(options.seed)
    if options.model:
        cases[options.model.name] = model_weights(options.model)
    header = f"{'weights':16} {'solver':14} {'relative error':>14} {'/ sweep':>8} {'SQNR dB':>8}"
    print(f"{header} {'bits':>6} {'Mweights/s':>11} {'peak / W':>9}")
    solvers = [solver.name for solver in SOLVERS.values() if not solver.calibrated]
    for case, weights in cases.items():
        rows, peaks = {}, {}
        for solver in solvers:
            SOLVERS[solver](weights[0][:16, :16].copy(), threads=1)  # import it outside the clock
            rows[solver] = measure(solver, weights, options.threads)
            largest = max(weights, key=lambda W: W.size)
            peaks[solver] = peak_memory(solver, largest, options.threads)
        for solver, (error, bits, speed) in rows.items():
            ratio, sqnr = error / rows["sweep"][0], -10 * np.log10(error)
            line = f"{case:16} {solver:14} {error:14.5f} {ratio:8.3f} {sqnr:8.2f}"
            print(f"{line} {bits:6.3f} {speed:11.1f} {peaks[solver]:9.2f}")


if __name__ == "__main__":
    main()
