"""Decomposed rotary embeddings, in every spelling that exporters have for them.

Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021, equation 34: each pair
(a, b) of a head's columns becomes (a c - b s, b c + a s), with the cosine c and the sine s of its angle.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from qgraph.passes.base import attribute, int_list, is_op, scalar, shape_of, used_once
from qgraph.passes.rotary_tables import HALVES, PAIRS

Same = Callable[[ir.Value, ir.Value], bool]
_DEPTH = 4  # sums and negations around the products of one result


@dataclass(frozen=True)
class Columns:
    """Some columns, along the last axis, of `source`."""

    source: ir.Value
    places: range


@dataclass(frozen=True)
class Rotated:
    """`node` computes the columns `x`, the first `turned` of them turned.

    `part` is a value that is some of these columns. `cos` and `sin` are for pairs, or each number
    stands twice, in the order of the columns, where `doubled`.
    """

    node: ir.Node
    x: Columns
    order: int  # HALVES: column i is paired with i + n/2; PAIRS: 2 i with 2 i + 1
    cos: ir.Value
    sin: ir.Value
    backwards: bool
    doubled: bool
    turned: int
    part: ir.Value


@dataclass(frozen=True)
class _Product:
    """sign * left * right"""

    sign: int
    left: ir.Value
    right: ir.Value

    def readings(self) -> Iterator[tuple[int, ir.Value, ir.Value]]:
        """All of (sign, u, v) with the product sign u v, where each factor may be taken for minus another."""
        factors = [dict.fromkeys([(1, v), _unsigned(v)]) for v in (self.left, self.right)]
        for (s, u), (t, v) in itertools.product(*factors):
            yield self.sign * s * t, u, v
            yield self.sign * s * t, v, u


def match_rotary(node: ir.Node, same: Same) -> Rotated | None:
    """The rotary embedding whose last node is `node`. `same` says whether two values are computed alike."""
    if is_op(node, "Add", "Sub"):
        return _match_turned(node)
    return _match_joined(node, same)


def swapped(value: ir.Value) -> tuple[int, Columns, Columns, int] | None:
    """(sign, a, b, order) where `value` is the columns (-b, a) times sign, joined in that order."""
    joined = _joined(value.producer())
    if joined is None or len(joined[0]) != 2:
        return None
    (left, right), order = joined
    (s, b), (t, a) = _unsigned(left), _unsigned(right)
    if s == t:
        return None
    first, second = columns(a), columns(b)
    if first is None or second is None or _together(first, second, order) is None:
        return None
    return t, first, second, order


def columns(value: ir.Value) -> Columns | None:
    """Which columns of what `value` is, seen through slices, splits, and pairs with an axis of their own."""
    count = width(value)
    if count is None:
        return None
    node = value.producer()
    inner = None
    if is_op(node, "Slice"):
        assert node is not None
        inner = _slice(node)
    elif is_op(node, "Split"):
        assert node is not None
        inner = _split(node, value)
    elif is_op(node, "Squeeze", "Gather"):
        assert node is not None
        inner = _unbound(node)
    return inner or Columns(value, range(count))


def width(value: ir.Value) -> int | None:
    """The size of the last axis, where it is fixed."""
    shape = shape_of(value)
    return shape[-1] if shape and isinstance(shape[-1], int) else None


def _followed(x: Columns, rest: Columns) -> Columns | None:
    """`x` and behind it `rest`, its neighbours."""
    if x.source is not rest.source or (rest.places and rest.places != range(x.places.stop, rest.places.stop)):
        return None
    return Columns(x.source, range(x.places.start, rest.places.stop)) if rest.places else x


def _with_rest(match: Rotated) -> Rotated:
    """The match with the Concat, if there is one, that joins to its result the columns behind."""
    output = match.node.outputs[0]
    reader = output.consumers()[0] if used_once(output) else None
    rank = len(shape_of(output) or ())
    if reader is None or not is_op(reader, "Concat") or attribute(reader, "axis", 0) not in (-1, rank - 1):
        return match
    if len(reader.inputs) != 2 or reader.inputs[0] is not output or reader.inputs[1] is None:
        return match
    rest = columns(reader.inputs[1])
    x = _followed(match.x, rest) if rest is not None else None
    return match if x is None else dataclasses.replace(match, node=reader, x=x)


def value_of(match: Rotated) -> ir.Value | None:
    """The value that is the columns `match.x` and no others, where `match.part` comes from one."""
    value: ir.Value | None = match.part
    while value is not None and columns(value) != match.x:
        node = value.producer()
        value = node.inputs[0] if node is not None and value is not match.x.source else None
    return value


def _match_turned(node: ir.Node) -> Rotated | None:
    """x c + (-b, a) s, the columns of x being (a, b); columns that are not turned may be joined to that."""
    products = _products(node.outputs[0])
    if products is None or len(products) != 2:
        return None
    for straight, crossed in itertools.permutations(products):
        for s, turned, sin in crossed.readings():
            found = swapped(turned)
            if found is None:
                continue
            sign, a, b, order = found
            for t, x, cos in straight.readings():
                place = columns(x)
                if t == 1 and place is not None and place == _together(a, b, order):
                    backwards = sign * s < 0
                    return _with_rest(
                        Rotated(node, place, order, cos, sin, backwards, True, len(place.places), x)
                    )
    return None


def _match_joined(node: ir.Node, same: Same) -> Rotated | None:
    """(a c - b s, b c + a s), joined; columns of the same value that are not turned may follow."""
    joined = _joined(node)
    if joined is None or len(joined[0]) not in (2, 3):
        return None
    (left, right, *others), order = joined
    if others and order == PAIRS:
        return None
    rest = columns(others[0]) if others else None
    first, second = _products(left), _products(right)
    if first is None or second is None or len(first) != 2 or len(second) != 2:
        return None
    for p, q, u, v in (
        (*x, *y) for x in itertools.permutations(first) for y in itertools.permutations(second)
    ):
        readings = itertools.product(p.readings(), q.readings(), u.readings(), v.readings())
        for (i, a, c), (j, b, s), (k, b2, c2), (m, a2, s2) in readings:
            if (i, k) != (1, 1) or j != -m or a is not a2 or b is not b2:
                continue
            if not same(c, c2) or not same(s, s2):
                continue
            left_columns, right_columns = columns(a), columns(b)
            if left_columns is None or right_columns is None:
                continue
            x = _together(left_columns, right_columns, order)
            found = x if x is None or rest is None else _followed(x, rest)
            if x is not None and found is not None:
                match = Rotated(node, found, order, c, s, m < 0, False, len(x.places), a)
                return match if others else _with_rest(match)
    return None


def _products(value: ir.Value, sign: int = 1, depth: int = _DEPTH) -> list[_Product] | None:
    """`value` as a sum of products, or None."""
    node = value.producer()
    if node is None or depth == 0 or any(v is None for v in node.inputs):
        return None
    inputs = [v for v in node.inputs if v is not None]
    if is_op(node, "Neg"):
        return _products(inputs[0], -sign, depth - 1)
    if is_op(node, "Mul"):
        return [_Product(sign, inputs[0], inputs[1])]
    if is_op(node, "Add", "Sub"):
        first = _products(inputs[0], sign, depth - 1)
        second = _products(inputs[1], sign if node.op_type == "Add" else -sign, depth - 1)
        return None if first is None or second is None else first + second
    return None


def _unsigned(value: ir.Value) -> tuple[int, ir.Value]:
    """(-1, v) where `value` is -v in some spelling, else (1, value)."""
    node = value.producer()
    if is_op(node, "Neg"):
        assert node is not None and node.inputs[0] is not None
        return -1, node.inputs[0]
    if is_op(node, "Mul"):
        assert node is not None
        for number, other in (node.inputs, node.inputs[::-1]):
            if scalar(number) == -1.0 and other is not None and shape_of(other) == shape_of(value):
                return -1, other
    return 1, value


def _together(a: Columns, b: Columns, order: int) -> Columns | None:
    """The columns that (a, b) are all pairs of: neighbours in the source."""
    if a.source is not b.source or len(a.places) != len(b.places):
        return None
    x = range(a.places.start, a.places.start + 2 * len(a.places))
    n = len(a.places)
    wanted = (x[:n], x[n:]) if order == HALVES else (x[::2], x[1::2])
    return Columns(a.source, x) if (a.places, b.places) == wanted else None


def _joined(node: ir.Node | None) -> tuple[list[ir.Value], int] | None:
    """Values whose columns `node` joins, one behind the other or one of each in turn."""
    if is_op(node, "Concat"):
        assert node is not None
        rank = len(shape_of(node.outputs[0]) or ())
        if rank and attribute(node, "axis", 0) in (-1, rank - 1):
            return [v for v in node.inputs if v is not None], HALVES
    if not is_op(node, "Reshape"):
        return None
    assert node is not None
    stacked = node.inputs[0].producer() if node.inputs[0] is not None else None
    inner, out = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    if not is_op(stacked, "Concat") or inner is None or out is None or inner[:-2] != out[:-1]:
        return None
    assert stacked is not None
    rank = len(inner)
    if rank != len(out) + 1 or attribute(stacked, "axis", 0) not in (-1, rank - 1):
        return None
    values: list[ir.Value] = []
    for value in stacked.inputs:
        above = value.producer() if value is not None else None
        if not is_op(above, "Unsqueeze") or shape_of(value) != (*inner[:-1], 1):
            return None
        assert above is not None
        source = above.inputs[0]
        if source is None or shape_of(source) != inner[:-1]:
            return None
        values.append(source)
    return values, PAIRS


def _slice(node: ir.Node) -> Columns | None:
    data = node.inputs[0]
    given = [int_list(v) for v in node.inputs[1:]]
    if data is None or len(given) < 3 or any(not v or len(v) != 1 for v in given):
        return None
    (start,), (end,), (axis,) = (v for v in given[:3] if v)
    step = given[3][0] if len(given) > 3 and given[3] else 1
    below = columns(data)
    if below is None or step < 1 or axis % len(shape_of(data) or ()) != len(shape_of(data) or ()) - 1:
        return None
    return Columns(below.source, below.places[start:end:step])


def _split(node: ir.Node, value: ir.Value) -> Columns | None:
    data = node.inputs[0]
    below = columns(data) if data is not None else None
    sizes = [width(v) for v in node.outputs]
    rank = len(shape_of(value) or ())
    if below is None or attribute(node, "axis", 0) not in (-1, rank - 1) or None in sizes:
        return None
    index = list(node.outputs).index(value)
    start = sum(size or 0 for size in sizes[:index])
    return Columns(below.source, below.places[start : start + (sizes[index] or 0)])


def _unbound(node: ir.Node) -> Columns | None:
    """One element of an axis of size 2 that a Reshape made of the last axis."""
    picked = node.inputs[0]
    shape = shape_of(picked)
    if picked is None or shape is None or len(node.inputs) < 2:
        return None
    rank, index = len(shape), None
    if node.op_type == "Squeeze":
        axes = int_list(node.inputs[1]) or []
        picker = picked.producer()
        if len(axes) != 1 or picker is None or not is_op(picker, "Slice", "Split"):
            return None
        axis, source = axes[0] % rank, picker.inputs[0]
        index = _only_index(picker, picked, axis)
    else:
        axis, source = attribute(node, "axis", 0) % rank, picked
        number = scalar(node.inputs[1])
        if number is None or shape_of(node.inputs[1]) != ():
            return None
        index = int(number)
    reshape = source.producer() if source is not None else None
    inner = shape_of(source)
    data = reshape.inputs[0] if reshape is not None and is_op(reshape, "Reshape") else None
    if index is None or inner is None or len(inner) != rank or inner[axis] != 2 or data is None:
        return None
    outer, below = shape_of(data), columns(data)
    if outer is None or below is None or outer[:-1] != inner[:-2] or len(outer) != rank - 1:
        return None
    half = len(below.places) // 2
    if axis == rank - 1:
        return Columns(below.source, below.places[index % 2 :: 2])
    if axis == rank - 2:
        return Columns(below.source, below.places[half * (index % 2) : half * (index % 2 + 1)])
    return None


def _only_index(node: ir.Node, value: ir.Value, axis: int) -> int | None:
    """Which element along `axis`, of size 2, `value` is."""
    rank = len(shape_of(value) or ())
    if node.op_type == "Split":
        return list(node.outputs).index(value) if attribute(node, "axis", 0) % rank == axis else None
    given = [int_list(v) for v in node.inputs[1:4]]
    if len(given) < 3 or any(not v or len(v) != 1 for v in given):
        return None
    (start,), _, (place,) = (v for v in given if v)
    return start % 2 if place % rank == axis else None
