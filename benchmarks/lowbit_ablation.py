"""What each step of PT2-LLM and D2Quant brings at ternary and at 2 bits, and what comes after them.

    python benchmarks/lowbit_ablation.py [minilm stories260K tinystories-llama-4m] [--scheme ternary int2]

The rows are cumulative where they begin with `+`, in the order of the papers' own tables, on a model whose
earlier layers are quantized; those below are ours. Figures of a model with its weights rounded, as ONNX
Runtime computes it in float32:

* weight: |W - W'|^2 / |W|^2, output: E|x W - x W'|^2 / E|x W|^2 with x of the float model on text that
  nothing was calibrated on; means over all layers. Steps that make up for the errors of earlier layers
  aim at other weights than W, so these two judge them too hard; the last columns do not.
* Spearman's correlation and mean cosine on STS-B dev, or perplexity and divergence from the float model
  (end_to_end.py says on which text).
* bits a weight, scales and means counted.

Downloads nothing; see end_to_end.py for the models.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from end_to_end import SUBJECTS, Subject
from model_options import arguments, chosen

from qgraph.calibration import Data, StreamingCalibrator, collect, model_inputs, open_data
from qgraph.formats import QTensor
from qgraph.passes import load_model, prepare_model
from qgraph.passes.base import replace_node
from qgraph.passes.dual_scale import AbsorbDualScales
from qgraph.passes.fuse_mean_shift import FuseMeanShift
from qgraph.passes.insert_mean_shift import InsertMeanShift
from qgraph.passes.lowbit_functions import lowbit_nodes
from qgraph.passes.lowbit_weights import from_node
from qgraph.passes.quantize_weights import QUANTIZED, QuantizeWeights
from qgraph.passes.reorder_inputs import ReorderInputs
from qgraph.passes.select_layers import SelectLayers
from qgraph.solvers import SOLVERS, Solver
from qgraph.solvers.hessian import relative_output_error
from qgraph.solvers.reorder import KINDS, choose_order

NAME = "variant"  # of the solver of a row


@dataclass(frozen=True)
class Step:
    """A row: a solver with options, and what is done around it.

    calibrate_on: as the option of `qgraph compile`; empty is without data.
    """

    name: str
    module: str
    calibrate_on: str = "quantized"
    options: Mapping[str, Any] = field(default_factory=dict)
    reorder: tuple[str, ...] = ()  # kinds of orders
    dual_scale: bool = False
    mean_shift: str = ""


@dataclass(frozen=True)
class _Variant(Solver):
    """A solver with options that the command line does not have."""

    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, W: np.ndarray, *, format: str = "", **given: Any) -> QTensor:
        solve = import_module(f"qgraph.solvers.{self.modules[format]}").solve
        if not self.calibrated:
            given = {key: given[key] for key in ("name", "threads")}
        return solve(W, format=format, **self.options, **given)


def steps(format: str) -> list[Step]:
    """The rows of a table."""
    ours = partial(Step, module="group_gptq")
    weights = [Step("round to nearest", "group_rtn", ""), Step("least squares (ITF)", "itf", "")]
    if format == "ternary":
        paper = [
            Step("GPTQ in blocks", "pt2_llm", options={"fit": False, "aga": 0}),
            Step("+ ITF", "pt2_llm", options={"aga": 0}),
            Step("+ AGA", "pt2_llm"),
            Step("+ SSR", "pt2_llm", reorder=("similarity",)),
            Step("+ DAC (D2Quant)", "pt2_llm", reorder=("similarity",), mean_shift="attention"),
        ]
    else:
        plain = {"grids": "rtn", "sweeps": 0, "order": False}
        paper = [
            Step("GPTQ", "group_gptq", options=plain),
            Step("+ DSQ", "group_gptq", options=plain, dual_scale=True),
            Step("+ DAC", "group_gptq", options=plain, dual_scale=True, mean_shift="attention"),
        ]
    mine = [
        ours("gptq (ours)"),
        ours("gptq, corrected", calibrate_on="corrected"),
        ours("gptq, corrected, reordered", calibrate_on="corrected", reorder=KINDS),
        ours("gptq, corrected, dual scales", calibrate_on="corrected", dual_scale=True),
        ours("gptq, corrected, both", calibrate_on="corrected", reorder=KINDS, dual_scale=True),
        ours("gptq, corrected, mean shift", calibrate_on="corrected", mean_shift="all"),
    ]
    return [*weights, *paper, *mine]


def quantize(subject: Subject, step: Step, format: str, samples: int) -> tuple[ir.Model, ir.Model]:
    """(the float model with what is done to it before, the quantized model)."""
    model = prepare_model(load_model(subject.model))
    SelectLayers()(model)
    if step.reorder:
        ReorderInputs(format, choose=partial(choose_order, kinds=step.reorder))(model)
    if step.dual_scale:
        AbsorbDualScales(format)(model)
    before = model.clone()
    calibrator = None
    if step.calibrate_on:
        data = read(subject, subject.calibration, model, samples)
        calibrator = StreamingCalibrator(
            data, sequential=step.calibrate_on != "float", corrected=step.calibrate_on == "corrected"
        )
        if step.mean_shift:
            InsertMeanShift(step.mean_shift)(model)
    SOLVERS[NAME] = _Variant(NAME, {format: step.module}, "", calibrator is not None, step.options)
    QuantizeWeights(format, NAME, calibrator=calibrator)(model)
    FuseMeanShift()(model)
    return before, model


def read(subject: Subject, text: Path, model: ir.Model, samples: int) -> Data:
    """A text for a model, as `qgraph compile` reads it."""
    return open_data(text, model_inputs(model), tokenizer=subject.tokenizer, samples=samples or None)


def errors(before: ir.Model, after: ir.Model, subject: Subject, samples: int) -> tuple[float, float]:
    """Means over all layers of the weight error, and of the output error on `subject.held_out`."""
    moments = collect(before, read(subject, subject.held_out, before, samples))
    layers = {str(node.name): node for node in before.graph}
    found = []
    for node in lowbit_nodes(after):
        layer = layers[str(node.name)]
        weight, x = layer.inputs[1], layer.inputs[0]
        assert weight is not None and weight.const_value is not None and x is not None
        W, back = weight.const_value.numpy(), from_node(node).dequantize()
        H = moments[str(x.name)].second_moment
        weight_error = np.square(W - back, dtype=np.float64).sum() / np.square(W, dtype=np.float64).sum()
        found.append((weight_error, relative_output_error(W, back, H)))
    return tuple(np.mean(found, axis=0))  # type: ignore[return-value]


def dequantize(model: ir.Model, path: Path) -> Path:
    """The model with its weights as float32, as a file."""
    for node in lowbit_nodes(model):
        W = from_node(node).dequantize()
        value = ir.Value(
            name=f"{node.name}.weight",
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape(W.shape),
            const_value=ir.Tensor(W, name=f"{node.name}.weight"),
        )
        assert isinstance(node.graph, ir.Graph)
        node.graph.register_initializer(value)
        replace_node(node, [ir.node("MatMul", [node.inputs[0], value], name=node.name)])
    ir.save(model, path)
    return path


def table(subject: Subject, format: str, samples: int, only: str, work: Path) -> None:
    """Prints the markdown table of a model and a format, a row as soon as it is measured."""
    header = ("step", "bits", "weight", "output", *subject.columns, "s")
    print(f"\n### {subject.title}, {format}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    exact = subject.measure(subject.model)
    row(["float", "32", "", "", *(f"{exact[c]:.4f}" for c in subject.columns), ""])
    for step in steps(format):
        if only not in step.name:
            continue
        start = time.perf_counter()
        before, after = quantize(subject, step, format, samples)
        seconds = time.perf_counter() - start
        weights = after.meta[QUANTIZED]
        bits = 8 * sum(w.nbytes for w in weights) / sum(w.shape[0] * w.shape[1] for w in weights)
        weight, output = errors(before, after, subject, samples)
        found = subject.measure(dequantize(after, work / "rounded.onnx"))
        figures = [
            f"{bits:.3f}",
            f"{weight:.4f}",
            f"{output:.4f}",
            *(f"{found[c]:.4f}" for c in subject.columns),
        ]
        row([step.name, *figures, f"{seconds:.0f}"])


def row(cells: list[str]) -> None:
    """Prints a row."""
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = arguments(__doc__, SUBJECTS)
    parser.add_argument("--scheme", nargs="+", default=["ternary", "int2"])
    parser.add_argument("--samples", type=int, default=0, help="of calibration; default as `qgraph compile`")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    options = parser.parse_args()
    names = chosen(parser, options, SUBJECTS)
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            subject = SUBJECTS[name](options, Path(temporary))
            for scheme in options.scheme:
                table(subject, scheme, options.samples, options.only, Path(temporary))


if __name__ == "__main__":
    main()
