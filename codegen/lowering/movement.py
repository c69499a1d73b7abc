"""Operators that only rearrange: most become another view of the same memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import sympy

from qgraph.codegen.dims import Dim, grain_of, product, static
from qgraph.codegen.lowering.context import Lowering, Pointwise, lowers, unsupported
from qgraph.codegen.lowering.embedding import gather_columns
from qgraph.codegen.memory import View
from qgraph.codegen.spec import KernelSpec


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    if value is None:
        raise unsupported(node, "an input is missing")
    return value


@lowers("Reshape", "Flatten", "Squeeze", "Unsqueeze", data=(0,), attributes="allowzero axis axes")
def reshape(low: Lowering, node: ir.Node) -> None:
    """A new shape over the same elements; shape inference has worked it out."""
    value = _first(node)
    shape = low.shape(node.outputs[0])
    view = low.view(value).reshape(shape)
    if view is None:
        view = low.dense(value).reshape(shape)
        assert view is not None, "a dense view takes any shape"
    low.bind(node, view)


@lowers("Identity", data=(0,))
def identity(low: Lowering, node: ir.Node) -> None:
    """No operation at inference."""
    low.bind(node, low.view(_first(node)))


@lowers("Transpose", attributes="perm")
def transpose(low: Lowering, node: ir.Node) -> None:
    view = low.view(_first(node))
    perm = node.attributes.get_ints("perm", None) or tuple(reversed(range(view.rank)))
    low.bind(node, view.transpose(tuple(perm)))


@lowers("Expand", data=(0,))
def expand(low: Lowering, node: ir.Node) -> None:
    low.bind(node, low.view(_first(node)).expand(low.shape(node.outputs[0])))


def _integers(low: Lowering, node: ir.Node, index: int, name: str) -> list[Dim] | None:
    value = node.inputs[index] if len(node.inputs) > index else None
    integers = low.integers(value)
    if integers is None and value is not None:
        raise unsupported(node, f"{name} depend on data")
    return integers


@lowers("Slice", data=(0,))
def slice_(low: Lowering, node: ir.Node) -> None:
    """A window of the input. Its lengths are known from shape inference, so that the ends are not needed."""
    value = _first(node)
    view, shape = low.view(value), low.shape(node.outputs[0])
    starts = _integers(low, node, 1, "starts")
    if starts is None:
        raise unsupported(node, "starts are missing")
    axes = _integers(low, node, 3, "axes") or [sympy.Integer(i) for i in range(len(starts))]
    steps = _integers(low, node, 4, "steps") or [sympy.Integer(1)] * len(starts)
    for start, axis_size, step_size in zip(starts, axes, steps, strict=True):
        axis, step = static(axis_size), static(step_size)
        if axis is None or step is None:
            raise unsupported(node, "axes and steps must be constant")
        axis %= view.rank
        length = view.shape[axis]
        first = start if not start.is_negative else length + start
        last = length if step > 0 else length - 1
        view = view.slice(axis, sympy.Max(0, sympy.Min(first, last)), shape[axis], step)
    low.bind(node, view)


@lowers("Split", data=(0,), attributes="axis num_outputs")
def split(low: Lowering, node: ir.Node) -> None:
    view = low.view(_first(node))
    axis = node.attributes.get_int("axis", 0) % view.rank
    pieces, at = [], sympy.Integer(0)
    for out in node.outputs:
        length = low.shape(out)[axis]
        pieces.append(view.slice(axis, at, length))
        at = at + length
    low.bind(node, *pieces)


@lowers("Concat", attributes="axis")
def concat(low: Lowering, node: ir.Node) -> None:
    """Each input is copied (or computed) into its window of the result."""
    out = low.allocate(node.outputs[0], strided=True)
    axis = node.attributes.get_int("axis") % out.rank
    at: Dim = sympy.Integer(0)
    for i, value in enumerate(node.inputs):
        if value is None:
            raise unsupported(node, "an input is missing")
        length = low.shape(value)[axis]
        window = out.slice(axis, at, length)
        lazy = low.get(value)
        if isinstance(lazy, Pointwise) and low.uses[value] == 1:
            low.emit_pointwise(lazy, window)
        elif length != 0:
            low.copy(low.view(value), f"{node.name}/{i}", window)
        at = at + length
    low.bind(node, out)


@lowers("Gather", attributes="axis")
def gather(low: Lowering, node: ir.Node) -> None:
    """Rows picked by index; a single constant index is a view."""
    data, indices = node.inputs
    if data is None or indices is None:
        raise unsupported(node, "an input is missing")
    axis = node.attributes.get_int("axis", 0) % len(low.shape(data))
    matrix, constant = low.constant(data), low.constant(indices)
    tied = any(user.op_type == "MatMul" and at == 1 for user, at in data.uses())
    if matrix is not None and tied and matrix.ndim == 2 and axis == 1 and matrix.dtype == np.float32:
        gather_columns(low, node, data, matrix)
        return
    view = low.view(data)
    length = static(view.shape[axis])
    if constant is not None and constant.size == 1:
        index = int(constant.reshape(-1)[0])
        if length is not None and not -length <= index < length:
            raise unsupported(node, f"index {index} is out of range for size {length}")
        start = sympy.Integer(index) if index >= 0 else view.shape[axis] + index
        picked = view.slice(axis, start, 1).reshape(low.shape(node.outputs[0]))
        if picked is not None:
            low.bind(node, picked)
            return
    kind = low.dtype(indices)
    if kind not in ("i64", "i32"):
        raise unsupported(node, f"indices of type {kind}")
    source = low.dense(data)
    outer, n, inner = low.leading(data, axis)
    m = product(low.shape(indices))
    out = low.allocate(node.outputs[0])
    spec = KernelSpec.make("gather", dtype=low.dtype(data), index=kind)
    grain = grain_of(inner)
    args = [out, source, low.dense(indices), ("status",), n, m, inner]
    table = (source.buffer,) if source.buffer.kind == "weight" else ()
    step = low.emit(node.name or "Gather", spec, args, product((outer, m)), grain, weights=table)
    low.layers.append((node, step))
    low.bind(node, out)


@lowers("GatherND", attributes="batch_dims")
def gather_nd(low: Lowering, node: ir.Node) -> None:
    data, indices = node.inputs
    if data is None or indices is None:
        raise unsupported(node, "an input is missing")
    batch_dims = node.attributes.get_int("batch_dims", 0)
    shape, index_shape = low.shape(data), low.shape(indices)
    k = static(index_shape[-1])
    if k is None or low.dtype(indices) != "i64":
        raise unsupported(node, "indices must be int64 with a constant last size")
    batch = product(shape[:batch_dims])
    indexed = shape[batch_dims : batch_dims + k]
    inner = product(shape[batch_dims + k :])
    m = product(index_shape[batch_dims:-1])
    out = low.allocate(node.outputs[0])
    spec = KernelSpec.make("gather_nd", dtype=low.dtype(data), index="i64", k=k)
    args = [out, low.dense(data), low.dense(indices), ("status",), m, inner, *indexed]
    low.emit(node.name or "GatherND", spec, args, product((batch, m)), grain=256)
    low.bind(node, out)


@lowers("Range", data=())
def range_(low: Lowering, node: ir.Node) -> None:
    """start + index * step, computed where it is used; the length comes from shape inference."""
    start, step = low.integers(node.inputs[0]), low.integers(node.inputs[2])
    dtype = low.dtype(node.outputs[0])
    if start is None or step is None or dtype not in ("i64", "i32"):
        raise unsupported(node, "start and step must be integers that do not depend on data")
    args: list[Dim] = []

    def number(value: Dim) -> tuple[Any, ...]:
        if static(value) is not None:
            return ("const", static(value), "i64")
        args.append(value)
        return ("arg", len(args) - 1)

    expr: tuple[Any, ...] = ("iota", 0)
    if step[0] != 1:
        expr = ("mul", expr, number(step[0]))
    if start[0] != 0:
        expr = ("add", expr, number(start[0]))
    if dtype != "i64":
        expr = ("cast", dtype, expr)
    low.bind(node, Pointwise(expr, (), tuple(args), low.shape(node.outputs[0]), dtype, node.name or "Range"))


@lowers("ConstantOfShape", data=(), attributes="value")
def constant_of_shape(low: Lowering, node: ir.Node) -> None:
    tensor = node.attributes.get_tensor("value", None)
    value = 0.0 if tensor is None else tensor.numpy().reshape(()).item()
    dtype = low.dtype(node.outputs[0])
    low.bind(
        node,
        Pointwise(("const", value, dtype), (), (), low.shape(node.outputs[0]), dtype, node.name or "Fill"),
    )


@lowers("Shape", "Size", data=(), attributes="start end")
def shape_of(low: Lowering, node: ir.Node) -> None:
    """The sizes themselves as data (where somebody computes with them; target shapes need no tensor)."""
    value = _first(node)
    dims = low.shape(value)
    if node.op_type == "Size":
        low.bind(node, Pointwise(("arg", 0), (), (product(dims),), (), "i64", node.name or "Size"))
        return
    rank = len(dims)
    start = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", rank)
    picked = dims[slice(*slice(start, end).indices(rank)[:2])]
    out = low.allocate(node.outputs[0])
    for i, dim in enumerate(picked):
        fill = Pointwise(("arg", 0), (), (dim,), (sympy.Integer(1),), "i64", f"{node.name}/{i}")
        low.emit_pointwise(fill, out.slice(0, i, 1))
    low.bind(node, View.of(out.buffer))
