"""Channels whose order is nobody's business but the model's own: which axes must be permuted together.

A permutation of the channels of one value is exact if all that shares their order is permuted along: what is
computed from it element by element, the columns of the weights that make it, the rows of those that read it,
the constants of norms and biases on the way. `Tracer` gathers that, operator by operator, in both directions:
for a residual stream this is the whole model, for an MLP two or three weights, for the heads of an attention
layer the columns by head of query, key and value and the rows of the output projection.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph.passes.base import (
    add_initializer,
    attribute,
    describe,
    input_dims,
    int_list,
    is_op,
    register,
    shape_of,
)

Order = npt.NDArray[np.intp]  # p [n]: channel c is from now on what channel p[c] was
Sizes = tuple[int, ...]

# Named dims are given primes from here on while channels are followed, so that no product of sizes is
# another by accident.
_FIRST_PRIME = 100_003


@dataclass(frozen=True)
class Digit:
    """Where channels 0..n-1 lie on an axis: at start + (o n + c) inner + i, for all o < outer, i < inner.

    Heads of D channels are `inner` = D; channels inside of H heads, all alike, are `outer` = H.
    """

    axis: int
    n: int
    inner: int = 1
    outer: int = 1
    start: int = 0

    @property
    def stop(self) -> int:
        """The end of what is permuted."""
        return self.start + self.outer * self.n * self.inner

    def index(self, order: Order, size: int) -> Order:
        """[size]: take these along an axis of that size to permute it."""
        index = np.arange(size)
        index[self.start : self.stop] = (
            index[self.start : self.stop].reshape(self.outer, self.n, self.inner)[:, order].reshape(-1)
        )
        return index


Place = tuple[ir.Node, int]  # a constant, as input of a node


@dataclass(eq=False)
class Channels:
    """All that is permuted with the channels of one value.

    Exact if `obstacles` is empty: why the order of the channels matters. `parts`: divisors m of n at which
    some operator splits channel c into c // m and c % m; these may be free each by itself. `outputs` of the
    graph are permuted, too: whoever uses this has to put them in order.
    """

    n: int
    values: dict[ir.Value, list[Digit]] = field(default_factory=dict)
    constants: dict[Place, list[Digit]] = field(default_factory=dict)
    outputs: list[ir.Value] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)

    def permute(self, order: Order) -> None:
        """Permutes all constants. Of values, the outputs of the graph are left to the caller."""
        for value, places in _by_value(self.constants).items():
            alike: dict[frozenset[Digit], list[Place]] = {}
            for place in places:
                alike.setdefault(frozenset(self.constants[place]), []).append(place)
            tensor = value.const_value
            assert tensor is not None
            for same in alike.values():
                array = tensor.numpy()
                for digit in self.constants[same[0]]:
                    array = np.take(array, digit.index(order, array.shape[digit.axis]), axis=digit.axis)
                changed = ir.Tensor(np.ascontiguousarray(array), dtype=tensor.dtype, name=value.name)
                if _reads_all(value, same):
                    value.const_value = changed
                    continue
                assert isinstance(value.graph, ir.Graph)
                copy = add_initializer(value.graph, changed, f"{value.name}.{same[0][0].name}")
                for node, index in same:
                    node.replace_input_with(index, copy)


class Tracer:
    """Follows channels through the main graph, in which shapes have been inferred."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        names = input_dims(graph)
        self._sizes = dict(zip(names, _primes(len(names)), strict=True))

    def channels(self, value: ir.Value, digit: Digit | None = None) -> Channels:
        """What shares the order of the channels of `value`; by default those of its last axis."""
        if digit is None:
            sizes = self.sizes(value)
            digit = Digit(len(sizes) - 1, sizes[-1])
        found = Channels(digit.n)
        waiting = list(self._visit(found, value, digit))
        while waiting:
            node, slot, digit = waiting.pop()
            try:
                linked = self._linked(node, slot, digit)
            except _SplitError as split:
                if split.part not in found.parts:
                    found.parts.append(split.part)
                _note(found, str(split))
                continue
            except ObstacleError as obstacle:
                _note(found, str(obstacle))
                continue
            for other, its in linked:
                waiting += self._enter(found, node, other, its)
        for value, places in _by_value(found.constants).items():
            if sum(size > 1 for size in self.sizes(value)) < 2:
                continue  # a vector may have copies
            if others := [use for use in value.uses() if use not in places]:
                _note(found, f"{describe(value)} is shared with {describe(others[0][0])}")
            elif value.is_graph_output():
                _note(found, f"{describe(value)} is an output of the graph")
            elif any(set(found.constants[place]) != set(found.constants[places[0]]) for place in places):
                _note(found, f"{describe(value)} would be permuted in two ways at once")
        return found

    def free(self, value: ir.Value, obstacles: list[str], digit: Digit | None = None) -> Iterator[Channels]:
        """What can be permuted of the last axis of `value`, or of a digit of it: the channels one by one;
        else the parts in which an operator takes them, and what is inside of these.

        Traced when asked for, so that the graph may change in between. `obstacles` gets the reasons why
        something cannot.
        """
        found = self.channels(value, digit)
        if not found.obstacles:
            yield found
            return
        obstacles += found.obstacles
        sizes = self.sizes(value)
        digit = digit or Digit(len(sizes) - 1, sizes[-1])
        for part in found.parts:
            parts = replace(digit, n=digit.n // part, inner=digit.inner * part)
            inside = replace(digit, n=part, outer=digit.outer * (digit.n // part))
            for smaller in (parts, inside):
                yield from self.free(value, obstacles, smaller)

    def sizes(self, value: ir.Value) -> Sizes:
        """The sizes of `value` while channels are followed."""
        dims = shape_of(value)
        sizes = [d if isinstance(d, int) else d.evaluate(self._sizes) for d in dims or ()]
        if dims is None or not all(isinstance(size, int) for size in sizes):
            raise ObstacleError(f"the shape of {describe(value)} is not known")
        return tuple(size for size in sizes if isinstance(size, int))

    def _enter(
        self, found: Channels, node: ir.Node, slot: int, digit: Digit
    ) -> Iterator[tuple[ir.Node, int, Digit]]:
        """Notes what is permuted at a slot of `node`; where to go on from there."""
        value = _at(node, slot)
        if value is None:
            return
        if slot >= 0 and value.const_value is not None and not value.is_graph_input():
            _add(found, found.constants.setdefault((node, slot), []), digit, value)
            return
        yield from self._visit(found, value, digit)

    def _visit(self, found: Channels, value: ir.Value, digit: Digit) -> Iterator[tuple[ir.Node, int, Digit]]:
        digits = found.values.setdefault(value, [])
        digit_or_none = _add(found, digits, digit, value)
        if digit_or_none is None:
            return
        digit = digit_or_none
        producer = value.producer()
        if producer is None:
            _note(found, f"{describe(value)} is an input of the graph")
        else:
            yield producer, ~producer.outputs.index(value), digit
        if value.is_graph_output() and value not in found.outputs:
            found.outputs.append(value)
        for node, index in value.uses():
            if node.graph is not self.graph:
                _note(found, f"{describe(node)} reads it in a subgraph")
            else:
                yield node, index, digit

    def _linked(self, node: ir.Node, slot: int, digit: Digit) -> Iterable[tuple[int, Digit]]:
        rule = _RULES.get(node.op_type) if node.domain == "" else None
        if rule is None:
            raise ObstacleError(f"{describe(node)} is not followed")
        return rule(self, node, slot, digit)


class ObstacleError(Exception):
    """Why channels cannot be permuted."""


class _SplitError(ObstacleError):
    """They can, but for the digit c // part, or c % part, of their number c alone."""

    def __init__(self, node: ir.Node, part: int) -> None:
        super().__init__(f"{describe(node)} takes channels in parts of {part}")
        self.part = part


# A slot is an input (0, 1, ..) or output (-1, -2, ..) of a node.


def _at(node: ir.Node, slot: int) -> ir.Value | None:
    return node.outputs[~slot] if slot < 0 else node.inputs[slot]


def _primes(count: int) -> list[int]:
    found: list[int] = []
    number = _FIRST_PRIME
    while len(found) < count:
        if all(number % d for d in range(3, math.isqrt(number) + 1, 2)):
            found.append(number)
        number += 2
    return found


def _note(found: Channels, obstacle: str) -> None:
    if obstacle not in found.obstacles:
        found.obstacles.append(obstacle)


def _add(found: Channels, digits: list[Digit], digit: Digit, value: ir.Value) -> Digit | None:
    """Adds to the digits of one value. Returns what is new, united with what it overlaps; None if nothing."""
    for old in tuple(digits):
        if old.axis != digit.axis or old.stop <= digit.start or digit.stop <= old.start:
            continue
        period = digit.n * digit.inner
        if (old.n, old.inner) != (digit.n, digit.inner) or (old.start - digit.start) % period:
            _note(found, f"{describe(value)} would be permuted in two ways at once")
            return None
        start, stop = min(old.start, digit.start), max(old.stop, digit.stop)
        digit = replace(digit, start=start, outer=(stop - start) // period)
        if digit == old:
            return None
        digits.remove(old)
    digits.append(digit)
    return digit


def _by_value(constants: Iterable[Place]) -> dict[ir.Value, list[Place]]:
    found: dict[ir.Value, list[Place]] = {}
    for node, index in constants:
        value = node.inputs[index]
        assert value is not None
        found.setdefault(value, []).append((node, index))
    return found


def _reads_all(value: ir.Value, places: list[Place]) -> bool:
    """Whether nothing but `places` reads a constant."""
    return not value.is_graph_output() and all(use in places for use in value.uses())


# -- rules: (tracer, node, slot, digit) -> what else of the node is permuted ---------------------------------

_Links = Iterable[tuple[int, Digit]]
_Rule = Callable[[Tracer, ir.Node, int, Digit], _Links]
_RULES: dict[str, _Rule] = {}
_rule = functools.partial(register, _RULES)


def _slots(node: ir.Node) -> list[int]:
    return [
        *(i for i, value in enumerate(node.inputs) if value is not None),
        *(~i for i, value in enumerate(node.outputs) if value.uses() or value.is_graph_output()),
    ]


def _sizes(tracer: Tracer, node: ir.Node, slot: int) -> Sizes:
    value = _at(node, slot)
    return () if value is None else tracer.sizes(value)


def _along(ties: Iterable[dict[int, int]], node: ir.Node, slot: int, digit: Digit) -> _Links:
    """The other members of the tie, slots with their axes, that holds this slot's axis."""
    for tie in ties:
        if tie.get(slot) == digit.axis:
            return [(other, replace(digit, axis=axis)) for other, axis in tie.items() if other != slot]
    raise ObstacleError(f"{describe(node)} mixes it")


def _broadcast(
    tracer: Tracer, node: ir.Node, slots: Iterable[int], dims: int = 0
) -> Iterator[dict[int, int]]:
    """Ties of the axes of `slots` under broadcasting, but for the last `dims`."""
    sizes = {slot: _sizes(tracer, node, slot) for slot in slots}
    rank = max(map(len, sizes.values()))
    for axis in range(rank - dims):
        there = {slot: axis - rank + len(shape) for slot, shape in sizes.items()}
        tie = {slot: at for slot, at in there.items() if at >= 0 and sizes[slot][at] != 1}
        if len({sizes[slot][at] for slot, at in tie.items()}) > 1:
            raise ObstacleError(f"{describe(node)} broadcasts sizes that are not known")
        yield tie


_UNARY = """Abs Acos Asin Atan Cast Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity
IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Sigmoid Sign Sin Sinh Softplus Softsign Sqrt
Swish Tan Tanh ThresholdedRelu"""
_MORE = """Add And BitwiseAnd BitwiseOr Clip Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min
Mod Mul Or PRelu Pow Sub Sum Where Xor"""
_REDUCE = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"


@_rule(*_UNARY.split(), *_MORE.split())
def _elementwise(tracer: Tracer, node: ir.Node, slot: int, digit: Digit) -> _Links:
    return _along(_broadcast(tracer, node, _slots(node)), node, slot, digit)


@_rule("Expand")
def _expand(tracer: Tracer, node: ir.Node, slot: int, digit: Digit) -> _Links:
    return _along(_broadcast(tracer, node, (0, -1)), node, slot, digit)


@_rule("Softmax", "LogSoftmax", "LpNormalization")
def _in_place(tracer: Tracer, node: ir.Node, slot: int, digit: Digit) -> _Links:
    """Sums over an axis go by whatever order."""
    return [(-1 if slot == 0 else 0, digit)]


@_rule("LayerNormalization", "RMSNormalization")
def _norm(tracer: Tracer, node: ir.Node, slot: int, digit: Digit) -> _Links:
    slots = [s for s in _slots(node) if s >= -1]
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise ObstacleError(f"{describe(node)} gives its mean away")
    return _along(_broadcast(tracer, node, slots), node, slot, digit)


@_rule(*(f"Reduce{kind}" for kind in _REDUCE.split()))
def _reduce(tracer: Tracer, node: ir.Node, slot: int, digit: Digit) -> _Links:
    rank = len(_sizes(tracer, node, 0))
    given = len(node.inputs) > 1 and node.inputs[1] is not None
    axes = int_list(node.inputs[1]) if given else attribute(node, "axes", [])
    if axes is None:
        raise ObstacleError(f"{describe(node)} reduces axes that are computed")
    if not axes:
        axes = [] if attribute(node, "noop_with_empty_axes", 0) else range(rank)
    gone = {axis % rank for axis in axes}
    if slot == 0 and digit.axis in gone:
        return []
    kept = [axis for axis in range(rank) if attribute(node, "keepdims", 1) or axis not in gone]
    return _along(({0: axis, -1: i} for i, axis in enumerate(kept) if axis not in gone), node, slot, digit)


@_rule("Shape", "Size", "ConstantOfShape")
def _alike(tracer: Tracer, node: ir.Node, slot: int, digit: Digit) -> _Links:
    """All elements are, or nobody looks at them."""
    return []


@_rule("Transpose")
def _transpose(tracer: Tracer, node: ir.Node, slot: int, digit: Digit) -> _Links:
    rank = len(_sizes(tracer, node, 0))
    perm = attribute(node, "perm", range(rank)[::-1])
    return _along(({0: axis, -1: i} for i, axis in enumerate(perm)), node, slot, digit)


@_rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(tracer: Tracer, node: ir.Node, slot: int, digit: Digit) -> _Links:
    other = -1 if slot == 0 else 0
    return [(other, _regroup(node, digit, _sizes(tracer, node, slot), _sizes(tracer, node, other)))]


def _regroup(node: ir.Node, digit: Digit, before: Sizes, after: Sizes) -> Digit:
    """The digit in another shape of the same elements."""
    if math.prod(before) != math.prod(after):
        raise ObstacleError(f"{describe(node)} is not followed: its shape depends on sizes")
    if digit.stop - digit.start != before[digit.axis]:
        raise ObstacleError(f"{describe(node)} reshapes it together with other channels")
    stride = digit.inner * math.prod(before[digit.axis + 1 :])
    whole = stride * digit.n
    for axis, size in enumerate(after):
        below = math.prod(after[axis + 1 :])
        if size > 1 and below <= stride and whole <= below * size:
            if stride % below or below * size % whole:
                break
            return Digit(axis, digit.n, stride // below, below * size // whole)
    for axis in range(len(after)):
        edge = math.prod(after[axis:])
        if stride < edge < whole and edge % stride == 0 and whole % edge == 0:
            raise _SplitError(node, edge // stride)
    raise ObstacleError(f"{describe(node)} cuts across it")


def _window(node: ir.Node, digit: Digit, start: int, stop: int) -> Digit | None:
    """What lies in a part of the axis, counted from there; None if nothing."""
    period = digit.n * digit.inner
    first, last = max(start, digit.start), min(stop, digit.stop)
    if first >= last:
        return None
    if (first - digit.start) % period or (last - digit.start) % period:
        raise ObstacleError(f"{describe(node)} cuts it into pieces")
    return replace(digit, start=first - start, outer=(last - first) // period)


def _pieces(
    tracer: Tracer, node: ir.Node, slot: int, digit: Digit, whole: int, parts: dict[int, int], axis: int
) -> _Links:
    """Slot `whole` holds `parts`, at their starts along `axis`."""
    if digit.axis != axis:
        return [(other, digit) for other in (whole, *parts) if other != slot]
    if slot != whole:
        return [(whole, replace(digit, start=digit.start + parts[slot]))]
    inside = {
        part: _window(node, digit, start, start + _sizes(tracer, node, part)[axis])
        for part, start in parts.items()
    }
    return [(part, found) for part, found in inside.items() if found is not None]


@_rule("Split", "Concat")
def _split(tracer: Tracer, node: ir.Node, slot: int, digit: Digit) -> _Links:
    split = is_op(node, "Split")
    whole = 0 if split else -1
    places = [~i for i in range(len(node.outputs))] if split else list(range(len(node.inputs)))
    axis = attribute(node, "axis", 0) % len(_sizes(tracer, node, whole))
    parts, start = {}, 0
    for place in places:
        parts[place] = start
        start += _sizes(tracer, node, place)[axis]
    return _pieces(tracer, node, slot, digit, whole, parts, axis)


@_rule("Slice")
def _slice(tracer: Tracer, node: ir.Node, slot: int, digit: Digit) -> _Links:
    sizes = _sizes(tracer, node, 0)
    starts, ends, axes, steps = (
        int_list(node.inputs[i]) if len(node.inputs) > i and node.inputs[i] is not None else []
        for i in (1, 2, 3, 4)
    )
    if axes is None or (not axes and starts is None):
        raise ObstacleError(f"{describe(node)} cuts axes that are computed")
    axes = [axis % len(sizes) for axis in axes or range(len(starts or ()))]
    if digit.axis not in axes:
        return [(-1 if slot == 0 else 0, digit)]
    i = axes.index(digit.axis)
    if starts is None or ends is None or steps is None or (steps and steps[i] != 1):
        raise ObstacleError(f"{describe(node)} takes some of it")
    start, _, _ = slice(starts[i], ends[i]).indices(sizes[digit.axis])
    return _pieces(tracer, node, slot, digit, 0, {-1: start}, digit.axis)


@_rule("Gather")
def _gather(tracer: Tracer, node: ir.Node, slot: int, digit: Digit) -> _Links:
    rank, picked = len(_sizes(tracer, node, 0)), len(_sizes(tracer, node, 1))
    axis = attribute(node, "axis", 0) % rank
    ties = [{0: a, -1: a if a < axis else a - 1 + picked} for a in range(rank) if a != axis]
    ties += [{1: i, -1: axis + i} for i in range(picked)]
    return _along(ties, node, slot, digit)


@_rule("MatMul")
def _matmul(tracer: Tracer, node: ir.Node, slot: int, digit: Digit) -> _Links:
    ranks = {s: len(_sizes(tracer, node, s)) for s in (0, 1, -1)}
    if min(ranks.values()) < 2:
        raise ObstacleError(f"{describe(node)} of a vector is not followed")
    ties = [
        {0: ranks[0] - 1, 1: ranks[1] - 2},
        {0: ranks[0] - 2, -1: ranks[-1] - 2},
        {1: ranks[1] - 1, -1: ranks[-1] - 1},
    ]
    return _along([*ties, *_broadcast(tracer, node, (0, 1, -1), dims=2)], node, slot, digit)


@_rule("Conv")
def _conv(tracer: Tracer, node: ir.Node, slot: int, digit: Digit) -> _Links:
    if attribute(node, "group", 1) != 1:
        raise ObstacleError(f"{describe(node)} works in groups of channels")
    bias = {2: 0} if len(node.inputs) > 2 and node.inputs[2] is not None else {}
    return _along([{0: 0, -1: 0}, {0: 1, 1: 1}, {1: 0, **bias, -1: 1}], node, slot, digit)


@_rule("RotaryEmbedding")
def _rotary(tracer: Tracer, node: ir.Node, slot: int, digit: Digit) -> _Links:
    """Heads are rotated alike; the channels of a head in pairs."""
    sizes = _sizes(tracer, node, 0)
    if slot not in (0, -1):
        raise ObstacleError(f"{describe(node)} rotates by it")
    inside = digit
    if len(sizes) == 3:
        heads = attribute(node, "num_heads", 0) or 1
        inside = _regroup(node, digit, sizes, (*sizes[:2], heads, sizes[2] // heads))
    if inside.axis != (1 if len(sizes) == 4 else 2):
        raise ObstacleError(f"{describe(node)} rotates channels in pairs")
    return [(-1 if slot == 0 else 0, digit)]


@_rule("Attention")
def _attention(tracer: Tracer, node: ir.Node, slot: int, digit: Digit) -> _Links:
    """Heads of query, key, value and output go together, and query head h with key-value head h // (query
    heads / key-value heads); likewise the channels inside the heads of query and key, of value and output."""
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]) or any(node.inputs[4:6]):
        raise ObstacleError(f"{describe(node)} keeps it in a cache")
    if slot not in (0, 1, 2, -1):
        raise ObstacleError(f"{describe(node)} masks by it")
    sizes = {s: _sizes(tracer, node, s) for s in (0, 1, 2, -1)}
    flat = len(sizes[0]) == 3
    heads = {
        s: attribute(node, "q_num_heads" if s in (0, -1) else "kv_num_heads", 0) if flat else sizes[s][1]
        for s in sizes
    }
    split = {s: (*v[:2], heads[s], v[2] // heads[s]) if flat else v for s, v in sizes.items()}
    inside = _regroup(node, digit, sizes[slot], split[slot]) if flat else digit
    at_heads = 2 if flat else 1
    if inside.axis == 3:
        linked = [({0: 1, 1: 0, 2: -1, -1: 2}[slot], inside)]
    elif inside.axis == at_heads:
        linked = _heads(node, slot, inside, heads[0] // heads[1])
    else:
        raise ObstacleError(f"{describe(node)} mixes it")
    back = [(s, _regroup(node, d, split[s], sizes[s]) if flat else d) for s, d in linked]
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    shape = tracer.sizes(mask) if mask is not None else ()
    if inside.axis == at_heads and len(shape) >= 3 and shape[-3] != 1:
        of_queries = inside if slot in (0, -1) else next(d for s, d in linked if s == 0)
        back.append((3, replace(of_queries, axis=len(shape) - 3)))
    return back


def _heads(node: ir.Node, slot: int, digit: Digit, group: int) -> list[tuple[int, Digit]]:
    """The heads of the other operands; `group` query heads read one key-value head."""
    if slot in (1, 2):
        queries = replace(digit, start=digit.start * group, inner=digit.inner * group)
        return [({1: 2, 2: 1}[slot], digit), (0, queries), (-1, queries)]
    other = {0: -1, -1: 0}[slot]
    period = digit.n * digit.inner
    if group % period == 0 and digit.start % period == 0:  # they read the same keys and values
        return [(other, digit)]
    if digit.inner % group == 0 and digit.start % group == 0:
        keys = replace(digit, start=digit.start // group, inner=digit.inner // group)
        return [(other, digit), (1, keys), (2, keys)]
    if group % digit.inner == 0 and digit.n % (group // digit.inner) == 0:
        raise _SplitError(node, group // digit.inner)
    raise ObstacleError(f"{describe(node)} shares keys and values between heads")
