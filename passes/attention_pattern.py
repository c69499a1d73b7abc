"""Decomposed attention: softmax(mask(scale q k^T)) v, in every spelling that exporters have for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from qgraph.passes.attention_mask import HIDES
from qgraph.passes.base import attribute, constant, is_op, scalar, shape_of, used_once


class NoMatchError(Exception):
    """What looked like attention is something else; the message says why."""


@dataclass(frozen=True)
class Fill:
    """Scores are `value` where `condition` is false (true, if `negated`)."""

    condition: ir.Value
    negated: bool
    value: float


@dataclass
class Decomposed:
    """`product` computes softmax(mask(cap(scale q k^T))) v; the softmax is `weights` [B, H, S, T].

    q [B, H, S, D]; k [B, G, T, D], or [B, G, D, T] where `k_transposed`; v [B, G, T, E]; H a multiple of G.
    `addends` are added to the scores, `fills` replace some of them, last where `filled_last`.
    """

    product: ir.Node
    weights: ir.Value
    q: ir.Value
    k: ir.Value
    v: ir.Value
    scale: float
    k_transposed: bool
    softcap: float = 0.0
    addends: list[ir.Value] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)
    filled_last: bool = False


def match_attention(softmax: ir.Node) -> Decomposed | None:
    """The attention that a Softmax is the middle of. None where it is of no attention.

    Raises NoMatchError where it looks like one: a product of its result with an activation follows.
    """
    found = _product_of_weights(softmax)
    if found is None:
        return None
    product, private = found
    rank = len(shape_of(softmax.outputs[0]) or ())
    if rank != 4:
        raise NoMatchError(f"its scores have rank {rank}, not 4: [batch, heads, queries, keys]")
    if attribute(softmax, "axis", -1) not in (-1, rank - 1):
        raise NoMatchError("its softmax is not over the last axis")
    if softmax.outputs[0].dtype != ir.DataType.FLOAT:
        raise NoMatchError(f"its scores are {softmax.outputs[0].dtype}, not float32")
    if not private:
        raise NoMatchError("its weights are read elsewhere, too")
    scores = _Scores()
    scores.read_masked(_value(softmax.inputs[0]))
    assert scores.product is not None  # read_masked raises
    q, k = (_value(v) for v in scores.product.inputs)
    v = _value(product.inputs[1])
    q, q_scale = _unscaled(q)
    k, k_scale, swapped, k_group = _source(k)
    v, v_group = _unrepeated(v)
    match = Decomposed(
        product,
        softmax.outputs[0],
        q,
        k,
        v,
        scores.scale * q_scale * k_scale,
        not swapped,
        scores.softcap,
        scores.addends,
        scores.fills,
        scores.filled_last,
    )
    _check(match, k_group, v_group)
    return match


def _product_of_weights(softmax: ir.Node) -> tuple[ir.Node, bool] | None:
    """The MatMul of the weights with an activation, behind a guard Where(IsNaN(w), 0, w), and whether nothing
    else reads the weights."""
    weights = softmax.outputs[0]
    private = True
    guard = next((n for n in weights.consumers() if _is_guard(n, weights)), None)
    if guard is not None:
        test = _value(guard.inputs[0])
        private = set(weights.consumers()) == {guard, test.producer()} and used_once(test)
        private &= not weights.is_graph_output()
        weights = guard.outputs[0]
    for reader in weights.consumers():
        if is_op(reader, "MatMul") and reader.inputs[0] is weights and constant(reader.inputs[1]) is None:
            return reader, private and used_once(weights)
    return None


def _is_guard(node: ir.Node, weights: ir.Value) -> bool:
    if not is_op(node, "Where") or node.inputs[2] is not weights or scalar(node.inputs[1]) != 0.0:
        return False
    test = _value(node.inputs[0]).producer()
    return test is not None and is_op(test, "IsNaN") and test.inputs[0] is weights


class _Scores:
    """What is found on the way from the softmax up to the product of queries and keys."""

    def __init__(self) -> None:
        self.addends: list[ir.Value] = []
        self.fills: list[Fill] = []
        self.filled_last = False
        self.scale = 1.0
        self.softcap = 0.0
        self.product: ir.Node | None = None

    def read_masked(self, value: ir.Value) -> None:
        node = value.producer()
        if node is not None and is_op(node, "Add"):
            sides = [_value(v) for v in node.inputs]
            inner = [v for v in sides if _leads_to_product(v)]
            if len(inner) != 1:
                raise NoMatchError("its scores are a sum of which not just one term is a product")
            (other,) = [v for v in sides if v is not inner[0]] or [inner[0]]
            self.addends.append(other)
            self.filled_last |= bool(self.fills)
            self.read_masked(inner[0])
            return
        if node is not None and is_op(node, "Where"):
            condition, yes, no = (_value(v) for v in node.inputs)
            for inner_value, filler, negated in ((yes, no, False), (no, yes, True)):
                number = scalar(filler)
                if number is not None and _leads_to_product(inner_value):
                    if not number <= HIDES:
                        raise NoMatchError(f"it puts {number:g} in the place of scores: that hides nothing")
                    self.fills.append(Fill(condition, negated, number))
                    self.read_masked(inner_value)
                    return
            raise NoMatchError("a Where in its scores does not choose between a score and a constant")
        self.read_capped(value)

    def read_capped(self, value: ir.Value) -> None:
        value, outer = _unscaled(value)
        node = value.producer()
        if node is not None and is_op(node, "Tanh"):
            if not outer > 0:
                raise NoMatchError(f"its scores are capped at {outer:g}")
            self.softcap = outer
            value, inner = _unscaled(_value(node.inputs[0]))
            outer *= inner
            node = value.producer()
        if node is None or not is_op(node, "MatMul"):
            what = "an input" if node is None else f"the result of {node.op_type}"
            raise NoMatchError(f"its scores are {what}, not a product of queries and keys")
        self.scale, self.product = outer, node


def _leads_to_product(value: ir.Value) -> bool:
    """Whether a product of two activations is behind it, through what may stand before a softmax."""
    waiting: list[ir.Value] = [value]
    seen: set[ir.Node] = set()
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if is_op(node, "MatMul"):
            return not any(v is None or constant(v) is not None for v in node.inputs)
        if is_op(node, "Add", "Mul", "Div", "Tanh", "Where"):
            waiting.extend(v for v in node.inputs if v is not None and v.dtype == ir.DataType.FLOAT)
    return False


def _unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """(x, f) where `value` is f x, of one shape."""
    factor = 1.0
    while (node := value.producer()) is not None and is_op(node, "Mul", "Div"):
        sides = (0, 1) if node.op_type == "Mul" else (0,)
        found = [(_value(node.inputs[i]), scalar(node.inputs[1 - i])) for i in sides]
        inner, number = next(((v, n) for v, n in found if n is not None), (value, None))
        if number is None or (node.op_type == "Div" and number == 0):
            break
        if len(shape_of(inner) or ()) != len(shape_of(value) or ()):
            break
        factor = factor * number if node.op_type == "Mul" else factor / number
        value = inner
    return value, factor


def _source(value: ir.Value) -> tuple[ir.Value, float, bool, int]:
    """(x, f, swapped, n): `value` is f times x with its last two axes swapped or not, each head n times."""
    factor, swapped, group = 1.0, False, 1
    while True:
        inner, number = _unscaled(value)
        factor *= number
        if (turned := _swapped(inner)) is not None:
            swapped, inner = not swapped, turned
        inner, times = _unrepeated(inner)
        group *= times
        if inner is value:
            return value, factor, swapped, group
        value = inner


def _swapped(value: ir.Value) -> ir.Value | None:
    """x, where `value` is x with its last two axes swapped: a Transpose, or one of 3 axes between two
    Reshapes (the dynamo exporter's way to transpose what has any rank)."""
    node, dims = value.producer(), shape_of(value)
    if node is None or dims is None:
        return None
    if is_op(node, "Transpose"):
        return _value(node.inputs[0]) if _swaps_last(node, len(dims)) else None
    if not is_op(node, "Reshape"):
        return None
    turn = _value(node.inputs[0]).producer()
    if turn is None or not is_op(turn, "Transpose") or not _swaps_last(turn, 3):
        return None
    merge = _value(turn.inputs[0]).producer()
    if merge is None or not is_op(merge, "Reshape"):
        return None
    x = _value(merge.inputs[0])
    before, merged = shape_of(x), shape_of(merge.outputs[0])
    if before is None or merged is None or len(merged) != 3 or tuple(before[-2:]) != tuple(merged[-2:]):
        return None
    return x if dims == (*before[:-2], before[-1], before[-2]) else None


def _swaps_last(node: ir.Node, rank: int) -> bool:
    perm = attribute(node, "perm", None)
    return perm is not None and list(perm) == [*range(rank - 2), rank - 1, rank - 2]


def _unrepeated(value: ir.Value) -> tuple[ir.Value, int]:
    """(x, n): `value` [B, n G, ...] is x [B, G, ...] with each head n times: Unsqueeze, Expand, Reshape."""
    merge, dims = value.producer(), shape_of(value)
    if merge is None or dims is None or len(dims) != 4 or not is_op(merge, "Reshape"):
        return value, 1
    repeat = _value(merge.inputs[0]).producer()
    if repeat is None or not is_op(repeat, "Expand", "Tile"):
        return value, 1
    split = _value(repeat.inputs[0]).producer()
    if split is None or not is_op(split, "Unsqueeze", "Reshape"):
        return value, 1
    x = _value(split.inputs[0])
    before, one, many = shape_of(x), shape_of(split.outputs[0]), shape_of(repeat.outputs[0])
    if before is None or one is None or many is None or len(before) != 4 or len(many) != 5:
        return value, 1
    batch, heads, *rest = before
    times = many[2]
    if not isinstance(heads, int) or not isinstance(times, int):
        return value, 1
    fits = one == (batch, heads, 1, *rest) and many == (batch, heads, times, *rest)
    return (x, times) if fits and dims == (batch, heads * times, *rest) else (value, 1)


def unrepeated(value: ir.Value) -> ir.Value:
    """What `value` [B, n G, T, D] repeats the heads of, or itself."""
    while True:
        inner, _ = _unrepeated(value)
        if inner is value:
            return value
        value = inner


def _check(match: Decomposed, k_group: int, v_group: int) -> None:
    """Raises NoMatchError unless the operands have the shapes of an Attention."""
    q, k, v = (shape_of(x) for x in (match.q, match.k, match.v))
    if q is None or k is None or v is None or not len(q) == len(k) == len(v) == 4:
        raise NoMatchError("its queries, keys and values are not all [batch, heads, tokens, size]")
    heads, groups = q[1], k[1]
    if not isinstance(heads, int) or not isinstance(groups, int) or v[1] != groups or k_group != v_group:
        raise NoMatchError(f"its queries, keys and values have {heads}, {groups} and {v[1]} heads")
    # What is repeated must be repeated for each query; one head alone is broadcast.
    if groups * k_group != heads and groups * k_group != 1:
        raise NoMatchError(f"{heads} query heads share {groups} heads of keys, each {k_group} times")
    if q[0] != k[0] or q[0] != v[0]:
        raise NoMatchError(f"its queries, keys and values have batches {q[0]}, {k[0]} and {v[0]}")
    scores = shape_of(match.weights)
    if scores is None or tuple(scores[:3]) != (q[0], heads, q[2]):
        raise NoMatchError(f"its scores are {list(scores or ())}: a mask broadcasts them")
    if not match.scale > 0:
        raise NoMatchError(f"its scores are scaled by {match.scale:g}, which is not positive")


def _value(value: ir.Value | None) -> ir.Value:
    """An operand that the operator cannot do without."""
    if value is None:
        raise NoMatchError("a node of it lacks an operand")
    return value
