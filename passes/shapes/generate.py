"""Operators that make tensors from shapes and numbers."""

from __future__ import annotations

import math

import onnx_ir as ir
import sympy

from qgraph.passes.shapes import dims as d
from qgraph.passes.shapes.node import NodeView, object_array, rule

INT64 = ir.DataType.INT64


@rule("Shape")
def shape(n: NodeView) -> None:
    dims = n.shape(0)
    # Python's slice clamps start and end just as the operator does.
    part = dims[n.attr("start", 0) : n.attr("end", None)]
    n.out(0, INT64, [len(part)], object_array(part))


@rule("Size")
def size(n: NodeView) -> None:
    n.out(0, INT64, [], object_array([d.product(n.shape(0))], ()))


@rule("ConstantOfShape")
def constant_of_shape(n: NodeView) -> None:
    target = n.dims(0, "its shape")
    value = n.attr("value")
    dtype = ir.DataType.FLOAT if value is None else value.dtype
    fill = 0.0 if value is None else value.numpy().reshape(-1)[0].item()
    content = None
    if n.known_size(target):
        count = math.prod(target)
        content = object_array([fill] * count, target)
    n.out(0, dtype, target, content)


@rule("Range")
def range_(n: NodeView) -> None:
    start, limit, delta = (_number(n, i) for i in range(3))
    if delta == 0:
        n.fail("its step is 0")
    if not isinstance(delta, (int, float)):
        n.refuse("its step depends on the input's shape")
    if any(isinstance(v, float) and not v.is_integer() for v in (start, limit, delta)):
        if not all(isinstance(v, (int, float)) for v in (start, limit)):
            n.refuse("its bounds mix fractions and the input's shape")
        n.out(0, n.dtype(0), [max(0, math.ceil((limit - start) / delta))])
        return
    start, limit, delta = (int(v) if isinstance(v, float) else v for v in (start, limit, delta))
    span = d.tidy(limit - start) if delta > 0 else d.tidy(start - limit)
    length = n.world.maximum(d.ceildiv(span, abs(delta)), 0)
    content = None
    if n.known_size([length]):
        content = object_array([d.tidy(start + i * delta) for i in range(length)])
    n.out(0, n.dtype(0), [length], content)


def _number(n: NodeView, index: int) -> int | float | sympy.Expr:
    content = n.content(index)
    if content is None or content.size != 1 or content.reshape(-1)[0] is None:
        n.refuse(f"{('start', 'limit', 'step')[index]} depends on data")
    return content.reshape(-1)[0]


@rule("EyeLike")
def eye_like(n: NodeView) -> None:
    dtype = n.attr("dtype")
    n.out(0, n.dtype(0) if dtype is None else ir.DataType(dtype), n.shape(0))


@rule("OneHot")
def one_hot(n: NodeView) -> None:
    shape = list(n.shape(0))
    axis = n.axis(n.attr("axis", -1), len(shape) + 1)
    shape.insert(axis, n.dims(1, "its depth")[0])
    n.out(0, n.dtype(2), shape)


@rule("NonZero", "Unique", "Compress", "NonMaxSuppression", "StringSplit")
def data_dependent(n: NodeView) -> None:
    n.refuse("the size of its output depends on data")


@rule("If", "Loop", "Scan", "SequenceMap")
def control_flow(n: NodeView) -> None:
    n.refuse("control flow is not supported; export the model without it")
