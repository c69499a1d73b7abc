"""Operators that work element by element, with numpy broadcasting."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy

from qgraph.passes.shapes import dims as d
from qgraph.passes.shapes.node import NodeView, object_array, rule

BOOL = ir.DataType.BOOL

_LIKE_FIRST_INPUT = """
    Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Celu Ceil Clip Cos Cosh Elu Erf Exp Floor Gelu
    HardSigmoid HardSwish Identity LeakyRelu Log Mish Neg Not PRelu Reciprocal Relu Round Selu
    Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu
    LRN InstanceNormalization GroupNormalization ScatterND
"""


@rule(*_LIKE_FIRST_INPUT.split())
def like_first_input(n: NodeView) -> None:
    """The output has the first input's dtype and shape."""
    x = n.fact(0)
    function = _UNARY.get(n.node.op_type)
    content = None
    if function is not None and x.content is not None:
        content = _apply(n, function, [x.content], x.shape)
    n.out(0, x.dtype, x.shape, content)


@rule("Softmax", "LogSoftmax", "Hardmax", "LpNormalization", "ScatterElements")
def along_axis(n: NodeView) -> None:
    """Works along one axis; the output has the first input's dtype and shape."""
    n.axis(n.attr("axis", 0 if n.node.op_type == "ScatterElements" else -1), n.rank(0))
    n.out(0, n.dtype(0), n.shape(0))


@rule("MeanVarianceNormalization")
def mean_variance(n: NodeView) -> None:
    n.axes(n.attr("axes", (0, 2, 3)), n.rank(0))
    n.out(0, n.dtype(0), n.shape(0))


@rule("CumSum", "CumProd")
def cumulate(n: NodeView) -> None:
    """Its axis is an input; one that is computed is left for the kernel to check."""
    content = n.content(1)
    if content is not None and content.size == 1 and isinstance(content.reshape(-1)[0], int):
        n.axis(content.reshape(-1)[0], n.rank(0))
    n.out(0, n.dtype(0), n.shape(0))


@rule("Trilu")
def trilu(n: NodeView) -> None:
    if n.rank(0) < 2:
        n.fail(f"an input of rank {n.rank(0)} has no matrices")
    n.out(0, n.dtype(0), n.shape(0))


@rule("Dropout")
def dropout(n: NodeView) -> None:
    n.out(0, n.dtype(0), n.shape(0), n.content(0))
    n.out(1, BOOL, n.shape(0))


@rule("IsNaN", "IsInf")
def predicate(n: NodeView) -> None:
    n.out(0, BOOL, n.shape(0))


@rule("Cast", "CastLike")
def cast(n: NodeView) -> None:
    dtype = ir.DataType(n.attr("to")) if n.node.op_type == "Cast" else n.dtype(1)
    content = n.content(0)
    if content is not None:
        content = _apply(n, _caster(dtype), [content], n.shape(0))
    n.out(0, dtype, n.shape(0), content)


@rule("Add", "Sub", "Mul", "Div", "Mod", "Pow", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitShift")
def arithmetic(n: NodeView) -> None:
    _elementwise(n, n.dtype(0))


@rule("Max", "Min", "Sum", "Mean")
def variadic(n: NodeView) -> None:
    _elementwise(n, n.dtype(0))


@rule("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor")
def comparison(n: NodeView) -> None:
    _elementwise(n, BOOL)


@rule("Where")
def where(n: NodeView) -> None:
    shape = n.broadcast(n.shape(0), n.shape(1), n.shape(2))
    contents = [n.content(i) for i in range(3)]
    content = None
    if all(c is not None for c in contents):
        content = _apply(
            n,
            lambda c, x, y: x if c is True else y if c is False else (x if x == y else None),
            contents,
            shape,
        )
    n.out(0, n.dtype(1), shape, content)


def _elementwise(n: NodeView, dtype: ir.DataType) -> None:
    shape = n.broadcast(*(n.shape(i) for i in range(len(n))))
    contents = [c for c in (n.content(i) for i in range(len(n))) if c is not None]
    content = None
    function = _BINARY.get(n.node.op_type)
    if function is not None and len(contents) == len(n) and n.known_size(shape):
        content = np.broadcast_to(contents[0], shape)
        for other in contents[1:]:
            content = _apply(n, lambda a, b: function(n, a, b), [content, other], shape)
    n.out(0, dtype, shape, content)


def _apply(n: NodeView, function: Callable[..., Any], contents: list, shape) -> np.ndarray | None:
    """`function` over broadcast contents; an element with an unknown operand is unknown."""
    if not n.known_size(shape):
        return None
    arrays = [np.broadcast_to(c, shape).reshape(-1) for c in contents]
    values = []
    for operands in zip(*arrays, strict=True):
        values.append(None if any(v is None for v in operands) else _canonical(function(*operands)))
    return object_array(values, shape)


def _canonical(value: Any) -> Any:
    if isinstance(value, sympy.Expr):
        return d.tidy(value)
    if value is sympy.true or value is sympy.false:
        return bool(value)
    return value


def _is_integer_type(n: NodeView) -> bool:
    return n.dtype(0).is_integer()


def _div(n: NodeView, a: Any, b: Any) -> Any:
    if not _is_integer_type(n):
        if isinstance(a, sympy.Expr) or isinstance(b, sympy.Expr):
            return sympy.nsimplify(a) / sympy.nsimplify(b) if b != 0 else None
        return a / b if b else None
    if isinstance(a, int) and isinstance(b, int):
        return None if b == 0 else int(math.copysign(abs(a) // abs(b), a * b)) if a else 0
    # ONNX truncates; floor is the same where both are non-negative, and nothing is known where they may not
    # be.
    if n.world.nonnegative(a) and n.world.nonnegative(d.tidy(b - 1)):
        return d.floordiv(a, b)
    return None


def _mod(n: NodeView, a: Any, b: Any) -> Any:
    if not _is_integer_type(n):
        return None
    if isinstance(a, int) and isinstance(b, int):
        if b == 0:
            return None
        return int(math.fmod(a, b)) if n.attr("fmod", 0) else a % b
    if n.world.nonnegative(a) and n.world.nonnegative(d.tidy(b - 1)):
        return d.tidy(a - b * d.floordiv(a, b))
    return None


def _pow(n: NodeView, a: Any, b: Any) -> Any:
    return a**b if isinstance(b, int) and 0 <= b <= 8 else None


def _equal(n: NodeView, a: Any, b: Any) -> bool | None:
    if isinstance(a, (bool, float)) or isinstance(b, (bool, float)):
        return a == b
    difference = d.tidy(a - b)
    if difference == 0:
        return True
    if isinstance(difference, int):
        return False
    if n.world.nonnegative(difference - 1) or n.world.nonnegative(d.tidy(-difference - 1)):
        return False
    return None


def _less(n: NodeView, a: Any, b: Any) -> bool | None:
    if n.world.nonnegative(d.tidy(b - a - 1)):
        return True
    return False if n.world.nonnegative(d.tidy(a - b)) else None


def _not_equal_less(function: Callable, swap: bool, negate: bool) -> Callable:
    def compare(n: NodeView, a: Any, b: Any) -> bool | None:
        if isinstance(a, float) or isinstance(b, float):
            return None
        result = function(n, *((b, a) if swap else (a, b)))
        return result if result is None or not negate else not result

    return compare


_BINARY: dict[str, Callable] = {
    "Add": lambda n, a, b: a + b,
    "Sub": lambda n, a, b: a - b,
    "Mul": lambda n, a, b: a * b,
    "Div": _div,
    "Mod": _mod,
    "Pow": _pow,
    "Max": lambda n, a, b: max(a, b) if _plain(a, b) else n.world.maximum(a, b),
    "Min": lambda n, a, b: min(a, b) if _plain(a, b) else n.world.minimum(a, b),
    "Sum": lambda n, a, b: a + b,
    "Equal": _equal,
    "Less": _not_equal_less(_less, swap=False, negate=False),
    "Greater": _not_equal_less(_less, swap=True, negate=False),
    "GreaterOrEqual": _not_equal_less(_less, swap=False, negate=True),
    "LessOrEqual": _not_equal_less(_less, swap=True, negate=True),
    "And": lambda n, a, b: a and b,
    "Or": lambda n, a, b: a or b,
}


def _plain(*values: Any) -> bool:
    return not any(isinstance(v, sympy.Expr) for v in values)


def _floor(value: Any) -> Any:
    return math.floor(value) if _plain(value) else sympy.floor(value)


def _ceil(value: Any) -> Any:
    return math.ceil(value) if _plain(value) else -sympy.floor(-value)


_UNARY: dict[str, Callable] = {
    "Identity": lambda v: v,
    "Neg": lambda v: -v,
    "Not": lambda v: not v,
    "Abs": lambda v: abs(v) if _plain(v) else (v if v.is_nonnegative else None),
    "Floor": _floor,
    "Ceil": _ceil,
}


def _caster(dtype: ir.DataType) -> Callable[[Any], Any]:
    """Casts one tracked element; what a cast could change and we cannot compute becomes unknown."""
    if dtype in (ir.DataType.INT64, ir.DataType.INT32):

        def to_integer(value: Any) -> Any:
            if isinstance(value, sympy.Expr):
                if value.is_integer:
                    return value
                return sympy.floor(value) if value.is_nonnegative else None
            return int(value) if math.isfinite(value) else None

        return to_integer
    if dtype == BOOL:
        return lambda v: bool(v) if _plain(v) else (True if v.is_positive else None)
    if dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return lambda v: v if isinstance(v, sympy.Expr) else float(v)
    return lambda v: None
