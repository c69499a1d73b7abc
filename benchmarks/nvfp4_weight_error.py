"""Relative weight error |W - W'|^2 / |W|^2 and speed of every NVFP4 solver.

    python benchmarks/nvfp4_weight_error.py [--model minilm.onnx] [--threads 2]

The model's weights are those that qgraph would quantize; its error is that of all of them together.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from qgraph.schemes import SCHEMES
from qgraph.solvers import SOLVERS

SHAPE = (256, 1024)


def distributions(seed: int) -> dict[str, list[np.ndarray]]:
    """Name -> weights of one "model"."""
    rng = np.random.default_rng(seed)
    return {
        "N(0, 1)": [rng.standard_normal(SHAPE).astype(np.float32)],
        "Student t(4)": [rng.standard_t(4, SHAPE).astype(np.float32)],
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
    print(f"{'weights':24} {'solver':8} {'relative error':>14} {'SQNR dB':>8} {'bits':>6} {'Mweights/s':>11}")
    for case, weights in cases.items():
        for solver in reversed(SCHEMES["nvfp4"].solvers):
            SOLVERS[solver](weights[0][:16, :16].copy(), threads=1)  # import it outside the clock
            error, bits, speed = measure(solver, weights, options.threads)
            print(
                f"{case:24} {solver:8} {error:14.5f} {-10 * np.log10(error):8.2f} {bits:6.3f} {speed:11.1f}"
            )


if __name__ == "__main__":
    main()
