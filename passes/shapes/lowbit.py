"""Quantization operators, and qgraph's own quantized layers."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.formats import FORMATS
from qgraph.passes.lowbit_weights import COLUMNS, LINEARS, WeightForm
from qgraph.passes.shapes.index import require_range
from qgraph.passes.shapes.linear import matmul_shape
from qgraph.passes.shapes.node import NodeView, rule


@rule("DequantizeLinear")
def dequantize(n: NodeView) -> None:
    _check_axis(n)
    output = n.attr("output_dtype", 0)
    n.out(0, ir.DataType(output) if output else n.dtype(1), n.shape(0))


@rule("QuantizeLinear")
def quantize(n: NodeView) -> None:
    _check_axis(n)
    output = n.attr("output_dtype", 0)
    dtype = ir.DataType(output) if output else n.dtype(2) if n.has(2) else ir.DataType.UINT8
    n.out(0, dtype, n.shape(0))


def _check_axis(n: NodeView) -> None:
    """One scale for the whole tensor, or a vector to quantize, makes the axis void."""
    if n.shape(1) not in ((), (1,)) and n.rank(0) > 1:
        n.axis(n.attr("axis", 1), n.rank(0))


@rule("DynamicQuantizeLinear")
def dynamic_quantize(n: NodeView) -> None:
    n.out(0, ir.DataType.UINT8, n.shape(0))
    n.out(1, ir.DataType.FLOAT, [])
    n.out(2, ir.DataType.UINT8, [])


@rule(*LINEARS, domain="ai.qgraph")
def qlinear(n: NodeView) -> None:
    """x [..., K], codes [K, N], block_scale [ceil(K/block), N] (, offsets likewise) -> y [..., N]."""
    _require_weight(n, LINEARS[n.node.op_type])
    n.out(0, n.dtype(0), matmul_shape(n, n.shape(0), n.shape(1)))


@rule(*COLUMNS, domain="ai.qgraph")
def qgather_columns(n: NodeView) -> None:
    """ids [...], the parts of a weight [K, N] as of QLinear -> y [K, ...]."""
    _require_weight(n, COLUMNS[n.node.op_type])
    k, columns = n.shape(1)
    require_range(n, columns, n.content(0))
    n.out(0, ir.DataType.FLOAT, [k, *n.shape(0)])


def _require_weight(n: NodeView, form: WeightForm) -> None:
    """Codes [K, N], and scales and offsets that fit them."""
    if n.rank(1) != 2 or n.rank(2) != 2:
        n.fail("codes and block scales must be matrices")
    (k, columns), block = n.shape(1), FORMATS[form.format].block
    of_blocks = [i for i, part in enumerate(form.parts, 1) if part not in ("codes", "global_scale")]
    for i in of_blocks:
        if not isinstance(k, int) or n.shape(i) != (-(-k // block), columns):
            what = form.parts[i - 1].replace("_", " ") + "s"
            n.fail(f"{what} {list(n.shape(i))} do not fit codes {[k, columns]} in blocks of {block}")


@rule("QGatherNVFP4", domain="ai.qgraph")
def qgather_nvfp4(n: NodeView) -> None:
    """ids [...], codes [V, H], block_scale [V, ceil(H/16)], global_scale [] -> y [..., H]."""
    if n.rank(1) != 2 or n.rank(2) != 2:
        n.fail("codes and block scales must be matrices")
    rows, h = n.shape(1)
    if not isinstance(h, int) or n.shape(2) != (rows, -(-h // 16)):
        n.fail(f"block scales {list(n.shape(2))} do not fit codes {[rows, h]} in blocks of 16")
    require_range(n, rows, n.content(0))
    n.out(0, ir.DataType.FLOAT, [*n.shape(0), h])


@rule("DynamicQDQNVFP4", "DynamicQDQInt8", domain="ai.qgraph")
def dynamic_qdq(n: NodeView) -> None:
    """x [.., K] float32 (, global_scale []) -> y as x."""
    if n.dtype(0) != ir.DataType.FLOAT or n.rank(0) < 1:
        n.fail(f"its input is {n.dtype(0)} of rank {n.rank(0)}, not rows of float32")
    if n.node.op_type == "DynamicQDQNVFP4" and (n.dtype(1), n.shape(1)) != (ir.DataType.FLOAT, ()):
        n.fail(f"its global scale is {n.dtype(1)} {list(n.shape(1))}, not one float32")
    n.out(0, ir.DataType.FLOAT, n.shape(0))
