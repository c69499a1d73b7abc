"""The part that decomposed LayerNorm and RMSNorm share: d / sqrt(mean(d^2) + epsilon)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qgraph.passes.base import (
    add_initializer,
    attribute,
    constant,
    int_list,
    is_op,
    same_shape,
    scalar,
    shape_of,
    used_once,
)


@dataclass(frozen=True)
class Normalized:
    """`node` computes d / sqrt(mean(d^2 over axes >= axis) + epsilon)."""

    node: ir.Node
    d: ir.Value
    axis: int  # negative: counted from the end
    epsilon: float


def match_normalized(node: ir.Node) -> Normalized | None:
    """Matches the last node of the spellings d / s, d * Reciprocal(s), d * (1 / s) and d * v^-0.5.

    s is Sqrt(v) or v^0.5, v is ReduceMean(d^2) + epsilon, d^2 is Pow(d, 2) or Mul(d, d). The epsilon may be
    missing.
    """
    if is_op(node, "Div"):
        sides = [(node.inputs[0], node.inputs[1], 0.5)]
    elif is_op(node, "Mul"):
        sides = [(node.inputs[i], node.inputs[1 - i], -0.5) for i in (0, 1)]
    else:
        return None
    for d, other, exponent in sides:
        variance = _root(other, exponent)
        if d is None or variance is None:
            continue
        found = _mean_of_squares(variance, d)
        if found is not None:
            return Normalized(node, d, *found)
    return None


def _root(value: ir.Value | None, exponent: float) -> ir.Value | None:
    """v, where `value` is v^exponent in some spelling."""
    node = value.producer() if value is not None else None
    if node is None:
        return None
    if is_op(node, "Pow") and scalar(node.inputs[1]) == exponent:
        return node.inputs[0]
    if exponent == 0.5:
        return node.inputs[0] if is_op(node, "Sqrt") else None
    if is_op(node, "Reciprocal"):
        return _root(node.inputs[0], 0.5)
    if is_op(node, "Div") and scalar(node.inputs[0]) == 1.0:
        return _root(node.inputs[1], 0.5)
    return None


def _mean_of_squares(variance: ir.Value, d: ir.Value) -> tuple[int, float] | None:
    """(axis, epsilon) where `variance` is mean(d^2) + epsilon."""
    node, epsilon = variance.producer(), 0.0
    if is_op(node, "Add"):
        assert node is not None
        for i in (0, 1):
            given = scalar(node.inputs[i])
            inner = node.inputs[1 - i]
            if given is not None and inner is not None:
                node, epsilon = inner.producer(), given
                break
    if not is_op(node, "ReduceMean"):
        return None
    assert node is not None
    axis = trailing_axis(node)
    square = node.inputs[0].producer() if node.inputs[0] is not None else None
    if axis is None or not _is_square(square, d):
        return None
    return axis, epsilon


def _is_square(node: ir.Node | None, d: ir.Value) -> bool:
    if is_op(node, "Pow"):
        assert node is not None
        return same_value(node.inputs[0], d) and scalar(node.inputs[1]) == 2.0
    if is_op(node, "Mul"):
        assert node is not None
        return same_value(node.inputs[0], d) and same_value(node.inputs[1], d)
    return False


def same_value(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Whether two values are one, or two equal Subs (old exporters subtract the mean twice)."""
    if a is b:
        return a is not None
    if a is None or b is None:
        return False
    left, right = a.producer(), b.producer()
    if left is None or right is None:
        return False
    return is_op(left, "Sub") and is_op(right, "Sub") and list(left.inputs) == list(right.inputs)


def trailing_axis(node: ir.Node) -> int | None:
    """The first reduced axis, counted from the end, where a reduction keeps dims and covers all axes from
    there on."""
    shape = shape_of(node.inputs[0])
    if shape is None or not attribute(node, "keepdims", 1) or len(node.inputs) < 2:
        return None
    axes = int_list(node.inputs[1])
    if not axes:
        return None
    places = sorted(a % len(shape) for a in axes)
    if places != list(range(places[0], len(shape))):
        return None
    return places[0] - len(shape)


def absorb(node: ir.Node, op_type: str, dims: tuple) -> tuple[ir.Node, ir.Value] | None:
    """The only reader of `node`, a Mul or Add with a scale or bias of the normalized `dims`; and that
    operand. The result must keep the shape: an operand of more axes would add those to it."""
    output = node.outputs[0]
    if not used_once(output):
        return None
    reader = output.consumers()[0]
    if not is_op(reader, op_type) or len(reader.inputs) != 2 or not same_shape(reader.outputs[0], output):
        return None
    other = reader.inputs[1 - list(reader.inputs).index(output)]
    return (reader, other) if other is not None and _fits(other, dims) else None


def _fits(value: ir.Value, dims: tuple) -> bool:
    shape = shape_of(value)
    if shape is None:
        return False
    if tuple(shape) == dims:
        return True
    if constant(value) is None or not all(isinstance(d, int) for d in dims):
        return False
    leading, trailing = shape[: max(0, len(shape) - len(dims))], shape[max(0, len(shape) - len(dims)) :]
    padded = (*[1] * (len(dims) - len(trailing)), *trailing)
    return all(d == 1 for d in leading) and all(a in (1, b) for a, b in zip(padded, dims, strict=True))


def affine(graph: ir.Graph, value: ir.Value | None, dims: tuple, name: str) -> ir.Value:
    """`value` with exactly the shape `dims`; ones where there is none."""
    if value is not None and tuple(value.shape or ()) == dims and len(dims) == len(value.shape or ()):
        return value
    array = np.ones(dims, np.float32) if value is None else constant(value)
    assert array is not None
    full = np.ascontiguousarray(np.broadcast_to(array.reshape(array.shape[-len(dims) :]), dims))
    return add_initializer(graph, full, name)


def refusal(match: Normalized) -> str | None:
    """Why a match may not become one node."""
    shape = shape_of(match.d)
    if match.d.dtype != ir.DataType.FLOAT:
        return f"it normalizes {match.d.dtype}, not float32"
    if shape is None or not all(isinstance(d, int) for d in shape[match.axis :]):
        return "the normalized dimensions are not fixed"
    if not same_shape(match.node.outputs[0], match.d):
        return "a constant in it changes the shape"
    if match.epsilon < 0:
        return "its epsilon is negative"
    return None
