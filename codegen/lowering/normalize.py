"""Normalisations and reductions: kernels that work along rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qgraph.codegen.dims import Dim, grain_of, product, static
from qgraph.codegen.lowering.context import Lowering, Pointwise, lowers, unsupported
from qgraph.codegen.memory import View
from qgraph.codegen.spec import KernelSpec


@lowers("LayerNormalization", "RMSNormalization", attributes="axis epsilon stash_type")
def layer_norm(low: Lowering, node: ir.Node) -> None:
    """LayerNormalization and RMSNormalization over the trailing axes."""
    x, scale, bias = (*node.inputs, None)[:3]
    if x is None or scale is None:
        raise unsupported(node, "an input is missing")
    if any(low.uses[v] for v in node.outputs[1:]):
        raise unsupported(node, "only the normalised output is supported")
    if low.dtype(x) != "f32":
        raise unsupported(node, f"data type {low.dtype(x)}; supported is f32")
    shape = low.shape(x)
    axis = node.attributes.get_int("axis", -1) % len(shape)
    n = static(product(shape[axis:]))
    if n is None:
        raise unsupported(node, f"normalised size {product(shape[axis:])} must be constant")
    for value in (scale, bias):
        if value is not None and product(low.shape(value)) != n:
            raise unsupported(node, f"'{value.name}' must have {n} elements")
    rms = node.op_type == "RMSNormalization"
    spec = KernelSpec.make(
        "layer_norm", n=n, eps=node.attributes.get_float("epsilon", 1e-5), rms=rms, bias=bias is not None
    )
    operands = [low.dense(x), low.dense(scale), *([low.dense(bias)] if bias is not None else [])]
    out = low.allocate(node.outputs[0])
    rows = product(shape[:axis])
    step = low.emit(node.name or node.op_type, spec, [out, *operands, rows], rows, grain=grain_of(n))
    low.layers.append((node, step))
    low.bind(node, out)


@lowers("Softmax", "LogSoftmax", attributes="axis")
def softmax(low: Lowering, node: ir.Node) -> None:
    """Softmax along one axis; an inner axis is moved to the end and back."""
    x = node.inputs[0]
    if x is None or low.dtype(x) != "f32":
        raise unsupported(node, "supported is f32")
    shape = low.shape(x)
    axis = node.attributes.get_int("axis", -1) % len(shape)
    perm = (*(i for i in range(len(shape)) if i != axis), axis)
    moved = low.view(x).transpose(perm)
    source = moved if moved.is_dense() else low.copy(moved, f"{node.name}/copy")
    last = axis == len(shape) - 1
    out = low.allocate(node.outputs[0]) if last else low.temp("f32", source.shape)
    spec = KernelSpec.make("softmax", log=node.op_type == "LogSoftmax")
    n = shape[axis]
    step = low.emit(node.name or node.op_type, spec, [out, source, n], product(source.shape[:-1]), grain=8)
    low.layers.append((node, step))
    inverse = tuple(perm.index(i) for i in range(len(perm)))
    low.bind(node, out if last else out.transpose(inverse))


_REDUCE = {
    "ReduceSum": "sum",
    "ReduceMean": "mean",
    "ReduceMax": "max",
    "ReduceMin": "min",
    "ReduceProd": "prod",
    "ReduceSumSquare": "sumsq",
    "ReduceL2": "l2",
}


def _axes(low: Lowering, node: ir.Node, rank: int) -> Sequence[int]:
    axes: Sequence[int] | np.ndarray | None = low.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None:
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            raise unsupported(node, "axes must be constant")
        axes = node.attributes.get_ints("axes", None)
    if axes is None or len(axes) == 0:
        return [] if node.attributes.get_int("noop_with_empty_axes", 0) else range(rank)
    return sorted({int(a) % rank for a in axes})


@lowers(*_REDUCE, data=(0,), attributes="axes keepdims noop_with_empty_axes")
def reduce(low: Lowering, node: ir.Node) -> None:
    """Reductions over any set of axes; axes that do not lie side by side are first moved to the end."""
    x = node.inputs[0]
    if x is None:
        raise unsupported(node, "an input is missing")
    shape = low.shape(x)
    axes = _axes(low, node, len(shape))
    view = low.dense(x)
    if not axes:  # a reduction over nothing, of each element by itself
        alone = {"l2": ("abs", ("in", 0)), "sumsq": ("mul", ("in", 0), ("in", 0))}
        expr = alone.get(_REDUCE[node.op_type], ("in", 0))
        low.bind(node, Pointwise(expr, (view,), (), shape, view.dtype, node.name or node.op_type))
        return
    inner: Dim
    if list(axes) == list(range(axes[0], axes[-1] + 1)):
        outer, n, inner = (
            product(shape[a:b]) for a, b in ((0, axes[0]), (axes[0], axes[-1] + 1), (axes[-1] + 1, None))
        )
    else:
        kept = [i for i in range(len(shape)) if i not in axes]
        view = low.copy(view.transpose((*kept, *axes)), f"{node.name}/copy")
        outer, n, inner = product(shape[i] for i in kept), product(shape[i] for i in axes), product(())
    out = low.allocate(node.outputs[0])
    spec = KernelSpec.make("reduce", op=_REDUCE[node.op_type], dtype=low.dtype(x))
    low.emit(node.name or node.op_type, spec, [out, view, n, inner], outer, grain=8)
    low.bind(node, View.of(out.buffer))
