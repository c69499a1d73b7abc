"""`ai.qgraph::DynamicQDQNVFP4` in operators that engines without 4-bit floats have, equal to the bit."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.export.matmul_nbits import block_view
from qgraph.export.rewrite import Replacement, input_of, rank, width
from qgraph.formats import e2m1, e4m3
from qgraph.formats.nvfp4 import BLOCK


def round_nvfp4(node: ir.Node) -> None:
    """Writes out x -> E2M1(x / s) s, with s from the largest of each block of 16.

    E2M1 numbers are 0.5 apart below 2, 1 below 4 and 2 up to 6; so the nearest one is round(v / step) * step,
    and a tie goes to an even quotient, which is an even code.
    """
    new = Replacement(node)
    x, scale = input_of(node, 0), input_of(node, 1)
    K = width(x)
    blocks = block_view(new, x, K, BLOCK, "x")
    amax = new.add("amax", "ReduceMax", new.add("magnitude", "Abs", blocks), new.ints("last", -1), keepdims=1)
    top = new.add("top", "Mul", scale, new.number("largest_code", e2m1.MAX))
    ratio = new.add("ratio", "Div", amax, top)
    held = new.add("held", "Max", ratio, new.number("smallest_scale", e4m3.SMALLEST))
    stored = new.add("block_scale", "Cast", held, to=int(ir.DataType.FLOAT8E4M3FN), saturate=1)
    widened = new.add("block_scale_f32", "Cast", stored, to=int(ir.DataType.FLOAT))
    s = new.add("scale", "Mul", widened, scale)
    v = new.add("quotient", "Div", blocks, s)
    size = new.add("size", "Abs", v)
    two, four = new.number("two", 2), new.number("four", 4)
    step = new.add("large", "Where", new.add("below_4", "Less", size, four), new.number("one", 1), two)
    step = new.add("step", "Where", new.add("below_2", "Less", size, two), new.number("half", 0.5), step)
    rounded = new.add("rounded", "Mul", new.add("steps", "Round", new.add("in_steps", "Div", v, step)), step)
    low, high = new.number("low", -e2m1.MAX), new.number("high", e2m1.MAX)
    y = new.add("y_blocks", "Mul", new.add("codes", "Clip", rounded, low, high), s)
    y = new.add("y", "Reshape", y, new.ints("y_shape", *[0] * (rank(x) - 1), -(-K // BLOCK) * BLOCK))
    if K % BLOCK:
        new.add("y_cut", "Slice", y, new.ints("from", 0), new.ints("to", K), new.ints("axis", -1))
    new.finish()
