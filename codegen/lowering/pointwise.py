"""Elementwise operators: they build expressions, which become kernels only where somebody needs them in
memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx_ir as ir

from qgraph.codegen.dims import Dim
from qgraph.codegen.lowering.context import (
    DTYPES,
    Linear,
    Lowering,
    Pointwise,
    broadcast,
    lowers,
    unsupported,
)
from qgraph.codegen.memory import View

# An expression larger than this is computed before it is used further: kernels stay small and readable.
_MAX_NODES = 48
_MAX_LEAVES = 6

_UNARY = {
    "Neg": "neg",
    "Abs": "abs",
    "Sign": "sign",
    "Sqrt": "sqrt",
    "Reciprocal": "reciprocal",
    "Exp": "exp",
    "Log": "log",
    "Erf": "erf",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "Relu": "relu",
    "Softplus": "softplus",
    "Floor": "floor",
    "Ceil": "ceil",
    "Round": "round",
    "Sin": "sin",
    "Cos": "cos",
    "Not": "not",
    "IsNaN": "isnan",
}
_BINARY = {
    "Add": "add",
    "Sub": "sub",
    "Mul": "mul",
    "Div": "div",
    "Pow": "pow",
    "Equal": "eq",
    "Less": "lt",
    "LessOrEqual": "le",
    "Greater": "gt",
    "GreaterOrEqual": "ge",
    "And": "and",
    "Or": "or",
    "Xor": "xor",
}
# Of a product and a tensor of its shape: what they are in the product's epilogue.
_WITH_OPERAND = {"Add": "residual", "Mul": "factor"}
_VARIADIC = {"Max": "max", "Min": "min", "Sum": "add", "Mean": "add"}


def _nodes(expr: Any) -> int:
    return 1 + sum(_nodes(e) for e in expr[1:] if isinstance(e, tuple))


def _shift(expr: Any, leaf: list[int], arg: int, axes: int) -> Any:
    """Renumber the leaves, arguments and axes of an expression that joins a larger one."""
    if not isinstance(expr, tuple):
        return expr
    if expr[0] == "in":
        return ("in", leaf[expr[1]])
    if expr[0] == "arg":
        return ("arg", expr[1] + arg)
    if expr[0] == "iota":
        return ("iota", expr[1] + axes)
    return (expr[0], *(_shift(e, leaf, arg, axes) for e in expr[1:]))


class _Operands:
    """Collects the operands of one node: constants inline, single-use expressions merged, the rest as
    views."""

    def __init__(self, low: Lowering, node: ir.Node) -> None:
        self.low, self.node = low, node
        self.leaves: list[View] = []
        self.args: list[Dim] = []
        self.nodes = 0
        self.shape = broadcast(
            [low.shape(v) for v in node.inputs if v is not None], f"{node.op_type} '{node.name}'"
        )

    def expr(self, value: ir.Value) -> Any:
        low = self.low
        const = low.constant(value)
        if const is not None and const.size == 1:
            return ("const", const.reshape(()).item(), low.dtype(value))
        lazy = low.get(value)
        if isinstance(lazy, Pointwise):
            small = _nodes(lazy.expr) + self.nodes <= _MAX_NODES
            few = len(lazy.leaves) + len(self.leaves) <= _MAX_LEAVES
            # An expression without leaves (an iota, a size) costs nothing to compute twice.
            if small and few and (low.uses[value] == 1 or not lazy.leaves):
                axes = len(self.shape) - len(lazy.shape)
                # Dims that the operand lacks or broadcasts stay out of its views by zero strides, and an iota
                # along a broadcast dim is the index 0.
                leaves = [self.leaf(leaf.expand(lazy.shape)) for leaf in lazy.leaves]
                expr = _shift(lazy.expr, leaves, len(self.args), axes)
                self.args += lazy.args
                self.nodes += _nodes(expr)
                return _zero_iotas(expr, lazy.shape, axes)
        return ("in", self.leaf(low.view(value)))

    def leaf(self, view: View) -> int:
        """The number of a leaf, one for equal views."""
        key = (view.buffer, view.shape, view.strides, view.offset)
        for i, other in enumerate(self.leaves):
            if key == (other.buffer, other.shape, other.strides, other.offset):
                return i
        self.leaves.append(view)
        return len(self.leaves) - 1

    def compute(self, expr: Any) -> Any:
        """Compute `expr` now, and start afresh with its result as the only leaf."""
        view = self.low.emit_pointwise(self.result(expr))
        self.leaves, self.args, self.nodes = [view], [], 1
        return ("in", 0)

    def result(self, expr: Any) -> Pointwise:
        low, node = self.low, self.node
        return Pointwise(
            expr,
            tuple(self.leaves),
            tuple(self.args),
            self.shape,
            low.dtype(node.outputs[0]),
            node.name or node.op_type,
        )


def _zero_iotas(expr: Any, shape: tuple[Dim, ...], axes: int) -> Any:
    if not isinstance(expr, tuple):
        return expr
    if expr[0] == "iota" and shape[expr[1] - axes] == 1:
        return ("const", 0, "i64")
    return (expr[0], *(_zero_iotas(e, shape, axes) for e in expr[1:]))


def _activation(node: ir.Node) -> str | None:
    """The name of the matmul epilogue that computes `node`, if there is one."""
    if node.op_type == "Gelu":
        return "gelu_erf" if node.attributes.get_string("approximate", "none") == "none" else "gelu_tanh"
    if node.op_type == "Swish":
        return "silu" if node.attributes.get_float("alpha", 1.0) == 1.0 else None
    return {"Relu": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid"}.get(node.op_type)


def _extend_linear(low: Lowering, node: ir.Node) -> Linear | None:
    """`node` as one more epilogue of the matrix product it follows, if the kernel can take it."""
    if node.op_type in _WITH_OPERAND:
        a, b = node.inputs
        if a is None or b is None or a is b:
            return None
        # Of two products the later one waits for the other.
        return _with_operand(low, node.op_type, b, a) or _with_operand(low, node.op_type, a, b)
    name = _activation(node)
    linear = _only_reader(low, node.inputs[0])
    return None if name is None or linear is None else _with(linear, name, None)


def _with_operand(low: Lowering, op: str, product: ir.Value, operand: ir.Value) -> Linear | None:
    linear = _only_reader(low, product)
    if linear is None:
        return None
    shape, const = low.shape(operand), low.constant(operand)
    if (
        op == "Add"
        and const is not None
        and const.size == linear.n
        and (not shape or shape[-1] == linear.n)  # a lone number is a bias of one output column
        and "bias" not in linear.epilogue
    ):
        return _with(linear, "bias", low.view(operand))
    name = _WITH_OPERAND[op]
    if op == "Mul" and isinstance(low.get(operand), Pointwise):
        return None  # which the multiplication is a part of then, so that the product shares a plain kernel
    if low.same_shape(shape, linear.shape) and name not in linear.epilogue and low.dtype(operand) == "f32":
        return _with(linear, name, low.dense(operand))
    return None


def _only_reader(low: Lowering, value: ir.Value | None) -> Linear | None:
    """The matrix product that `value` is, if nobody else reads it."""
    if value is None or low.uses[value] != 1:
        return None
    lazy = low.values.get(value)
    return lazy if isinstance(lazy, Linear) else None


def _with(linear: Linear, name: str, operand: View | None) -> Linear:
    operands = linear.operands if operand is None else (*linear.operands, operand)
    return replace(linear, epilogue=(*linear.epilogue, name), operands=operands)


def _fold(ops: _Operands, op: str, inputs: list[ir.Value]) -> Any:
    """op(op(a, b), c), ... for any number of inputs, a few at a time."""
    expr = ops.expr(inputs[0])
    for value in inputs[1:]:
        if len(ops.leaves) >= _MAX_LEAVES:
            expr = ops.compute(expr)
        expr = (op, expr, ops.expr(value))
    return expr


def _pow(base: Any, exponent: Any, base_type: str, exponent_type: str) -> Any:
    """base ** exponent, of the base's type."""
    if exponent[0] == "const":
        known = {1: base, 2: ("mul", base, base), 3: ("mul", base, ("mul", base, base))}
        if exponent[1] in known:
            return known[exponent[1]]
    if base_type == exponent_type:
        return ("pow", base, exponent)
    if base_type == "f32":
        return ("pow", base, ("cast", "f32", exponent))
    if exponent_type == "f32":
        return ("cast", base_type, ("pow", ("cast", "f32", base), exponent))
    return ("pow", base, ("cast", base_type, exponent))


def _is_inf(positive: int, negative: int, x: Any) -> Any:
    """IsInf with either sign left out."""
    zero = ("const", 0.0, "f32")
    if positive and negative:
        return ("isinf", x)
    if positive or negative:
        return ("and", ("isinf", x), ("gt" if positive else "lt", x, zero))
    return ("const", False, "bool")


def _build(ops: _Operands, node: ir.Node) -> Any:
    """The kernel expression of one node over its operands."""
    op = node.op_type
    inputs = [v for v in node.inputs if v is not None]
    attrs = node.attributes
    if op in _VARIADIC:
        expr = _fold(ops, _VARIADIC[op], inputs)
        return ("mul", expr, ("const", 1.0 / len(inputs), "f32")) if op == "Mean" else expr
    args = [ops.expr(v) for v in inputs]
    if op in _UNARY:
        return (_UNARY[op], args[0])
    if op == "Pow":
        return _pow(args[0], args[1], *(ops.low.dtype(v) for v in inputs))
    if op in _BINARY:
        return (_BINARY[op], *args)
    if op == "Where":
        return ("where", *args)
    if op == "Cast":
        target = ir.DataType(attrs.get_int("to"))
        if target not in DTYPES:
            raise unsupported(node, f"cast to {target.name} has no kernel")
        return ("cast", DTYPES[target], args[0])
    if op == "Gelu":
        return (_activation(node), args[0])
    if op == "Swish":
        alpha = attrs.get_float("alpha", 1.0)
        scaled = args[0] if alpha == 1.0 else ("mul", ("const", alpha, "f32"), args[0])
        return ("silu", args[0]) if alpha == 1.0 else ("mul", args[0], ("sigmoid", scaled))
    if op == "HardSwish":
        inner = ("add", ("mul", args[0], ("const", 1 / 6, "f32")), ("const", 0.5, "f32"))
        return ("mul", args[0], ("max", ("min", inner, ("const", 1.0, "f32")), ("const", 0.0, "f32")))
    if op == "LeakyRelu":
        slope = ("const", attrs.get_float("alpha", 0.01), "f32")
        return ("where", ("lt", args[0], ("const", 0.0, "f32")), ("mul", args[0], slope), args[0])
    if op == "Clip":
        low_value = node.inputs[1] if len(node.inputs) > 1 else None
        high_value = node.inputs[2] if len(node.inputs) > 2 else None
        expr, at = args[0], 1
        if low_value is not None:
            expr, at = ("max", expr, args[at]), at + 1
        if high_value is not None:
            expr = ("min", expr, args[at])
        return expr
    if op == "Mod":
        return ("fmod" if attrs.get_int("fmod", 0) else "mod", *args)
    if op == "IsInf":
        return _is_inf(attrs.get_int("detect_positive", 1), attrs.get_int("detect_negative", 1), args[0])
    raise unsupported(node, "no kernel")


@lowers(
    *_UNARY,
    *_BINARY,
    *_VARIADIC,
    "Where",
    "Cast",
    "Gelu",
    "Swish",
    "HardSwish",
    "LeakyRelu",
    "Clip",
    "Mod",
    "IsInf",
    # `saturate` and `round_mode` of Cast are about 8-bit floats.
    attributes="to approximate alpha fmod detect_negative detect_positive saturate round_mode",
)
def pointwise(low: Lowering, node: ir.Node) -> None:
    """Any elementwise operator: an epilogue of the matrix product before it, or an expression."""
    if low.dtype(node.outputs[0]) == "f32":
        linear = _extend_linear(low, node)
        if linear is not None:
            low.bind(node, linear)
            return
    ops = _Operands(low, node)
    low.bind(node, ops.result(_build(ops, node)))
