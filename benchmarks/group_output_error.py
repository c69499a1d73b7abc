"""Relative output error E|xW - xW'|^2 / E|xW|^2 of integer and ternary weights, on inputs not calibrated on.

    python benchmarks/group_output_error.py [minilm stories260K tinystories-llama-4m] [--format ternary int2]
        [--samples 512] [--captions | --padding] [--swap] [--only TEXT]
    python benchmarks/group_output_error.py --speed [--format ternary] [--size 4096] [--threads 2]

Models, texts, columns and options are those of nvfp4_output_error.py; in brackets the weight error |W - W'|^2
/ |W|^2, all in percent. First what PT2-LLM (arXiv 2510.03267) is made of: ITF, AGA, GPTQ's feedback from
block to block, SSR; of ternary as published, which is from the threshold's grid and at GPTQ's usual damping,
0.01, from the best start (`itf`) at ours, and as improved: ITF in the norm of the inputs' power, AGA in turns
with rounding. Then feedback inside blocks too, on grids found in several ways, and the solver `gptq` step by
step; the last row but one is the solver as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from output_error import Array, Matrix, Quantize, arguments, print_speed, subjects, table

from qgraph.formats import FORMATS
from qgraph.solvers import GROUP_NAMES, SOLVERS, group_gptq, itf, pt2_llm
from qgraph.solvers.reorder import similarity_order

_SOLVERS = ("rtn", "itf", "pt2-llm", "gptq")


def variants(format: str, tokens: int) -> dict[str, Quantize]:
    """Row of the table -> how to quantize, after so many tokens of calibration."""

    def solver(name: str, W: Array, H: Matrix) -> Array:
        return SOLVERS[name](W, format=format, H=H, tokens=tokens).dequantize()

    def paper(W: Array, H: Matrix, **options) -> Array:
        return pt2_llm.solve(W, format=format, H=H, **options).dequantize()

    def reordered(W: Array, H: Matrix, **options) -> Array:
        order, result = similarity_order(W, FORMATS[format].block), np.empty_like(W)
        result[order] = paper(W[order], H[np.ix_(order, order)], **options)
        return result

    def ours(W: Array, H: Matrix, **options) -> Array:
        return group_gptq.solve(W, format=format, H=H, tokens=tokens, **options).dequantize()

    def published(W: Array, H: Matrix) -> Array:
        return itf.solve(W, format=format, starts=0).dequantize()

    plain = {"order": False, "sweeps": 0}
    rows: dict[str, Quantize] = {}
    if format == "ternary":
        rows["symmetric threshold (TWN)"] = symmetric_threshold
    rows["rtn"] = partial(solver, "rtn")
    settings = {"": {"starts": 1}, ", improved": {"starts": 1, "power": True, "aga": 5}}
    if format == "ternary":
        rows["itf, as published"] = published
        settings = {", as published": {"damping": 0.01}} | settings
    rows["itf"] = partial(solver, "itf")
    steps: dict[str, tuple[Callable[..., Array], dict]] = {
        "itf + AGA": (paper, {"compensate": False}),
        "itf, feedback from block to block": (paper, {"aga": 0}),
        "itf + AGA, feedback from block to block": (paper, {}),
        "+ SSR": (reordered, {}),
    }
    for name, (run, step) in steps.items():
        rows |= {name + how: partial(run, **setting | step) for how, setting in settings.items()}
    rows["pt2-llm"] = paper
    if format == "ternary":
        rows["feedback inside, itf, damping 0.01"] = partial(ours, grids="itf", damping=0.01, **plain)
    grids = {
        "rtn": "rtn",
        "itf": "itf",
        "power": "itf by power",
        "aga": "itf + AGA",
        "share": "itf + AGA for the block's share",
    }
    rows |= {f"feedback inside, {text}": partial(ours, grids=key, **plain) for key, text in grids.items()}
    rows["feedback inside, grids searched"] = partial(ours, **plain)
    rows["+ order by power"] = partial(ours, sweeps=0)
    rows |= {f"+ annealing, {n} of 32 sweeps": partial(ours, sweeps=n) for n in (4, 12)}
    rows["gptq"] = ours
    rows["gptq, 128 sweeps"] = partial(ours, sweeps=128)
    return rows


def symmetric_threshold(W: Array, H: Matrix) -> Array:
    """Ternary Weight Networks (arXiv 1605.04711): +-alpha beyond 0.75 mean|w| of a block, else 0. No mean."""
    result, block = np.empty_like(W), FORMATS["ternary"].block
    for start in range(0, len(W), block):
        w = W[start : start + block]
        size = np.abs(w)
        chosen = size > 0.75 * size.mean(axis=0)
        alpha = (size * chosen).sum(axis=0) / np.maximum(chosen.sum(axis=0), 1)
        result[start : start + block] = np.sign(w) * chosen * alpha
    return result


def main() -> None:
    """Print a table for every format and model, or of speed."""
    parser = arguments(__doc__)
    parser.add_argument("--format", nargs="+", default=["ternary"], choices=GROUP_NAMES)
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    options = parser.parse_args()
    if options.speed:
        for format in options.format:
            print(f"\n### {format}")
            chosen = [(name, format) for name in _SOLVERS if format in SOLVERS[name].modules]
            print_speed(chosen, options.size, options.threads)
        return
    for found in subjects(parser, options):
        for format in options.format:
            print(f"\n{format}")
            rows = variants(format, found[0].tokens)
            table(found, {name: rows[name] for name in rows if options.only in name}, weight_error=True)


if __name__ == "__main__":
    main()
