"""The key-value cache of a prepared decoder: which inputs hold the past, which outputs the present.

In the prepared graph a cache is `Attention(q, k, v, mask, past_key, past_value) -> (y, present_key,
present_value)` with past_* graph inputs that nobody else reads, present_* graph outputs, and the past of
length `<total> - <sequence>`: `<total>` is a named dimension, `<sequence>` the length of k and v.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qgraph.errors import UnsupportedError
from qgraph.passes.base import is_op
from qgraph.passes.shapes.dims import Dim, from_ir, tidy

_PARTS = (("key", 1, 4, 1), ("value", 2, 5, 2))  # name, inputs that are new and past, output


@dataclass(frozen=True)
class CachePair:
    """One half of an attention's cache: `present` is `past` with the new tokens behind it."""

    past: ir.Value
    present: ir.Value
    node: ir.Node


@dataclass(frozen=True)
class Cache:
    """All caches of a graph. `total` names the dimension of past and new tokens together, `sequence` is the
    number of new ones."""

    pairs: tuple[CachePair, ...]
    total: str
    sequence: Dim


def find_cache(graph: ir.Graph) -> Cache | None:
    """The caches of a prepared graph, in order of its nodes; None where it has none.

    Raises:
        UnsupportedError: an Attention has a past that is not of this form; says which input, and why.
    """
    pairs: list[CachePair] = []
    lengths: dict[tuple[str, Dim], ir.Value] = {}
    for node in graph:
        if node.op_type != "Attention" or node.domain or not any(node.inputs[4:6]):
            continue
        for part, new_at, past_at, present_at in _PARTS:
            past = node.inputs[past_at] if past_at < len(node.inputs) else None
            present = node.outputs[present_at] if present_at < len(node.outputs) else None
            if past is None:
                raise UnsupportedError(f"Attention node '{node.name}' has a past, but no past {part}")
            lengths.setdefault(_lengths(node, past, present, node.inputs[new_at], graph), past)
            assert present is not None  # _lengths refuses
            pairs.append(CachePair(past, present, node))
    if not pairs:
        return None
    if len(lengths) > 1:
        first, second = list(lengths.values())[:2]
        raise UnsupportedError(f"caches '{first.name}' and '{second.name}' differ in length")
    total, sequence = next(iter(lengths))
    return Cache(tuple(pairs), total, sequence)


def _lengths(
    node: ir.Node, past: ir.Value, present: ir.Value | None, new: ir.Value | None, graph: ir.Graph
) -> tuple[str, Dim]:
    """(total, sequence) of one half of a cache."""

    def refuse(why: str) -> UnsupportedError:
        return UnsupportedError(f"cache '{past.name}' of Attention node '{node.name}': {why}")

    if past not in graph.inputs:
        raise refuse("it is no input of the model")
    if past.is_graph_output() or len(_readers(past)) > 1:
        raise refuse("it is read elsewhere, too")
    if present is None or present not in graph.outputs:
        raise refuse("what it becomes is no output of the model")
    if readers := _readers(present):
        raise refuse(f"what it becomes, '{present.name}', is read by node '{readers[0].name}'")
    shapes = [None if v is None else v.shape for v in (past, present, new)]
    if shapes[0] is None or shapes[1] is None or shapes[2] is None:
        raise refuse("its shape is not known")
    if len(shapes[0]) != 4 or len(shapes[1]) != 4:
        raise refuse("it must have 4 dimensions: batch, heads, tokens, size of a head")
    held, total, sequence = (from_ir(s[2 if len(s) == 4 else 1]) for s in shapes if s is not None)
    if held is None or total is None or sequence is None:
        raise refuse("its length is not known")
    if isinstance(total, int) or not total.is_Symbol:
        raise refuse(f"its length with the new tokens, '{total}', must be a dimension with a name of its own")
    if tidy(total - sequence) != held:
        raise refuse(f"its length is '{held}', not '{total} - {sequence}'")
    return str(total), sequence


def _readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read the elements of `value`, one entry a use: its shape is known without them."""
    return [node for node, _ in value.uses() if not is_op(node, "Shape", "Size")]
