"""What the order of a layer's inputs is worth: held-out output error by order, solver and kind of layer.

    python benchmarks/reorder_output_error.py [minilm stories260K tinystories-llama-4m] [--scheme ternary]
        [--solver itf pt2-llm gptq] [--samples 128] [--columns 128]

Rows: how inputs are ordered before blocks are cut. The first three need no order of their own: as the model
has it, at random (so that luck shows), by falling power of the inputs on calibration data (GPTQ's activation
order, across blocks). Then each layer by itself: PT2-LLM's SSR (`similarity`), the others of
qgraph/solvers/reorder.py, and what `choose_order` makes of them; these would cost a Gather each. Last what
`--reorder fold` does for nothing: one order for all layers of a residual stream.

Columns: kinds of layers, means over the model; for each solver E|x W - x W'|^2 / E|x W|^2 in percent, on text
that nothing was calibrated on (see nvfp4_output_error.py), in a sample of each layer's columns. Layers whose
inputs fit in one block are left out. Downloads nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from model_options import arguments, chosen
from output_error import SUBJECTS, Subject

from qgraph.calibration import collect, model_inputs, open_data
from qgraph.formats import FORMATS
from qgraph.passes import load_model, prepare_model
from qgraph.passes.reorder_inputs import REORDERS, ReorderInputs
from qgraph.passes.select_layers import DECISIONS, SelectLayers
from qgraph.solvers import get_solver
from qgraph.solvers.hessian import relative_output_error
from qgraph.solvers.reorder import (
    choose_order,
    direction_order,
    fitted_order,
    magnitude_order,
    plain,
    power_order,
    similarity_order,
)
from qgraph.solvers.statistics import Statistics

KINDS = {
    "query": "query",
    "key": "key",
    "value": "value",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "attention.output.dense": "attn out",
    "o_proj": "attn out",
    "intermediate.dense": "up",
    "gate_proj": "gate",
    "up_proj": "up",
    "output.dense": "down",
    "down_proj": "down",
    "lm_head": "logits",
    "pooler.dense": "pooler",
}


@dataclass(frozen=True)
class Layer:
    """A weight with a sample of its columns, the statistics of its inputs, and the order of the whole
    model."""

    kind: str
    W: npt.NDArray[np.float32]
    seen: Statistics
    held_out: Statistics
    folded: npt.NDArray[np.intp]


Orders = dict[str, Callable[[Layer], npt.NDArray[np.intp]]]


def orders(format: str) -> Orders:
    """Row -> the order for a layer."""
    block = FORMATS[format].block

    def fitted(layer: Layer) -> npt.NDArray[np.intp]:
        return fitted_order(layer.W, format, direction_order(layer.W))

    return {
        "as it is": lambda layer: np.arange(len(layer.W)),
        "random": lambda layer: np.random.default_rng(0).permutation(len(layer.W)),
        "power of inputs": lambda layer: power_order(layer.seen.second_moment.diagonal()),
        "similarity (SSR)": lambda layer: similarity_order(layer.W, block),
        "direction": lambda layer: direction_order(layer.W),
        "magnitude": lambda layer: magnitude_order([layer.W]),
        "direction, fitted": fitted,
        "chosen": lambda layer: choose_order([plain(layer.W, format)]).order,
        "folded": lambda layer: layer.folded,
    }


def layers(subject: Subject, scheme: str, samples: int, columns: int) -> list[Layer]:
    """All layers of more than one block, in graph order."""
    model = prepare_model(load_model(subject.model))
    SelectLayers()(model)
    moments = [
        collect(
            model,
            open_data(
                text,
                model_inputs(model),
                tokenizer=subject.tokenizer,
                samples=samples,
                length=subject.length,
            ),
        )
        for text in (subject.calibration, subject.held_out)
    ]
    ordered = model.clone()
    SelectLayers()(ordered)
    step = ReorderInputs(scheme)
    step(ordered)
    print("\n".join(str(refusal) for refusal in step.refusals))
    nodes = {node.name: node for node in model.graph}
    found = []
    for decision in model.meta[DECISIONS]:
        K, N = decision.shape if decision.quantize else (0, 0)
        if FORMATS[scheme].block >= K:
            continue
        value = nodes[decision.node_name].inputs[0].name
        W = model.graph.initializers[decision.weight].const_value.numpy()
        part = np.ascontiguousarray(W[:, np.random.default_rng(0).permutation(N)[:columns]])
        kind = next((short for end, short in KINDS.items() if decision.module.endswith(end)), decision.module)
        order = ordered.meta[REORDERS].get(value, np.arange(K))
        found.append(Layer(kind, part, moments[0][value], moments[1][value], order))
    return found


def error(layer: Layer, order: npt.NDArray[np.intp], scheme: str, solver: str) -> float:
    """Of the outputs, with the solver's weights put back into the order of the inputs."""
    H = layer.seen.second_moment[np.ix_(order, order)]
    q = get_solver(solver)(layer.W[order], format=scheme, H=H, tokens=layer.seen.tokens)
    back = np.empty_like(layer.W)
    back[order] = q.dequantize()
    return relative_output_error(layer.W, back, layer.held_out.second_moment)


def table(found: list[Layer], scheme: str, solvers: list[str]) -> None:
    """Print a row for each order as it is measured."""
    kinds = list(dict.fromkeys(layer.kind for layer in found))
    print(f"\n{scheme}, in each cell: {' / '.join(solvers)}\n")
    print(f"| % | {' | '.join([*kinds, 'mean of all'])} |\n|{'---|' * (len(kinds) + 2)}")
    for name, order in orders(scheme).items():
        errors = np.array([[error(x, p, scheme, s) for s in solvers] for x in found for p in [order(x)]])
        means = [errors[[layer.kind == kind for layer in found]].mean(axis=0) for kind in kinds]
        cells = [" / ".join(f"{100 * e:.3f}" for e in mean) for mean in [*means, errors.mean(axis=0)]]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print a table for every model."""
    parser = arguments(__doc__, SUBJECTS)
    parser.set_defaults(captions=False, padding=False)
    parser.add_argument("--scheme", default="ternary")
    parser.add_argument("--solver", nargs="+", default=["itf", "pt2-llm", "gptq"])
    parser.add_argument("--samples", type=int, default=128, help="sentences or windows, of each text")
    parser.add_argument("--columns", type=int, default=128, help="of each layer")
    options = parser.parse_args()
    for name in chosen(parser, options, SUBJECTS):
        with tempfile.TemporaryDirectory() as work:
            print(f"\n### {name}\n")
            subject = SUBJECTS[name](options, Path(work))
            found = layers(subject, options.scheme, options.samples, options.columns)
        table(found, options.scheme, options.solver)


if __name__ == "__main__":
    main()
