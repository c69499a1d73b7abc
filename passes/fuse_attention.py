"""Attention becomes one node, whatever its spelling was, and its cache a part of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph.passes.attention_mask import ABSORBS, Frame, Known, conjuncts, formula_of, leaves_a_key
from qgraph.passes.attention_pattern import Decomposed, NoMatchError, match_attention, unrepeated
from qgraph.passes.base import (
    GraphPass,
    add_initializer,
    attribute,
    copy_metadata,
    describe,
    is_op,
    make_node,
    remove_dead,
    replace_node,
    shape_of,
)
from qgraph.passes.fold_index_functions import write_shape
from qgraph.passes.index_functions import dims_of, index_functions
from qgraph.passes.infer_shapes import known_checks
from qgraph.passes.shapes.dims import World, tidy


class FuseAttention(GraphPass):
    """softmax(scale q k^T + mask) v  ->  Attention. Runs on inferred shapes.

    Rules:
    1. The spellings of `attention_pattern`: q, k or their product scaled; scores capped by a tanh; masks
       added, or scores replaced by a constant where a condition is false; a guard Where(IsNaN(w), 0, w)
       behind the softmax; heads of k and v repeated for groups of queries. Masks that are added stay so;
       where each key of a query is hidden by -inf, the result is 0 instead of NaN.
    2. An Attention whose keys and values are heads repeated by Unsqueeze, Expand and Reshape reads the heads
       themselves.
    3. An Attention whose keys and values are Concat(past, new), the past an input and the result an output of
       the graph that nothing else reads, takes the past as such and gives the present: `present` is then
       the node's output.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        modified = False
        known: Known | None = None
        for node in tuple(graph):
            if not is_op(node, "Softmax") or node.graph is None:
                continue
            try:
                match = match_attention(node)
                if match is not None:
                    known = index_functions(graph) if known is None else known
                    _fuse(graph, match, known)
                    modified = True
            except NoMatchError as error:
                self.refuse(node, f"it looks like attention, but {error}")
        for node in tuple(graph):
            if is_op(node, "Attention"):
                modified |= self._read_heads(node)
                modified |= self._take_past(graph, node)
        return ir.passes.PassResult(model, modified)

    def _read_heads(self, node: ir.Node) -> bool:
        """Rule 2."""
        k, v = node.inputs[1:3]
        if k is None or v is None or any(x is not None for x in node.inputs[4:]):
            return False
        heads = [unrepeated(x) for x in (k, v)]
        if heads == [k, v]:
            return False
        if len({(shape_of(x) or ())[1:2] for x in heads}) > 1:
            self.refuse(node, "its keys and values are heads repeated in different ways")
            return False
        for index, value in enumerate(heads, start=1):
            node.replace_input_with(index, value)
        remove_dead([k, v])
        return True

    def _take_past(self, graph: ir.Graph, node: ir.Node) -> bool:
        """Rule 3."""
        if any(v is not None for v in node.inputs[4:]) or len(node.outputs) > 1:
            return False
        halves = [_cache_half(value) for value in node.inputs[1:3]]
        if halves == [None, None]:
            return False
        key, value = halves
        if key is None or value is None:
            self.refuse(node, "only one of its key and value has a past, so its cache stays outside")
            return False
        if key.present is value.present:
            self.refuse(node, "its keys are its values, so its cache stays outside")
            return False
        for half in (key, value):
            others = [n for n in half.present.consumers() if n is not node and not is_op(n, "Shape")]
            if others:
                self.refuse(
                    node,
                    f"its cache stays outside: {describe(half.present)} is read by {describe(others[0])}",
                )
                return False
        if not all(_write_shapes(graph, half.present) for half in (key, value)):
            self.refuse(
                node, "its cache stays outside: the shape of it is read, and the inputs do not tell it"
            )
            return False
        _absorb(graph, node, key, value)
        return True


def _fuse(graph: ir.Graph, match: Decomposed, known: Known) -> None:
    """Rule 1."""
    shapes = [shape_of(value) or () for value in (*match.addends, *(f.condition for f in match.fills))]
    if shapes and all(shape[-1:] == (1,) or not shape for shape in shapes):
        # The standard pads a mask with fewer columns than keys, and does not broadcast it.
        raise NoMatchError("its mask is the same for all keys")
    new: list[ir.Node] = []

    def op(op_type: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        new.append(make_node(op_type, inputs, attributes))
        return new[-1].outputs[0]

    summands = list(match.addends)
    mask = None
    if match.fills:
        value = _fill_value(graph, match, known)
        conditions = [op("Not", [f.condition]) if f.negated else f.condition for f in match.fills]
        mask = functools.reduce(lambda a, b: op("And", [a, b]), conditions)
        if value is not None or summands:
            numbers = [0.0, -np.inf if value is None else value]
            zero, hidden = (add_initializer(graph, np.array(x, np.float32), "mask") for x in numbers)
            summands.append(op("Where", [mask, zero, hidden]))
    if summands:
        mask = functools.reduce(lambda a, b: op("Add", [a, b]), summands)
    k = match.k
    if match.k_transposed:
        source, perm = _before_transpose(k)
        k = op("Transpose", [source], perm=[perm[axis] for axis in (0, 1, 3, 2)])
    attributes = {"scale": match.scale, **({"softcap": match.softcap} if match.softcap else {})}
    op("Attention", [match.q, k, match.v, *([] if mask is None else [mask])], **attributes)
    new[-1].name = match.product.name
    replaced = list(match.product.inputs)
    replace_node(match.product, new)
    remove_dead(replaced)


def _before_transpose(value: ir.Value) -> tuple[ir.Value, Sequence[int]]:
    """(x, perm): `value`, of rank 4, is x with its axes in this order."""
    node = value.producer()
    source = node.inputs[0] if node is not None and is_op(node, "Transpose") else None
    if node is None or source is None:
        return value, (0, 1, 2, 3)
    return source, attribute(node, "perm", (3, 2, 1, 0))


def _fill_value(graph: ir.Graph, match: Decomposed, known: Known) -> float | None:
    """What hides scores: a number that is added to them, or None where -inf does the same.

    Raises NoMatchError where neither gives the same weights.
    """
    values = {fill.value for fill in match.fills}
    if len(values) > 1:
        raise NoMatchError("it hides scores by two different numbers")
    (value,) = values
    if value == -np.inf:
        return None
    if not match.addends and _leaves_a_key(graph, match, known):
        return None
    if value > ABSORBS:
        raise NoMatchError(f"it puts {value:g} in the place of scores, and a query may have no others")
    if match.filled_last:
        raise NoMatchError(f"it puts {value:g} in the place of scores that a mask was added to")
    return value


def _leaves_a_key(graph: ir.Graph, match: Decomposed, known: Known) -> bool:
    scores = dims_of(match.weights)
    if scores is None or not World(at_least=known_checks(graph)).greater_equal(scores[-1], scores[-2]):
        return False
    queries, keys = scores[-2:]
    frame = Frame(queries, keys, tidy(keys - queries))
    conditions = [part for fill in match.fills for part in conjuncts(fill.condition, fill.negated)]
    found = [formula_of(*condition, known) for condition in conditions]
    return all(f is not None and leaves_a_key(*f, frame) for f in found)


@dataclass(frozen=True)
class _Half:
    """`present` is Concat(past, new) along the tokens."""

    past: ir.Value
    new: ir.Value
    present: ir.Value


def _cache_half(value: ir.Value | None) -> _Half | None:
    concat = value.producer() if value is not None else None
    if value is None or concat is None or not is_op(concat, "Concat") or len(concat.inputs) != 2:
        return None
    past, new = concat.inputs
    if (
        past is None
        or new is None
        or len(shape_of(value) or ()) != 4
        or attribute(concat, "axis", 0) not in (2, -2)
    ):
        return None
    return _Half(past, new, value) if past.is_graph_input() and value.is_graph_output() else None


def _write_shapes(graph: ir.Graph, value: ir.Value) -> bool:
    """Lets no Shape read `value`: what it gives is computed from the inputs' sizes."""
    for node in value.consumers():
        if not is_op(node, "Shape"):
            continue
        dims = dims_of(value)
        assert dims is not None  # of rank 4
        start, end = attribute(node, "start", 0), attribute(node, "end", None)
        nodes = write_shape(graph, dims[slice(start, end)])
        if nodes is None:
            return False
        replace_node(node, nodes)
    return not any(is_op(node, "Shape") for node in value.consumers())


def _absorb(graph: ir.Graph, node: ir.Node, key: _Half, value: _Half) -> None:
    """Puts an Attention with a past in the place of `node` and of the Concats that it reads."""
    for half in (key, value):
        _write_shapes(graph, half.past)  # a reader of a cache's shape does no harm, if one is left
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    cached = ir.node(
        "Attention",
        [node.inputs[0], key.new, value.new, mask, key.past, value.past],
        attributes=node.attributes,
        num_outputs=3,
        name=node.name,
    )
    copy_metadata(node, [cached])
    old = [node.outputs[0], key.present, value.present]
    concats = [v.producer() for v in old[1:]]
    removed = [node, *(n for n in concats if n is not None)]
    ir.convenience.replace_nodes_and_values(graph, node, removed, [cached], old, cached.outputs)
