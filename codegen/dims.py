"""Symbolic sizes: sympy expressions over the input dims, and their form in the plan.

A size is a sympy expression whose symbols are positive integers named after the graph's input dims; plain
ints are allowed wherever a size is expected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import sympy

from qgraph.errors import QGraphError

if TYPE_CHECKING:
    import onnx_ir as ir

Dim: TypeAlias = sympy.Expr
PlanExpr = int | str | list[Any]

CONTENT = "qgraph.content"  # key of value.meta: elements that follow from shapes (docs/architecture.md)
_GRAIN_ELEMENTS = 4096


def symbol(name: str) -> sympy.Symbol:
    """The size named `name`."""
    return sympy.Symbol(name, integer=True, positive=True)


def size(dim: int | str | sympy.Expr | ir.SymbolicDim) -> Dim:
    """A dimension of an onnx-ir shape (or an int, a name, an expression) as a size.

    Raises QGraphError for an unknown dimension: shape inference must have run before.
    """
    if isinstance(dim, int):
        return sympy.Integer(dim)
    if isinstance(dim, str):
        return symbol(dim)
    if isinstance(dim, sympy.Expr):
        expr = dim
    else:
        if dim.value is None:
            raise QGraphError("unknown dimension: shape inference did not run or did not finish")
        if dim.value.isidentifier():
            return symbol(dim.value)
        # onnx-ir keeps the parsed expression of "2*sequence" but offers only its string.
        expr = dim.simplify()._expr
    return expr.xreplace({s: symbol(s.name) for s in expr.free_symbols})


def product(dims: Iterable[Dim | int]) -> Dim:
    """The product of sizes; 1 for none."""
    return sympy.expand(math.prod((sympy.sympify(d) for d in dims), start=sympy.Integer(1)))


def equal(a: Dim | int, b: Dim | int) -> bool:
    """Whether two sizes are the same for all values of their symbols."""
    if a is b:
        return True
    return sympy.expand(sympy.sympify(a) - sympy.sympify(b)) == 0


def is_one(a: Dim | int) -> bool:
    return a == 1


def static(a: Dim | int) -> int | None:
    """The value of a constant size, else None."""
    a = sympy.sympify(a)
    return int(a) if a.is_Integer else None


def grain_of(width: Dim | int) -> int:
    """How many blocks of `width` elements a thread should be given at once, at least: little work each. One
    that is not constant counts as 64."""
    return max(1, _GRAIN_ELEMENTS // (static(width) or 64))


def ceildiv(a: Dim | int, b: int) -> Dim:
    """ceil(a / b)."""
    a = sympy.sympify(a)
    return sympy.Integer(-(-int(a) // b)) if a.is_Integer else sympy.ceiling(a / b)


def estimate(a: Dim, value: int = 32) -> int:
    """The size when every symbol is `value`: a guide for memory planning, never a fact."""
    return int(a.subs(dict.fromkeys(a.free_symbols, value)))


def _fold(op: str, args: list[PlanExpr]) -> PlanExpr:
    out = args[0]
    for arg in args[1:]:
        out = [op, out, arg]
    return out


def _quotient(op: str, expr: sympy.Expr) -> PlanExpr:
    numerator, denominator = sympy.fraction(sympy.together(expr))
    return [op, plan_expr(numerator), plan_expr(denominator)]


def plan_expr(expr: Dim | int) -> PlanExpr:
    """The `<expr>` of runtime/FORMAT.md for a size."""
    expr = sympy.sympify(expr)
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        return str(expr.name)
    if isinstance(expr, sympy.floor):
        return _quotient("floordiv", expr.args[0])
    if isinstance(expr, sympy.ceiling):
        return _quotient("ceildiv", expr.args[0])
    if isinstance(expr, sympy.Mod):
        return ["mod", plan_expr(expr.args[0]), plan_expr(expr.args[1])]
    if isinstance(expr, (sympy.Max, sympy.Min)):
        op = "max" if isinstance(expr, sympy.Max) else "min"
        return _fold(op, [plan_expr(a) for a in sorted(expr.args, key=str)])
    if expr.is_Add:
        if sympy.denom(sympy.together(expr)) != 1:
            # Divided as a whole: a term by itself need not be an integer.
            return _quotient("floordiv", expr)
        positive = [a for a in expr.args if not a.could_extract_minus_sign()]
        negative = [-a for a in expr.args if a.could_extract_minus_sign()]
        start: list[PlanExpr] = [plan_expr(a) for a in sorted(positive, key=str)] or [0]
        out = _fold("add", start)
        for term in sorted(negative, key=str):
            out = ["sub", out, plan_expr(term)]
        return out
    if expr.is_Mul:
        numerator, denominator = sympy.fraction(expr)
        if denominator != 1:
            # Exact by construction: shape inference divides only where the remainder is zero.
            return ["floordiv", plan_expr(numerator), plan_expr(denominator)]
        return _fold("mul", [plan_expr(a) for a in sorted(expr.args, key=str)])
    if expr.is_Pow and expr.exp.is_Integer and expr.exp > 0:
        return _fold("mul", [plan_expr(expr.base)] * int(expr.exp))
    raise QGraphError(f"size '{expr}' has no form in the plan")
