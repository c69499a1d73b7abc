"""Linear layers with group-quantized weights: ternary, int2, int3, int4, int4-sym, int8."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qgraph.codegen import packing_group as packing
from qgraph.codegen.lowering.context import Linear, Lowering, lowers, unsupported
from qgraph.codegen.lowering.linear import left_operand
from qgraph.codegen.memory import Buffer
from qgraph.errors import InputError
from qgraph.formats import FORMATS, BlockFormat, QTensor
from qgraph.formats.group import GROUP_FORMATS, from_integers

OPERATORS = {spec.title: spec for spec in GROUP_FORMATS}  # by the end of their operators' names
_TERNARY = {"fast": "2bit", "small": "base3"}  # how `Lowering.packing` has ternary codes


@lowers(*(f"QLinear{title}" for title in OPERATORS), domain="ai.qgraph", data=(0,))
def qlinear_group(low: Lowering, node: ir.Node) -> None:
    """`QLinear<Format>(x, codes, block_scale[, zero_point | mean])`: the weight stays packed."""
    x = node.inputs[0]
    if x is None:
        raise unsupported(node, "an input is missing")
    if low.dtype(x) != "f32":
        raise unsupported(node, f"an input of type {low.dtype(x)}; supported is f32")
    spec = OPERATORS[node.op_type.removeprefix("QLinear")]
    q, weights, params = group_weight(low, node, spec)
    k, n = q.shape
    op, operand, wanted = left_operand(low, x, k, spec, params.get("packing", ""))
    sums = None
    if op != spec.kernel:
        params = {"block": spec.block}
    elif low.device.integers and spec.offset == "mean" and len(operand) == 1:  # digits come with sums
        sums = low.block_sums(x, k, spec.block)
    shape, rest = low.shape(node.outputs[0]), tuple((params | wanted).items())
    low.bind(node, Linear(node, op, operand, k, n, weights, shape, params=rest, sums=sums))


def group_weight(
    low: Lowering, node: ir.Node, spec: BlockFormat
) -> tuple[QTensor, tuple[Buffer, ...], dict[str, Any]]:
    """The weight of a low-bit node in a group format, its buffers packed for kernels, and what of the layout
    these have to know."""
    q = _weight(low, node, spec)
    params: dict[str, Any] = {"block": spec.block}
    if q.format == "ternary":
        params["packing"] = _TERNARY[low.packing]
    return q, _buffers(low, node, q, packing.code_layout(q.format, params.get("packing", ""))), params


def _weight(low: Lowering, node: ir.Node, spec: BlockFormat) -> QTensor:
    """The weight of a node, its parts checked: InputError says which node they are wrong in."""
    parts = [low.constant(value) for value in node.inputs[1:]]
    if len(parts) != (2 if spec.offset == "none" else 3) or any(part is None for part in parts):
        raise unsupported(node, "codes, scales and offsets must be initializers")
    codes, scale, *offset = (part for part in parts if part is not None)
    if offset and spec.offset == "zero_point":
        offset = [from_integers(spec, offset[0])]
    try:
        return QTensor(
            spec.name,
            (codes.shape[0], codes.shape[1]),
            from_integers(spec, codes),
            scale,
            block_offset=offset[0] if offset else None,
        )
    except InputError as error:
        raise InputError(f"{node.op_type} node '{node.name}': {error}") from error


def _buffers(low: Lowering, node: ir.Node, q: QTensor, layout: str) -> tuple[Buffer, ...]:
    codes, scale, *offset = (value for value in node.inputs[1:] if value is not None)
    dtype = "i8" if layout == "n16t5" else "u32"
    buffers = [
        low.weight(codes, layout, dtype, lambda: packing.pack_codes(q.format, q.codes, layout)),
        low.weight(scale, "n16", "f16", lambda: packing.pack_blocks(q.block_scale)),
    ]
    if q.block_offset is not None:
        values = q.block_offset
        if FORMATS[q.format].offset == "mean":
            buffers.append(low.weight(offset[0], "n16", "f16", lambda: packing.pack_blocks(values)))
        else:
            buffers.append(low.weight(offset[0], "n16z4", "u8", lambda: packing.pack_nibbles(values)))
    return tuple(buffers)
