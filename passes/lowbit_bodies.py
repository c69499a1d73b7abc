"""What the low-bit operators are in standard ONNX: the bodies of model-local functions, the nodes that are
written in their place, and the patterns by which those are found again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qgraph.formats import e2m1, e4m3
from qgraph.formats.activations import INT8_MAX, SMALLEST_NORMAL
from qgraph.formats.nvfp4 import NVFP4

Inputs = Sequence[ir.Value | None]


@dataclass(frozen=True)
class LowbitOperator:
    """One operator of the domain `ai.qgraph`.

    Attributes:
        formals: names of its inputs.
        doc: what it computes.
        body: actual inputs -> nodes in order, each named after its part; the last one gives the result.
    """

    formals: tuple[str, ...]
    doc: str
    body: Callable[[Inputs], list[ir.Node]]


class _Body:
    """Collects the nodes of a body."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def add(self, part: str, op_type: str, *inputs: ir.Value | None, **attributes: object) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes, name=part)  # type: ignore[arg-type]
        node.outputs[0].name = part
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, part: str, array: np.ndarray) -> ir.Value:
        return self.add(part, "Constant", value=ir.Tensor(array, name=part))

    def number(self, part: str, value: float) -> ir.Value:
        return self.constant(part, np.array(value, np.float32))

    def ints(self, part: str, *values: int) -> ir.Value:
        return self.constant(part, np.array(values, np.int64))


def _float_like(value: ir.Value, like: ir.Value | None) -> None:
    value.type = ir.TensorType(ir.DataType.FLOAT)
    value.shape = like.shape if like is not None else None


def _nvfp4_weight(body: _Body, parts: Inputs, axis: int) -> ir.Value:
    """The weight in float32, its blocks along `axis`; `parts` are codes, block_scale and global_scale."""
    codes, block_scale, global_scale = parts
    scale = body.add("scale", "DequantizeLinear", block_scale, global_scale)
    weight = body.add("weight", "DequantizeLinear", codes, scale, axis=axis, block_size=NVFP4.block)
    _float_like(scale, block_scale)
    _float_like(weight, codes)
    return weight


def _linear_nvfp4(inputs: Inputs) -> list[ir.Node]:
    body = _Body()
    body.add("y", "MatMul", inputs[0], _nvfp4_weight(body, inputs[1:], axis=0))
    return body.nodes


def _gather_nvfp4(inputs: Inputs) -> list[ir.Node]:
    body = _Body()
    body.add("y", "Gather", _nvfp4_weight(body, inputs[1:], axis=1), inputs[0])
    return body.nodes


def _dynamic_nvfp4(inputs: Inputs) -> list[ir.Node]:
    """Whatever the rank of x; a last axis that 16 does not divide is padded to find the largest magnitude."""
    x, global_scale = inputs
    body = _Body()
    last, block = body.ints("last", -1), body.ints("block", NVFP4.block)
    length = body.add("length", "Shape", x, start=-1)
    missing = body.add("missing", "Mod", body.add("negative", "Neg", length), block)
    pads = body.add("pads", "Concat", body.ints("none", 0), missing, axis=0)
    padded = body.add("padded", "Pad", body.add("magnitude", "Abs", x), pads, None, last)
    lead = body.add("lead", "Shape", x, start=0, end=-1)
    shape = body.add("shape", "Concat", lead, last, block, axis=0)
    blocks = body.add("blocks", "Reshape", padded, shape)
    amax = body.add("amax", "ReduceMax", blocks, last, keepdims=0)
    top = body.add("top", "Mul", global_scale, body.number("largest_code", e2m1.MAX))
    ratio = body.add("ratio", "Div", amax, top)
    held = body.add("held", "Max", ratio, body.number("smallest_scale", e4m3.SMALLEST))
    block_scale = body.add("block_scale", "Cast", held, to=int(ir.DataType.FLOAT8E4M3FN), saturate=1)
    scale = body.add("scale", "DequantizeLinear", block_scale, global_scale)
    along = {"axis": -1, "block_size": NVFP4.block}
    fp4 = int(ir.DataType.FLOAT4E2M1)
    codes = body.add("codes", "QuantizeLinear", x, scale, output_dtype=fp4, **along)
    body.add("y", "DequantizeLinear", codes, scale, **along)
    return body.nodes


def _dynamic_int8(inputs: Inputs) -> list[ir.Node]:
    x = inputs[0]
    body = _Body()
    magnitude = body.add("magnitude", "Abs", x)
    amax = body.add("amax", "ReduceMax", magnitude, body.ints("last", -1), keepdims=1)
    ratio = body.add("ratio", "Div", amax, body.number("largest_code", INT8_MAX))
    scale = body.add("scale", "Max", ratio, body.number("smallest_scale", SMALLEST_NORMAL))
    codes = body.add("codes", "Round", body.add("quotient", "Div", x, scale))
    body.add("y", "Mul", codes, scale)
    return body.nodes


_WEIGHT = ("codes", "block_scale", "global_scale")

DEFINITIONS: dict[str, LowbitOperator] = {
    "QLinearNVFP4": LowbitOperator(
        ("x", *_WEIGHT),
        "y = x @ W with an NVFP4 weight W [K, N]. W[k, n] = e2m1(codes[k, n]) * s[floor(k / 16), n], "
        "s = f32(block_scale) * global_scale. codes: FLOAT4E2M1 [K, N]; block_scale: FLOAT8E4M3FN [ceil(K / "
        "16), N]; global_scale: FLOAT [].",
        _linear_nvfp4,
    ),
    "QGatherNVFP4": LowbitOperator(
        ("ids", *_WEIGHT),
        "y = rows `ids` of an NVFP4 table T [V, H]. T[v, h] = e2m1(codes[v, h]) * s[v, floor(h / 16)], "
        "s = f32(block_scale) * global_scale. codes: FLOAT4E2M1 [V, H]; block_scale: FLOAT8E4M3FN [V, "
        "ceil(H / 16)]; global_scale: FLOAT []. ids are those of Gather.",
        _gather_nvfp4,
    ),
    "DynamicQDQNVFP4": LowbitOperator(
        ("x", "global_scale"),
        "y = x [.., K] rounded to NVFP4 along its last axis, in float32. Of every block of 16 (the last may "
        "be shorter) d = e4m3(max(max|x| / (6 * global_scale), 2^-9)), at most 448, s = d * global_scale, "
        "y = e2m1(x / s) * s, at most 6 * s. global_scale: FLOAT [], positive, calibrated. A NaN makes its "
        "block NaN.",
        _dynamic_nvfp4,
    ),
    "DynamicQDQInt8": LowbitOperator(
        ("x",),
        "y = x [.., K] rounded to symmetric int8 by rows of its last axis, in float32: s = max(max|row| / "
        "127, 2^-126), y = round_half_even(x / s) * s. A row with a NaN or an infinity is NaN.",
        _dynamic_int8,
    ),
}
