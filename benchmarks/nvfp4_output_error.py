"""Relative output error E|xW - xW'|^2 / E|xW|^2 of NVFP4 weights on inputs that calibration did not see.

    python benchmarks/nvfp4_output_error.py [minilm stories260K tinystories-llama-4m] [--samples 512]
    python benchmarks/nvfp4_output_error.py --speed [--size 4096] [--threads 2]

Layer by layer, in the float model: x is what the layer sees there. Solvers without calibration first, then
GPTQ with one thing more in each row; the last but one is the solver `gptq` as it is, `+ Hadamard 16` what a
rotation of the inputs in blocks of 16 would add to that. In percent.

* MiniLM: calibrated on sentences of the STS benchmark's train set, measured on its dev set. Columns: the four
  linear layers of encoder layer 2, then the mean of all layers.
* The decoders: windows of 256 tokens from the two ends of a file of TinyStories; the mean of all layers.

Padding tokens do not count. `--captions` shows how much the figures hang on the data: MiniLM calibrated and
measured on short captions alone (alternate sentences of the first 1000 of the dev set). Such inputs are much
alike, and what second-order methods leave is two to four times less than on mixed text. `--padding` takes the
first 512 of these in batches of 8 and counts the padding.

`--speed` times a square layer, each solver in a process of its own; `memory` is what it needed at its peak
beyond W and H. Downloads nothing; see end_to_end.py for the models.
"""

from __future__ import annotations

from functools import partial

from output_error import Array, Matrix, Quantize, arguments, print_speed, subjects, table

from qgraph.schemes import SCHEMES
from qgraph.solvers import SOLVERS, gptq, hessian


def variants(tokens: int) -> dict[str, Quantize]:
    """Row of the table -> how to quantize, after so many tokens of calibration."""

    def solver(name: str, W: Array, H: Matrix) -> Array:
        return SOLVERS[name](W, H=H, tokens=tokens).dequantize()

    def gptq_with(W: Array, H: Matrix, **options) -> Array:
        return gptq.solve(W, H=H, tokens=tokens, **options).dequantize()

    def rotated(W: Array, H: Matrix) -> Array:
        if len(W) % 16:
            return gptq_with(W, H)
        return hessian.rotate(gptq_with(hessian.rotate(W, 16), hessian.rotate_moment(H, 16)), 16)

    plain = {"order": False, "beams": 1, "rounds": 0}
    rows: dict[str, Quantize] = {name: partial(solver, name) for name in SCHEMES["nvfp4"].solvers[:0:-1]}
    rows |= {f"gptq, {s} scales": partial(gptq_with, scales=s, **plain) for s in gptq.SCALES}
    rows["+ order by power"] = partial(gptq_with, beams=1, rounds=0)
    rows["+ 8 paths"] = partial(gptq_with, rounds=0)
    rows |= {f"+ refinement, {n} of 4 rounds": partial(gptq_with, rounds=n) for n in (1, 2)}
    rows["gptq"] = gptq_with
    rows["+ Hadamard 16"] = rotated
    return rows


def main() -> None:
    """Print a table for every model, or of speed."""
    parser = arguments(__doc__)
    options = parser.parse_args()
    if options.speed:
        print_speed(
            [(name, "nvfp4") for name in SCHEMES["nvfp4"].solvers[::-1]], options.size, options.threads
        )
        return
    for found in subjects(parser, options):
        table(found, variants(found[0].tokens))


if __name__ == "__main__":
    main()
