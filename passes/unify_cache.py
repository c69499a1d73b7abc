"""The past of a decoder gets the length that its other inputs tell: all tokens less the new ones."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
import sympy

from qgraph.passes.base import GraphPass, attribute, describe, is_op, shape_of
from qgraph.passes.infer_shapes import CHECKS
from qgraph.passes.shapes.dims import from_ir, symbol, tidy, to_ir

TOTAL = "total_sequence"
SEQUENCE = "sequence"

_TOKENS = ("input_ids", "inputs_embeds")
_MASK = "attention_mask"


class UnifyCache(GraphPass):
    """Names the lengths of a key-value cache alike, whatever an exporter called them.

    A cache is an input that a Concat along its axis 2 puts in front of new tokens, or that an Attention takes
    as its past, where the result is an output. Exporters call its length `past_sequence_length`, or `s15` for
    the keys and `s89` for the values of one layer, and the rest `past_sequence_length + sequence_length`.
    From here on, with `<sequence>` the length of `input_ids`:
    * axis 1 of `attention_mask` is one named dimension `<total>`: its own name where it has one for itself,
      else `total_sequence`; its batch is that of `input_ids`;
    * axis 2 of every past is `<total> - <sequence>`, of every present `<total>`.
    So no named dimension is ever 0, though a past may be. `<total> >= <sequence>` is a check of the graph.

    Runs before shapes are inferred, on one graph with its constants as initializers. A cache of fixed length
    is left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        pairs = _pairs(graph)
        tokens = next((v for name in _TOKENS for v in graph.inputs if v.name == name), None)
        for value in graph.inputs:
            if "past" in (value.name or "") and value not in pairs:
                self.refuse(value, "no node puts new tokens behind it on axis 2 and gives that as an output")
        if not pairs:
            return ir.passes.PassResult(model, False)
        if tokens is None or len(shape_of(tokens) or ()) < 2:
            self.refuse("inputs", f"a cache, but no '{_TOKENS[0]}' [batch, sequence] that says what is new")
            return ir.passes.PassResult(model, False)
        for past in pairs:
            if isinstance(length := _dims(past)[2], int):
                self.refuse(past, f"it is a cache of {length} tokens: export it with a dynamic length")
                return ir.passes.PassResult(model, False)
        return ir.passes.PassResult(model, _unify(graph, pairs, tokens))


def _pairs(graph: ir.Graph) -> dict[ir.Value, ir.Value]:
    """Every past, with its present."""
    found: dict[ir.Value, ir.Value] = {}
    for node in graph:
        parts: list[tuple[ir.Value | None, ir.Value]] = []  # past and present
        if is_op(node, "Concat") and len(node.inputs) == 2 and attribute(node, "axis", 0) in (2, -2):
            parts = [(node.inputs[0], node.outputs[0])]
        elif is_op(node, "Attention"):
            parts = list(zip(node.inputs[4:6], node.outputs[1:3], strict=False))
        for past, present in ((_origin(p), q) for p, q in parts):
            if (
                past is not None
                and past.is_graph_input()
                and len(_dims(past)) == 4
                and present.is_graph_output()
            ):
                found[past] = present
    return found


def _origin(value: ir.Value | None) -> ir.Value | None:
    """What `value` is a mere copy of."""
    node = value.producer() if value is not None else None
    if node is None or not is_op(node, "Identity", "Concat") or len(node.inputs) != 1:
        return value
    return _origin(node.inputs[0])


def _unify(graph: ir.Graph, pairs: dict[ir.Value, ir.Value], tokens: ir.Value) -> bool:
    mask = next((v for v in graph.inputs if v.name == _MASK and len(_dims(v)) >= 2), None)
    batch, length = _dims(tokens)[:2]
    if isinstance(length, ir.SymbolicDim) and not _is_name(length):
        length = ir.SymbolicDim(_free(graph, SEQUENCE))
    name = _total(graph, pairs, mask, length)
    total = ir.SymbolicDim(name)
    modified = _set(tokens, {1: length})
    if mask is not None:
        wanted = {0: batch, len(_dims(mask)) - 1: total}
        modified |= _set(
            mask, {k: d for k, d in wanted.items() if isinstance(_dims(mask)[k], ir.SymbolicDim)}
        )
    new = from_ir(length)
    assert new is not None  # a number or a name
    past_length = to_ir(tidy(symbol(name) - new))
    for past, present in pairs.items():
        modified |= _set(past, {2: past_length})
        if len(_dims(present)) == 4:
            modified |= _set(present, {2: total})
    check = (
        total,
        length,
        f"{describe(mask or tokens)}: all tokens, '{total}', are at least the new ones, '{length}'",
    )
    known = graph.meta.setdefault(CHECKS, [])
    if check not in known:
        known.append(check)
    return modified


def _total(
    graph: ir.Graph, pairs: Iterable[ir.Value], mask: ir.Value | None, length: int | ir.SymbolicDim
) -> str:
    """A name for the number of all tokens; the same one on a graph that has been here before."""
    dim = _dims(mask)[-1] if mask is not None else None
    others = [v for v in graph.inputs if v is not mask and v not in pairs]
    if isinstance(dim, ir.SymbolicDim) and _is_name(dim) and not any(dim in _dims(v) for v in others):
        return str(dim.value)
    for past in pairs:
        name = _known_total(_dims(past)[2], length)
        if name is not None:
            return name
    return _free(graph, TOTAL)


def _known_total(past: int | ir.SymbolicDim, length: int | ir.SymbolicDim) -> str | None:
    """t, where `past` is t - `length`."""
    if isinstance(past, int) or past.value is None or _is_name(past):
        return None
    try:
        total = tidy(from_ir(past) + from_ir(length))  # type: ignore[operator]
    except (ValueError, TypeError):
        return None
    return total.name if isinstance(total, sympy.Symbol) else None


def _free(graph: ir.Graph, wanted: str) -> str:
    """`wanted`, or `wanted_2`, ... : no dimension of an input."""
    taken = {d.value for v in graph.inputs for d in _dims(v) if isinstance(d, ir.SymbolicDim)}
    name, count = wanted, 2
    while name in taken:
        name, count = f"{wanted}_{count}", count + 1
    return name


def _is_name(dim: ir.SymbolicDim) -> bool:
    return dim.value is not None and dim.value.isidentifier()


def _dims(value: ir.Value) -> tuple[int | ir.SymbolicDim, ...]:
    return shape_of(value) or ()


def _set(value: ir.Value, changes: dict[int, int | ir.SymbolicDim]) -> bool:
    """Gives axes of `value` other dimensions. Returns whether any was another before."""
    dims = list(_dims(value))
    for axis, dim in changes.items():
        dims[axis] = dim
    if tuple(dims) == _dims(value):
        return False
    value.shape = ir.Shape(dims)
    return True
