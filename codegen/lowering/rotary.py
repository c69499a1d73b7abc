"""RotaryEmbedding-23, which reads and writes the halves where they lie: two elementwise kernels, or on a GPU,
where a kernel more is a pause more, one of its own."""

from __future__ import annotations

import onnx_ir as ir
import sympy

from qgraph.codegen.dims import grain_of, product, static
from qgraph.codegen.lowering.context import Lowering, Pointwise, lowers, unsupported
from qgraph.codegen.memory import View
from qgraph.codegen.spec import KernelSpec


def _by_head(view: View, heads: int) -> View | None:
    """[batch, heads, length, head size], of that or of [batch, length, heads * head size]."""
    if view.rank == 4:
        return view
    batch, length, width = view.shape
    split = view.reshape((batch, length, sympy.Integer(heads), sympy.expand(width / heads)))
    return None if split is None else split.transpose((0, 2, 1, 3))


def _cache(low: Lowering, node: ir.Node, index: int) -> View:
    """Cosines or sines as [batch or 1, 1, length, half of the rotated size]."""
    table, positions = node.inputs[index], node.inputs[3] if len(node.inputs) > 3 else None
    if table is None:
        raise unsupported(node, "an input is missing")
    view = low.view(table) if positions is None else _rows(low, node, table, positions)
    wide = view.reshape((view.shape[0], sympy.Integer(1), *view.shape[1:]))
    assert wide is not None, "an axis of length 1 fits anywhere"
    return wide


def _rows(low: Lowering, node: ir.Node, table: ir.Value, positions: ir.Value) -> View:
    """The rows of `table` [longest, half] at `positions` [batch, length]."""
    kind = low.dtype(positions)
    if kind not in ("i64", "i32"):
        raise unsupported(node, f"positions of type {kind}")
    longest, half = low.shape(table)
    out = low.temp("f32", (*low.shape(positions), half))
    count = product(low.shape(positions))
    args = [out, low.dense(table), low.dense(positions), ("status",), longest, count, half]
    spec = KernelSpec.make("gather", dtype="f32", index=kind)
    low.emit(f"{node.name}/{table.name}", spec, args, count, grain=grain_of(half))
    return out


def _emit_whole(
    low: Lowering,
    node: ir.Node,
    views: tuple[View, View, View, View],
    *,
    interleaved: bool,
    half: int,
    rest: int,
) -> None:
    """One step for all of y, of x, cosines and sines."""
    y, x, cos, sin = views
    batch, heads, length, _ = x.shape
    tables = [view.expand((batch, heads, length, view.shape[-1])) for view in (cos, sin)]
    spec = KernelSpec.make("rotary", half=half, rest=rest, interleaved=interleaved)
    strides = [*y.strides, *x.strides, *(table.strides[i] for table in tables for i in (0, 2, 3))]
    args = [y, x, *tables, batch, heads, length, *strides]
    blocks, _ = low.device.elementwise_blocks([batch, heads, length, sympy.Integer(half + rest)])
    low.emit(node.name or "RotaryEmbedding", spec, args, blocks)


@lowers("RotaryEmbedding", attributes="interleaved num_heads rotary_embedding_dim")
def rotary_embedding(low: Lowering, node: ir.Node) -> None:
    """Pairs of elements of each head turned by the angle of their position; the elements beyond
    `rotary_embedding_dim` stay as they are. A pair is (i, i + half), or (2i, 2i + 1) if interleaved."""
    value, result = node.inputs[0], node.outputs[0]
    if value is None or low.dtype(value) != "f32":
        raise unsupported(node, "supported is f32")
    heads = node.attributes.get_int("num_heads", 0)
    if len(low.shape(value)) == 3 and not heads:
        raise unsupported(node, "3-D input needs the attribute num_heads")
    x = _by_head(low.view(value), heads) or _by_head(low.dense(value), heads)
    out = low.allocate(result, strided=True)
    y = _by_head(out, heads)
    assert x is not None and y is not None, "a dense view takes any shape"
    size = static(x.shape[-1])
    if size is None:
        raise unsupported(node, f"head size {x.shape[-1]} must be constant")
    turned = node.attributes.get_int("rotary_embedding_dim", 0) or size
    if turned % 2 or turned > size:
        raise unsupported(node, f"{turned} of {size} elements of a head cannot be rotated in pairs")
    cos, sin = _cache(low, node, 1), _cache(low, node, 2)
    half = turned // 2
    if static(cos.shape[-1]) != half or static(sin.shape[-1]) != half:
        raise unsupported(node, f"caches must have {half} columns, not {cos.shape[-1]} and {sin.shape[-1]}")
    interleaved = bool(node.attributes.get_int("interleaved", 0))
    if low.device.has_rotary:
        _emit_whole(low, node, (y, x, cos, sin), interleaved=interleaved, half=half, rest=size - turned)
        low.bind(node, out)
        return
    first, second, step = (0, 1, 2) if interleaved else (0, half, 1)
    a, b = x.slice(3, first, half, step), x.slice(3, second, half, step)
    leaves = tuple(leaf.expand(a.shape) for leaf in (a, b, cos, sin))
    left, right, c, s = (("in", i) for i in range(4))
    name = node.name or "RotaryEmbedding"
    for expr, at in (
        (("sub", ("mul", c, left), ("mul", s, right)), first),
        (("add", ("mul", s, left), ("mul", c, right)), second),
    ):
        low.emit_pointwise(Pointwise(expr, leaves, (), a.shape, "f32", name), y.slice(3, at, half, step))
    if turned < size:
        rest = size - turned
        low.copy(x.slice(3, turned, rest), f"{name}/rest", y.slice(3, turned, rest))
    low.bind(node, out)
