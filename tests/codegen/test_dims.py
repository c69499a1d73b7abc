"""Symbolic sizes and their form in the plan, against a plain evaluator of that form."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import sympy

from qgraph.codegen.dims import ceildiv, equal, plan_expr, product, size, static, symbol
from qgraph.errors import QGraphError

B, S = symbol("batch"), symbol("sequence")


def evaluate(expr, env):
    """The rules of runtime/FORMAT.md, in Python."""
    if isinstance(expr, int):
        return expr
    if isinstance(expr, str):
        return env[expr]
    op, *args = expr
    a, b = (evaluate(x, env) for x in args)
    return {
        "add": a + b,
        "sub": a - b,
        "mul": a * b,
        "floordiv": a // b if b else None,
        "ceildiv": -(-a // b) if b else None,
        "mod": a % b if b else None,
        "min": min(a, b),
        "max": max(a, b),
    }[op]


@pytest.mark.parametrize(
    "expr",
    [
        sympy.Integer(7),
        B,
        B * S * 384,
        B + 2 * S - 3,
        -B + S,
        sympy.floor((B + 5) / 3),
        sympy.floor(S / B),
        sympy.ceiling(B * S / 128) * 12,
        sympy.Max(B, S, 4),
        sympy.Min(512, S),
        sympy.Mod(S, 7),
        B**3,
        B * S / 2 * 4,
        sympy.expand((B + 1) * (S - 1)),
    ],
)
def test_plan_expr_evaluates_like_sympy(expr):
    form = plan_expr(expr)
    for b in (1, 2, 5):
        for s in (1, 7, 128):
            assert evaluate(form, {"batch": b, "sequence": s}) == expr.subs({B: b, S: s})


def test_ceildiv_of_ints_and_symbols():
    assert ceildiv(33, 16) == 3 and ceildiv(32, 16) == 2 and ceildiv(0, 16) == 0
    assert ceildiv(B, 16).subs(B, 17) == 2


def test_sizes_from_onnx_ir():
    assert size(3) == 3
    assert size(ir.SymbolicDim("batch")) == B
    assert equal(size(ir.SymbolicDim("batch") * 2 + 1), 2 * B + 1)
    assert equal(size(sympy.Symbol("batch") * sympy.Symbol("sequence")), product((B, S)))
    with pytest.raises(QGraphError, match="unknown dimension"):
        size(ir.SymbolicDim(None))


def test_static_and_equal():
    assert static(B) is None and static(sympy.Integer(4)) == 4 and static(4) == 4
    assert equal((B + 1) * 2, 2 * B + 2) and not equal(B, S)


def test_no_form_is_an_error():
    with pytest.raises(QGraphError, match="no form"):
        plan_expr(sympy.sqrt(B))
