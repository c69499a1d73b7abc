"""What the low-bit operators are in standard ONNX: the bodies of model-local functions, the nodes that are
written in their place, and the patterns by which those are found again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from qgraph.formats import FORMATS, e2m1, e4m3
from qgraph.formats.activations import INT8_MAX, SMALLEST_NORMAL
from qgraph.formats.nvfp4 import NVFP4
from qgraph.passes.lowbit_weights import LINEARS, LOOKUPS, WeightForm

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

    def ints0(self, part: str, value: int) -> ir.Value:
        return self.constant(part, np.array(value, np.int64))


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


def _group_weight(body: _Body, parts: Inputs, form: WeightForm) -> ir.Value:
    """The weight of a group format in float32; `parts` are codes, block_scale and the offset, if any."""
    spec = FORMATS[form.format]
    codes, block_scale, *offset = parts
    float32 = int(ir.DataType.FLOAT)
    zero = offset if spec.offset == "zero_point" else []
    scale = body.add("scale", "Cast", block_scale, to=float32)
    part = "levels" if spec.offset == "mean" else "weight"
    weight = body.add(part, "DequantizeLinear", codes, scale, *zero, axis=0, block_size=spec.block)
    _float_like(scale, block_scale)
    _float_like(weight, codes)
    if spec.offset != "mean":
        return weight
    rows = body.add("inputs", "Squeeze", body.add("length", "Shape", codes, start=0, end=1))
    each = body.add("input", "Range", body.ints0("first", 0), rows, body.ints0("step", 1))
    block = body.add("block", "Div", each, body.ints("block_size", spec.block))
    means = body.add("means", "Gather", body.add("mean_f32", "Cast", offset[0], to=float32), block, axis=0)
    weight = body.add("weight", "Add", weight, means)
    _float_like(weight, codes)
    return weight


def _weight(body: _Body, parts: Inputs, form: WeightForm) -> ir.Value:
    """The weight of a linear layer in float32."""
    if form.format == NVFP4.name:
        return _nvfp4_weight(body, parts, axis=0)
    return _group_weight(body, parts, form)


def _linear(form: WeightForm, inputs: Inputs) -> list[ir.Node]:
    body = _Body()
    body.add("y", "MatMul", inputs[0], _weight(body, inputs[1:], form))
    return body.nodes


def _columns(form: WeightForm, inputs: Inputs) -> list[ir.Node]:
    body = _Body()
    body.add("y", "Gather", _weight(body, inputs[1:], form), inputs[0], axis=1)
    return body.nodes


def _lookup(inputs: Inputs) -> list[ir.Node]:
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


def _group_doc(form: WeightForm) -> str:
    spec, codes = FORMATS[form.format], form.code_type.name
    lowest, highest = (int(spec.values[i]) for i in (0, -1))
    value, stored = f"codes[k, n] * s[b, n], b = floor(k / {spec.block})", ""
    if spec.offset == "zero_point":
        value = f"(codes[k, n] - zero_point[b, n]) * s[b, n], b = floor(k / {spec.block})"
        stored = f"; zero_point: {codes} as block_scale"
    elif spec.offset == "mean":
        value = f"codes[k, n] * s[b, n] + mean[b, n], b = floor(k / {spec.block})"
        stored = "; mean: FLOAT16 as block_scale"
    return (
        f"y = x @ W with a weight W [K, N] in {form.format}. W[k, n] = {value}, s = f32(block_scale). codes: "
        f"{codes} [K, N] of {lowest} to {highest}; block_scale: FLOAT16 [ceil(K / {spec.block}), N]{stored}."
    )


_GROUP_LINEARS = {
    form.linear: LowbitOperator(("x", *form.parts), _group_doc(form), partial(_linear, form))
    for form in LINEARS.values()
    if form.format != NVFP4.name
}
_COLUMN_LOOKUPS = {
    form.columns: LowbitOperator(
        ("ids", *form.parts),
        f"y = columns `ids` of a weight W [K, N] as {form.linear} has it: an embedding tied to that layer. "
        "ids are those of Gather along axis 1.",
        partial(_columns, form),
    )
    for form in LINEARS.values()
}
DEFINITIONS: dict[str, LowbitOperator] = {
    **_GROUP_LINEARS,
    **_COLUMN_LOOKUPS,
    "QLinearNVFP4": LowbitOperator(
        ("x", *LINEARS["QLinearNVFP4"].parts),
        "y = x @ W with an NVFP4 weight W [K, N]. W[k, n] = e2m1(codes[k, n]) * s[floor(k / 16), n], "
        "s = f32(block_scale) * global_scale. codes: FLOAT4E2M1 [K, N]; block_scale: FLOAT8E4M3FN [ceil(K / "
        "16), N]; global_scale: FLOAT [].",
        partial(_linear, LINEARS["QLinearNVFP4"]),
    ),
    "QGatherNVFP4": LowbitOperator(
        ("ids", *LOOKUPS["QGatherNVFP4"].parts),
        "y = rows `ids` of an NVFP4 table T [V, H]. T[v, h] = e2m1(codes[v, h]) * s[v, floor(h / 16)], "
        "s = f32(block_scale) * global_scale. codes: FLOAT4E2M1 [V, H]; block_scale: FLOAT8E4M3FN [V, "
        "ceil(H / 16)]; global_scale: FLOAT []. ids are those of Gather.",
        _lookup,
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
