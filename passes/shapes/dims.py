"""Arithmetic on dimensions: integers, and sympy expressions over the graph inputs' named dimensions.

A symbol is `sympy.Symbol(name, integer=True, positive=True)`: every named dimension is at least 1 at run
time. All arithmetic is exact; a division that need not come out even is `floor(a/b)`, never a fraction.

`World` holds what one inference run knows beyond that: facts `a >= b`, and input dimensions found to be
equal. A rule that needs a new fact calls `World.require_equal`, which records it and raises `NewFactError`;
the run starts again and now finds the fact. So no shape depends on the order in which facts were met.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx_ir as ir
import sympy

Dim: TypeAlias = int | sympy.Expr


class NewFactError(Exception):
    """Inference must start again: the world has learnt something."""


class UnequalError(Exception):
    """Two dimensions that must be equal cannot be."""


def symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, positive=True)


def tidy(value: Dim) -> Dim:
    """Canonical form: an int where it is one, else expanded."""
    if isinstance(value, int) or value.is_Symbol:
        return value
    value = sympy.expand(value)
    return int(value) if value.is_Integer else value


def from_ir(dim: int | ir.SymbolicDim) -> Dim | None:
    """An IR dimension as int or sympy expression; None where it is unknown.

    Raises:
        ValueError: its name is not an arithmetic expression.
    """
    if isinstance(dim, int):
        return dim
    if dim.value is None:
        return None
    if dim.value.isidentifier():
        return symbol(dim.value)
    return tidy(dim._expr)  # onnx-ir parses the name; it has no public accessor for the expression


def to_ir(dim: Dim) -> int | ir.SymbolicDim:
    """`dim` for an `onnx_ir.Shape`. What is subtracted is written last: `total - sequence`."""
    if isinstance(dim, int):
        return dim
    added = [t for t in dim.as_ordered_terms() if not t.could_extract_minus_sign()] if dim.is_Add else []
    if not added or not str(dim).startswith("-"):
        return ir.SymbolicDim(dim)
    taken = [t for t in dim.as_ordered_terms() if t.could_extract_minus_sign()]
    return ir.SymbolicDim(" - ".join([" + ".join(map(str, added)), *(str(-t) for t in taken)]))


def floordiv(a: Dim, b: Dim) -> Dim:
    """a / b rounded down; exact where b divides a."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    return tidy(sympy.floor(sympy.expand(sympy.cancel(sympy.sympify(a) / b))))


def ceildiv(a: Dim, b: Dim) -> Dim:
    """a / b rounded up, written with floor (which files can spell, unlike ceiling)."""
    return floordiv(tidy(a + b - 1), b)


def is_floor_free(value: Dim) -> bool:
    return isinstance(value, int) or not value.has(sympy.floor)


@functools.lru_cache(maxsize=4096)
def _obviously_nonnegative(value: Dim) -> bool:
    if isinstance(value, int):
        return value >= 0
    if value.is_nonnegative:
        return True
    # Every symbol is at least 1: with s = 1 + t, t >= 0, a polynomial without negative coefficients is >= 0.
    above = {s: 1 + sympy.Symbol(f"{s.name}-1", integer=True, nonnegative=True) for s in value.free_symbols}
    return bool(sympy.expand(value.subs(above)).is_nonnegative)


def product(dims) -> Dim:
    total: Dim = 1
    for dim in dims:
        total = total * dim
    return tidy(total)


@dataclass
class World:
    """What holds for every legal input of the model."""

    at_least: list[tuple[Dim, Dim, str]] = field(default_factory=list)
    equal: dict[sympy.Symbol, Dim] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    order: dict[sympy.Symbol, int] = field(default_factory=dict)
    origin: dict[sympy.Expr, str] = field(default_factory=dict)

    # -- what is known ------------------------------------------------------------------------------------

    def substitute(self, dim: Dim) -> Dim:
        """`dim` with the input dimensions that were found to depend on others replaced."""
        if isinstance(dim, int) or not self.equal:
            return dim
        for _ in range(len(self.equal) + 1):
            replaced = dim if isinstance(dim, int) else tidy(dim.subs(self.equal))
            if replaced == dim:
                break
            dim = replaced
        return dim

    def nonnegative(self, value: Dim) -> bool:
        """Whether `value >= 0` is certain."""
        if _obviously_nonnegative(value):
            return True
        return any(_obviously_nonnegative(tidy(value - (a - b))) for a, b, _ in self.at_least)

    def greater_equal(self, a: Dim, b: Dim) -> bool:
        return self.nonnegative(tidy(a - b))

    def minimum(self, a: Dim, b: Dim) -> Dim:
        if self.greater_equal(a, b):
            return b
        if self.greater_equal(b, a):
            return a
        return tidy(sympy.Min(a, b))

    def maximum(self, a: Dim, b: Dim) -> Dim:
        if self.greater_equal(a, b):
            return a
        if self.greater_equal(b, a):
            return b
        return tidy(sympy.Max(a, b))

    # -- what is assumed ----------------------------------------------------------------------------------

    def assume_at_least(self, a: Dim, b: Dim, message: str) -> None:
        """Demands `a >= b` at run time. Raises NewFactError unless it is known, UnequalError if it is
        false."""
        if self.greater_equal(a, b):
            return
        if isinstance(a, int) and isinstance(b, int):
            raise UnequalError(f"{a} is less than {b}")
        self.at_least.append((a, b, message))
        raise NewFactError

    def require_equal(self, a: Dim, b: Dim, why: str) -> Dim:
        """The common value of two dimensions that the operator `why` needs to be equal.

        Where they are not, tries in order: (1) a minimum against a bound is not reached (`512 >= sequence`,
        a run-time check); (2) an input dimension is bound to the other side (the input is then declared with
        that dimension).

        Raises:
            NewFactError: learnt something, start again.
            UnequalError: no assumption makes them equal.
        """
        if a == b or tidy(a - b) == 0:
            return a
        if isinstance(a, int) and isinstance(b, int):
            raise UnequalError(f"{a} and {b} differ")
        self._try_bounds(a, b)
        self._try_symbol(a, b, why)
        raise UnequalError(f"'{a}' and '{b}' differ")

    def _try_bounds(self, a: Dim, b: Dim) -> None:
        bounded = [m for side in (a, b) if not isinstance(side, int) for m in side.atoms(sympy.Min)]
        if not bounded:
            return
        for pick in (_symbolic_side, _constant_side):
            chosen = {m: pick(m) for m in bounded}
            if any(value is None for value in chosen.values()):
                continue
            left, right = sympy.sympify(a).subs(chosen), sympy.sympify(b).subs(chosen)
            if tidy(left - right) == 0:
                for m, value in chosen.items():
                    (other,) = [arg for arg in m.args if arg != value] or (value,)
                    name = self.origin.get(m, "")
                    source = f" ({name})" if name else ""
                    bound, limited = tidy(other), tidy(value)
                    words = "at most" if isinstance(bound, int) else "no more than"
                    self.at_least.append((bound, limited, f"{limited} must be {words} {bound}{source}"))
                raise NewFactError

    def _try_symbol(self, a: Dim, b: Dim, why: str) -> None:
        pairs = [(x, y) for x, y in ((a, b), (b, a)) if isinstance(x, sympy.Symbol) and x not in _free(y)]
        if not pairs:
            return
        # Keep the dimension that is declared first; an expression or number always replaces a symbol.
        pairs.sort(key=lambda pair: -self.order.get(pair[0], 0))
        old, new = pairs[0]
        self.equal[old] = new
        self.notes.append(f"dimension '{old}' is taken to equal '{new}': {why} needs it")
        raise NewFactError


def _free(value: Dim) -> set:
    return set() if isinstance(value, int) else value.free_symbols


def _symbolic_side(minimum: sympy.Min) -> sympy.Expr | None:
    found = [arg for arg in minimum.args if arg.free_symbols]
    return found[0] if len(found) == 1 and len(minimum.args) == 2 else None


def _constant_side(minimum: sympy.Min) -> sympy.Expr | None:
    found = [arg for arg in minimum.args if not arg.free_symbols]
    return found[0] if len(found) == 1 and len(minimum.args) == 2 else None
