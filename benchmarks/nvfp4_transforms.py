"""Output error E|x W - x^ W'|^2 / E|x W|^2 of NVFP4 layers behind scale migration and Hadamard rotation.

    python benchmarks/nvfp4_transforms.py model.onnx train.txt held-out.txt --tokenizer tokenizer.json

W' is the solver's, from the second moment over the first text; x are rows of the second. W4A16 leaves x as
it is, W4A4 rounds it to dynamic NVFP4 with a global scale from the first text. A figure is the geometric mean
over layers. "insert" allows a Mul where no norm or layer takes the scales; "auto" chooses alpha for each
site, or none, by the error of the sweep.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qgraph.calibration import collect, model_inputs, open_data
from qgraph.calibration.data import Data
from qgraph.evaluate.runners import OnnxRuntimeRunner
from qgraph.formats.activations import dynamic_nvfp4
from qgraph.formats.nvfp4 import global_scale
from qgraph.passes import load_model, prepare_model
from qgraph.passes.base import GraphPass
from qgraph.passes.channel_sources import chosen_matmuls
from qgraph.passes.linear_groups import linear_groups
from qgraph.passes.migrate_scales import MigrateScales, weight_error
from qgraph.passes.rotate_inputs import RotateInputs
from qgraph.passes.select_layers import SelectLayers
from qgraph.solvers import SOLVERS
from qgraph.solvers.statistics import Statistics

GRID = (0.25, 0.375, 0.5, 0.625, 0.75)
ROWS = 2048  # of the held-out text

Known = dict[str, Statistics]
Variant = Callable[[Known], list[GraphPass]]


def migrate(known: Known, alpha: float, insert: bool = False) -> MigrateScales:
    return MigrateScales({name: s.amax for name, s in known.items()}, alpha, insert=insert)


def choose(known: Known, insert: bool) -> MigrateScales:
    score = weight_error(lambda name: known[name].second_moment)
    return MigrateScales({name: s.amax for name, s in known.items()}, GRID, score=score, insert=insert)


VARIANTS: dict[str, Variant] = {
    "none": lambda known: [],
    "migrate 0.25": lambda known: [migrate(known, 0.25)],
    "migrate 0.5": lambda known: [migrate(known, 0.5)],
    "migrate 0.75": lambda known: [migrate(known, 0.75)],
    "migrate auto": lambda known: [choose(known, False)],
    "migrate 0.5, insert": lambda known: [migrate(known, 0.5, True)],
    "migrate auto, insert": lambda known: [choose(known, True)],
    "rotate 16": lambda known: [RotateInputs(16)],
    "rotate 32": lambda known: [RotateInputs(32)],
    "rotate 128": lambda known: [RotateInputs(128)],
    "migrate 0.5, rotate 16": lambda known: [migrate(known, 0.5), RotateInputs(16)],
    "auto, insert, rotate 128": lambda known: [choose(known, True), RotateInputs(128)],
}


def load(path: Path, exclude: list[str]) -> ir.Model:
    model = prepare_model(load_model(path))
    SelectLayers(exclude=exclude)(model)
    return model


def rows(model: ir.Model, data: Data, names: list[str]) -> dict[str, np.ndarray]:
    """The first rows [tokens, K] of values, padding left out."""
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    for name in names:
        proto.graph.output.add(name=name).type.tensor_type.elem_type = 1
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(proto.SerializeToString())
        runner = OnnxRuntimeRunner(path, threads=2)
        for batch in data:
            for name, value in runner.run({k: batch.feeds[k] for k in runner.inputs}).items():
                kept = np.ones(value.shape[:-1], bool)
                tokens = batch.tokens
                found[name].append(value[kept if tokens is None or tokens.shape != kept.shape else tokens])
    return {name: np.concatenate(parts)[:ROWS] for name, parts in found.items()}


def errors(
    model: ir.Model, train: Data, held_out: Data, solvers: list[str], every: int
) -> dict[str, tuple[float, float]]:
    """Solver -> geometric mean over layers of the relative output error in W4A16 and in W4A4."""
    groups = linear_groups(chosen_matmuls(model))[::every]
    names = [group.values[0] for group in groups]
    known, seen = collect(model, train, names), rows(model, held_out, names)
    logs: dict[str, list[tuple[float, float]]] = {solver: [] for solver in solvers}
    for group in groups:
        name = group.values[0]
        x = seen[name]
        rounded = dynamic_nvfp4(x, global_scale(known[name].largest))
        for weight in group.weights:
            W = model.graph.initializers[weight].const_value.numpy()
            exact = x.astype(np.float64) @ W
            for solver in solvers:
                back = SOLVERS[solver](W, H=known[name].second_moment, name=weight).dequantize()
                pair = [np.square(v.astype(np.float64) @ back - exact).sum() for v in (x, rounded)]
                logs[solver].append(tuple(np.log(np.array(pair) / np.square(exact).sum())))
    return {solver: tuple(np.exp(np.mean(pairs, axis=0))) for solver, pairs in logs.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--length", type=int, help="tokens of a window; every line by itself without")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--solvers", nargs="+", default=["sweep", "gptq"])
    parser.add_argument("--exclude", nargs="*", default=[], help="as of `qgraph compile`")
    parser.add_argument("--every", type=int, default=1, help="measure every so many groups of layers")
    options = parser.parse_args()

    def read(path: Path) -> Data:
        return open_data(
            path, inputs, tokenizer=options.tokenizer, length=options.length, samples=options.samples
        )

    model = load(options.model, options.exclude)
    inputs = model_inputs(model)
    train, held_out = read(options.train), read(options.held_out)
    known = collect(model, train)
    columns = [f"{solver} {kind}" for solver in options.solvers for kind in ("W4A16", "W4A4")]
    print(f"| 1e-3 | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, variant in VARIANTS.items():
        model = load(options.model, options.exclude)
        for step in variant(known):
            step(model)
        found = errors(model, train, held_out, options.solvers, options.every)
        cells = [f"{1e3 * e:.3f}" for solver in options.solvers for e in found[solver]]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
