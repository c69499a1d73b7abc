"""Masks of attention: what they hide, as far as it follows from where a query and a key stand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
import sympy

from qgraph.passes.base import is_op, scalar
from qgraph.passes.index_functions import Formula, IndexFunction, axis, is_truth
from qgraph.passes.shapes.dims import Dim, tidy

HIDES = -1e4  # what softmax makes 0 of, beside any score that is not itself of that size
ABSORBS = -1e30  # what any score may be added to without changing it

Known = dict[ir.Value, IndexFunction]


@dataclass(frozen=True)
class Frame:
    """The scores of an attention: `queries` x `keys`, the first `past` of which are older than any query."""

    queries: Dim
    keys: Dim
    past: Dim

    @property
    def is_aligned(self) -> bool:
        """Whether the queries are the last keys."""
        return tidy(self.queries + self.past - self.keys) == 0

    def place(self, rank: int) -> tuple[Formula, Formula]:
        """(query, key): the places of an element of a mask of `rank` axes."""
        return (sympy.Integer(0) if self.queries == 1 else axis(rank - 2)), axis(rank - 1)


def conjuncts(value: ir.Value, negated: bool = False) -> Iterator[tuple[ir.Value, bool]]:
    """Boolean values, and whether each is negated, that broadcast to `value` when joined by And."""
    node = value.producer()
    inputs = [] if node is None else [v for v in node.inputs if v is not None]
    if is_op(node, "Or" if negated else "And"):
        for part in inputs:
            yield from conjuncts(part, negated)
    elif is_op(node, "Not"):
        yield from conjuncts(inputs[0], not negated)
    elif is_op(node, "Expand"):
        yield from conjuncts(inputs[0], negated)
    else:
        yield value, negated


def addends(value: ir.Value) -> Iterator[ir.Value]:
    """Values that broadcast to `value` when added up."""
    node = value.producer()
    inputs = [] if node is None else [v for v in node.inputs if v is not None]
    if is_op(node, "Add"):
        for part in inputs:
            yield from addends(part)
    elif is_op(node, "Expand"):
        yield from addends(inputs[0])
    else:
        yield value


def condition_of(value: ir.Value) -> tuple[ir.Value, bool, float] | None:
    """(c, negated, x) where `value` is 0 where c is true (false, if `negated`) and x < 0 elsewhere."""
    node = value.producer()
    if node is None or not is_op(node, "Where") or node.inputs[0] is None:
        return None
    yes, no = scalar(node.inputs[1]), scalar(node.inputs[2])
    if yes == 0.0 and no is not None and no < 0:
        return node.inputs[0], False, no
    if no == 0.0 and yes is not None and yes < 0:
        return node.inputs[0], True, yes
    return None


def formula_of(value: ir.Value, negated: bool, known: Known) -> tuple[Formula, int] | None:
    """What a boolean mask says of its indices, and its rank."""
    function = known.get(value)
    if function is None or not is_truth(function.formula):
        return None
    formula = function.formula
    return (sympy.to_nnf(sympy.Not(formula), False) if negated else formula), len(function.shape)


def is_causal(formula: Formula, rank: int, frame: Frame) -> bool:
    """Whether `key <= query + past`, perhaps among other conditions, is what it says."""
    if not frame.is_aligned:
        return False
    query, key = frame.place(rank)
    for part in formula.args if isinstance(formula, sympy.And) else (formula,):
        left = _at_most(part)
        if left is not None and tidy(left - (key - query - frame.past)) == 0:
            return True
    return False


def _at_most(formula: Formula) -> sympy.Expr | None:
    """e, where the formula is e <= 0, over integers."""
    if isinstance(formula, sympy.Le):
        return formula.lhs - formula.rhs
    if isinstance(formula, sympy.Ge):
        return formula.rhs - formula.lhs
    if isinstance(formula, sympy.Lt):
        return formula.lhs - formula.rhs + 1
    if isinstance(formula, sympy.Gt):
        return formula.rhs - formula.lhs + 1
    return None


def leaves_a_key(formula: Formula, rank: int, frame: Frame) -> bool:
    """Whether each query attends some key for certain: that at its own place, `query + past`."""
    if not frame.is_aligned:
        return False
    query, key = frame.place(rank)
    own = formula.subs({key: query + frame.past}, simultaneous=True)
    return bool(own == sympy.true)
