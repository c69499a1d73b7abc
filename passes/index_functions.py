"""Integer and boolean tensors whose elements follow from where they stand, as formulas.

Positions, causal masks and the like are built from shapes alone: `Range`, `Expand`, `Slice`, comparisons.
Each such tensor is one expression over `axis(0)`, `axis(1)`, ... (the element's own position) and the input
dimensions: a causal mask is `axis(3) <= axis(2)`, however many nodes an exporter took to say so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import sympy
from sympy.logic.boolalg import Boolean

from qgraph.passes.base import attribute, constant, register, scalar
from qgraph.passes.infer_shapes import CONTENT, known_checks
from qgraph.passes.shapes.dims import Dim, World, from_ir, tidy

Formula: TypeAlias = sympy.Expr | Boolean

_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
_MAX_OPERATIONS = 64  # of a formula: beyond this it is no simplification


@functools.cache
def axis(k: int) -> sympy.Symbol:
    """The position of an element along axis `k`. No dimension can have this name."""
    return sympy.Symbol(f"@{k}", integer=True, nonnegative=True)


@dataclass(frozen=True)
class IndexFunction:
    """Element [i0, i1, ...] of a tensor of `shape` is `formula` with `axis(k)` = ik."""

    formula: Formula
    shape: tuple[Dim, ...]


def index_functions(graph: ir.Graph) -> dict[ir.Value, IndexFunction]:
    """The values of `graph` that are functions of their indices, by formula. Needs inferred shapes."""
    found = _Found(graph)
    for node in graph:
        if node.domain == "" and node.op_type in _RULES:
            value = node.outputs[0]
            shape = dims_of(value)
            if shape is None or value.dtype not in _INTEGERS or value in found.known:
                continue
            formula = _RULES[node.op_type](node, found, shape)
            if formula is not None:
                found.add(value, formula, shape)
    return found.known


def dims_of(value: ir.Value | None) -> tuple[Dim, ...] | None:
    """The shape as `Dim`s, or None where it is not wholly known."""
    if value is None or value.shape is None:
        return None
    dims = [from_ir(dim) for dim in value.shape]
    return None if any(d is None for d in dims) else tuple(d for d in dims if d is not None)


def components(value: ir.Value, known: dict[ir.Value, IndexFunction]) -> list[Formula] | None:
    """The formulas of `value[..., 0]`, `value[..., 1]`, ..., where its last axis is put together from
    parts of length 1: how exporters write the indices of a GatherND."""
    shape = dims_of(value)
    if not shape:
        return None
    last = len(shape) - 1
    if shape[last] == 1:
        return [known[value].formula] if value in known else None
    node = value.producer()
    if node is None or node.op_type != "Concat" or attribute(node, "axis", 0) % len(shape) != last:
        return None
    parts = []
    for part in node.inputs:
        dims = dims_of(part)
        if part not in known or dims is None or dims[last] != 1:
            return None
        parts.append(known[part].formula)
    return parts


class _Found:
    """What is known so far, and how to read it."""

    def __init__(self, graph: ir.Graph) -> None:
        self.known: dict[ir.Value, IndexFunction] = {}
        self.world = World(at_least=known_checks(graph))
        for value in graph.initializers.values():
            number = scalar(value)
            if number is not None and value.dtype in _INTEGERS:
                whole = int(constant(value).reshape(()))  # type: ignore[union-attr]
                self.add(value, _number(whole, value.dtype), dims_of(value) or ())
            elif _is_lower_triangle(value):
                rank = len(dims_of(value) or ())
                self.add(value, sympy.Le(axis(rank - 1), axis(rank - 2)), dims_of(value) or ())
        for node in graph:
            for value in node.outputs:
                content = value.meta.get(CONTENT)
                if content is None or content.size != 1 or value.dtype not in _INTEGERS:
                    continue
                item = content.reshape(-1)[0]
                dim = from_ir(item) if isinstance(item, ir.SymbolicDim) else item
                if dim is not None:
                    self.add(value, _number(dim, value.dtype), dims_of(value) or ())

    def add(self, value: ir.Value, formula: Formula, shape: tuple[Dim, ...]) -> None:
        formula = _at(formula, {axis(k): sympy.Integer(0) for k, dim in enumerate(shape) if dim == 1})
        if formula.count_ops() <= _MAX_OPERATIONS:
            self.known[value] = IndexFunction(formula, shape)

    def get(self, node: ir.Node, index: int) -> IndexFunction | None:
        value = node.inputs[index] if index < len(node.inputs) else None
        return None if value is None else self.known.get(value)

    def aligned(self, node: ir.Node, rank: int) -> list[Formula] | None:
        """The formulas of all inputs, their axes renumbered to those of a result of `rank` axes that they are
        broadcast to."""
        formulas = []
        for i in range(len(node.inputs)):
            function = self.get(node, i)
            if function is None:
                return None
            lead = rank - len(function.shape)
            formulas.append(_renumber(function.formula, {k: k + lead for k in range(len(function.shape))}))
        return formulas


def _is_lower_triangle(value: ir.Value) -> bool:
    """Whether it is a constant matrix, true on and below the diagonal: a causal mask of the longest text."""
    dims = dims_of(value) or ()
    if value.dtype != ir.DataType.BOOL or len(dims) < 2 or dims[-1] != dims[-2] or dims[-1] == 1:
        return False
    array = constant(value)
    return (
        array is not None
        and array.size == array.shape[-1] ** 2
        and bool((array == np.tri(array.shape[-1])).all())
    )


def _number(value: Any, dtype: ir.DataType | None) -> Formula:
    if dtype == ir.DataType.BOOL:
        return sympy.true if value else sympy.false
    return sympy.sympify(value)


def _at(formula: Formula, places: dict[sympy.Symbol, Any]) -> Formula:
    """`formula` with all symbols replaced at once, in canonical form."""
    if not formula.free_symbols & set(places):
        return formula
    return _canonical(formula.subs(places, simultaneous=True))


def is_truth(formula: Formula) -> bool:
    """Whether it is true or false, not a number. (To sympy a symbol may be either.)"""
    return not isinstance(formula, sympy.Expr)


def _canonical(formula: Any) -> Formula:
    formula = sympy.sympify(formula)
    return formula if is_truth(formula) else sympy.sympify(tidy(formula))


def _renumber(formula: Formula, places: dict[int, int]) -> Formula:
    return _at(formula, {axis(a): axis(b) for a, b in places.items()})


_Rule = Callable[[ir.Node, _Found, tuple[Dim, ...]], "Formula | None"]
_RULES: dict[str, _Rule] = {}
_rule = functools.partial(register, _RULES)


@_rule("Range")
def _range(node: ir.Node, found: _Found, shape: tuple[Dim, ...]) -> Formula | None:
    start, step = found.get(node, 0), found.get(node, 2)
    if start is None or step is None:
        return None
    return start.formula + step.formula * axis(0)


@_rule("ConstantOfShape")
def _constant_of_shape(node: ir.Node, found: _Found, shape: tuple[Dim, ...]) -> Formula | None:
    tensor = attribute(node, "value", None)
    return None if tensor is None else _number(tensor.numpy().reshape(-1)[0].item(), tensor.dtype)


@_rule("Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
def _ones_come_and_go(node: ir.Node, found: _Found, shape: tuple[Dim, ...]) -> Formula | None:
    """A reshape that only adds or removes axes of length 1."""
    x = found.get(node, 0)
    if x is None:
        return None
    old = [k for k, dim in enumerate(x.shape) if dim != 1]
    new = [k for k, dim in enumerate(shape) if dim != 1]
    if [x.shape[k] for k in old] != [shape[k] for k in new]:
        return None if x.formula.free_symbols & {axis(k) for k in old} else x.formula
    return _renumber(x.formula, dict(zip(old, new, strict=True)))


@_rule("Expand")
def _expand(node: ir.Node, found: _Found, shape: tuple[Dim, ...]) -> Formula | None:
    x = found.get(node, 0)
    if x is None:
        return None
    lead = len(shape) - len(x.shape)
    return _renumber(x.formula, {k: k + lead for k in range(len(x.shape))})


@_rule("Transpose")
def _transpose(node: ir.Node, found: _Found, shape: tuple[Dim, ...]) -> Formula | None:
    x = found.get(node, 0)
    if x is None:
        return None
    perm = attribute(node, "perm", None) or tuple(reversed(range(len(shape))))
    return _renumber(x.formula, {old: new for new, old in enumerate(perm)})


@_rule("Slice")
def _slice(node: ir.Node, found: _Found, shape: tuple[Dim, ...]) -> Formula | None:
    x, starts = found.get(node, 0), _dims(node, 1)
    if x is None or starts is None:
        return None
    axes = _dims(node, 3) if len(node.inputs) > 3 and node.inputs[3] is not None else range(len(starts))
    steps = _dims(node, 4) if len(node.inputs) > 4 and node.inputs[4] is not None else [1] * len(starts)
    if axes is None or steps is None:
        return None
    places = {}
    for start, at, step in zip(starts, axes, steps, strict=True):
        # A start before the first element or a step backwards would be clamped; not worth its own formula.
        if not isinstance(at, int) or not isinstance(step, int) or step < 1:
            return None
        at %= len(shape)
        first = tidy(x.shape[at] + start) if isinstance(start, int) and start < 0 else start
        if not found.world.nonnegative(first):
            return None
        places[axis(at)] = first + step * axis(at)
    return _at(x.formula, places)


def _dims(node: ir.Node, index: int) -> list[Dim] | None:
    """The elements of a small integer input that follow from shapes."""
    value = node.inputs[index]
    array = constant(value)
    if array is None and value is not None:
        array = value.meta.get(CONTENT)
    if array is None:
        return None
    dims = [from_ir(d) if isinstance(d, ir.SymbolicDim) else d for d in array.reshape(-1)]
    if any(d is None for d in dims):
        return None
    return [d if isinstance(d, sympy.Expr) else int(d) for d in dims if d is not None]


def _nonnegative(value: Any) -> bool:
    return bool(sympy.sympify(value).is_nonnegative)


@_rule("Concat")
def _concat(node: ir.Node, found: _Found, shape: tuple[Dim, ...]) -> Formula | None:
    """Parts that continue one formula: -1 and then 0, 1, 2, ... is `axis - 1`."""
    along = attribute(node, "axis", 0) % len(shape)
    parts: list[tuple[IndexFunction, Dim]] = []
    offset: Dim = 0
    for i in range(len(node.inputs)):
        part = found.get(node, i)
        if part is None:
            return None
        parts.append((part, offset))
        offset = tidy(offset + part.shape[along])
    for part, start in reversed(parts):
        whole = _at(part.formula, {axis(along): axis(along) - start})
        if all(_continues(whole, other, at, along) for other, at in parts):
            return whole
    return None


def _continues(whole: Formula, part: IndexFunction, offset: Dim, along: int) -> bool:
    place = offset if part.shape[along] == 1 else axis(along) + offset
    return _at(whole, {axis(along): place}) == part.formula


@_rule("CumSum")
def _cumsum(node: ir.Node, found: _Found, shape: tuple[Dim, ...]) -> Formula | None:
    """The running sum of what is the same along its axis."""
    x, along = found.get(node, 0), _dims(node, 1)
    if x is None or along is None or not isinstance(along[0], int):
        return None
    k = along[0] % len(shape)
    if axis(k) in x.formula.free_symbols:
        return None
    before = axis(k) if not attribute(node, "reverse", 0) else shape[k] - 1 - axis(k)
    return _canonical(x.formula * (before + (0 if attribute(node, "exclusive", 0) else 1)))


@_rule("Gather")
def _gather(node: ir.Node, found: _Found, shape: tuple[Dim, ...]) -> Formula | None:
    x, indices = found.get(node, 0), found.get(node, 1)
    if x is None or indices is None or not _nonnegative(indices.formula):
        return None
    at, count = attribute(node, "axis", 0) % len(x.shape), len(indices.shape)
    places: dict[sympy.Symbol, Any] = {axis(k): axis(k + count - 1) for k in range(at + 1, len(x.shape))}
    places[axis(at)] = _renumber(indices.formula, {k: k + at for k in range(count)})
    return _at(x.formula, places)


@_rule("GatherND")
def _gather_nd(node: ir.Node, found: _Found, shape: tuple[Dim, ...]) -> Formula | None:
    x, indices = found.get(node, 0), node.inputs[1]
    if x is None or indices is None or attribute(node, "batch_dims", 0):
        return None
    picked, rank = components(indices, found.known), len(indices.shape or ())
    if picked is None:
        # Whatever is picked from equal elements is the same.
        return None if x.formula.free_symbols & {axis(k) for k in range(len(x.shape))} else x.formula
    if not all(_nonnegative(p) for p in picked):
        return None
    places: dict[sympy.Symbol, Any] = {axis(k): p for k, p in enumerate(picked)}
    places.update({axis(k): axis(k - len(picked) + rank - 1) for k in range(len(picked), len(x.shape))})
    return _at(x.formula, places)


@_rule("Cast")
def _cast(node: ir.Node, found: _Found, shape: tuple[Dim, ...]) -> Formula | None:
    x = found.get(node, 0)
    if x is None:
        return None
    target = ir.DataType(attribute(node, "to", 0))
    if is_truth(x.formula):
        if target == ir.DataType.BOOL:
            return x.formula
        known = {sympy.true: 1, sympy.false: 0}.get(x.formula)
        return None if known is None else sympy.Integer(known)
    if target == ir.DataType.BOOL:
        return sympy.Ne(x.formula, 0)
    # int32 would wrap what does not fit: only what an axis of a tensor can hold is sure to fit.
    return x.formula if target == ir.DataType.INT64 else None


def _folded(combine: Callable[[Any, Any], Any]) -> _Rule:
    def apply(node: ir.Node, found: _Found, shape: tuple[Dim, ...]) -> Formula | None:
        operands = found.aligned(node, len(shape))
        if operands is None or node.outputs[0].dtype == ir.DataType.INT32:
            return None
        return _canonical(functools.reduce(combine, operands))

    return apply


_rule("Add", "Sum")(_folded(lambda a, b: a + b))
_rule("Sub")(_folded(lambda a, b: a - b))
_rule("Mul")(_folded(lambda a, b: a * b))
_rule("And")(_folded(sympy.And))
_rule("Or")(_folded(sympy.Or))
_rule("Xor")(_folded(sympy.Xor))


def _compared(relation: Callable[[Any, Any], Any]) -> _Rule:
    def apply(node: ir.Node, found: _Found, shape: tuple[Dim, ...]) -> Formula | None:
        operands = found.aligned(node, len(shape))
        if operands is None:
            return None
        a, b = operands
        if is_truth(a) or is_truth(b):
            return sympy.Not(sympy.Xor(a, b)) if node.op_type == "Equal" else None
        difference = _canonical(a - b)
        # Where it can be decided, it is; else the sides stay as they are written.
        decided = relation(difference, 0)
        return decided if decided in (sympy.true, sympy.false) else relation(a, b)

    return apply


_rule("Equal")(_compared(sympy.Eq))
_rule("Less")(_compared(sympy.Lt))
_rule("LessOrEqual")(_compared(sympy.Le))
_rule("Greater")(_compared(sympy.Gt))
_rule("GreaterOrEqual")(_compared(sympy.Ge))


@_rule("Not")
def _not(node: ir.Node, found: _Found, shape: tuple[Dim, ...]) -> Formula | None:
    x = found.get(node, 0)
    return None if x is None else sympy.Not(x.formula)


@_rule("Neg")
def _neg(node: ir.Node, found: _Found, shape: tuple[Dim, ...]) -> Formula | None:
    x = found.get(node, 0)
    return None if x is None else _canonical(-x.formula)


@_rule("Where")
def _where(node: ir.Node, found: _Found, shape: tuple[Dim, ...]) -> Formula | None:
    """Only where the condition is the same everywhere."""
    operands: Sequence[Formula] | None = found.aligned(node, len(shape))
    if operands is None:
        return None
    condition, yes, no = operands
    return yes if condition == sympy.true else no if condition == sympy.false else None
