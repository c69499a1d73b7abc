"""Decomposed rotary embeddings become RotaryEmbedding."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.passes.base import (
    GraphPass,
    add_initializer,
    attribute,
    int_list,
    is_op,
    make_node,
    remove_dead,
    replace_node,
    replace_value,
    shape_of,
)
from qgraph.passes.rotary_pattern import Rotated, match_rotary, swapped, value_of
from qgraph.passes.rotary_tables import PAIRS, RotaryTables

_SWAP = (0, 2, 1, 3)  # [batch, heads, length, size] and [batch, length, heads, size]


class FuseRotary(GraphPass):
    """The spellings of `rotary_pattern` -> RotaryEmbedding(x [B, H, S, D], cos, sin [B | 1, S, D/2]). Runs on
    inferred shapes.

    Rules:
    1. Tables in which every cosine stands twice are computed in half (`rotary_tables`), and all lose the axis
       of heads.
    2. Where x is [B, S, H, D], it is transposed before, and the result behind.
    3. A Concat with the columns that are not turned becomes part of it (`rotary_embedding_dim`).
    4. All RotaryEmbeddings, those of the file too, share the tables that are computed alike.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        tables = RotaryTables(graph)
        replaced: list[ir.Value | None] = []  # removed at the end: a later table may be like one of these
        refused = False
        for node in tuple(graph):
            match = match_rotary(node, tables.alike) if node.graph is not None else None
            if match is None:
                continue
            fusion = _Fusion(graph, tables, match, node)
            if reason := fusion.refusal():
                self.refuse(node, f"it looks like a rotary embedding, but {reason}")
                refused = True
            else:
                replaced += fusion.replace()
        tables.discard_unused()
        remove_dead(replaced)
        shared = _share(graph)
        if not refused:
            for node in graph:
                if is_op(node, "Concat", "Reshape") and swapped(node.outputs[0]):
                    self.refuse(node, "it pairs columns as a rotary embedding does, but what follows is none")
        return ir.passes.PassResult(model, bool(replaced) or shared)


def _share(graph: ir.Graph) -> bool:
    """Rule 4."""
    tables = RotaryTables(graph)
    replaced: list[ir.Value | None] = []
    for node in graph:
        for index in (1, 2) if is_op(node, "RotaryEmbedding") else ():
            table = node.inputs[index]
            if table is not None and (first := tables.canonical(table)) is not table:
                node.replace_input_with(index, first)
                replaced.append(table)
    remove_dead(replaced)
    return bool(replaced)


class _Fusion:
    """One match, found at `found`, before which new nodes are put."""

    def __init__(self, graph: ir.Graph, tables: RotaryTables, match: Rotated, found: ir.Node) -> None:
        self.graph = graph
        self.tables = tables
        self.match = match
        self.found = found
        self.axis = 1  # of the heads
        self.halves: list[ir.Value] = []

    def refusal(self) -> str | None:
        """Why the match may not be replaced."""
        match = self.match
        shape = shape_of(match.x.source)
        if match.node.outputs[0].dtype != ir.DataType.FLOAT:
            return f"it is of {match.node.outputs[0].dtype}, not float32"
        if shape is None or len(shape) != 4:
            return f"its input has rank {len(shape or ())}, not 4"
        if shape_of(match.node.outputs[0]) != (*shape[:3], len(match.x.places)):
            return "its result has another shape than its input"
        if reason := self._find_heads(shape):
            return reason
        for table in (match.cos, match.sin):
            half: ir.Value | None = self.tables.canonical(table)
            if match.doubled:
                half = self.tables.half(table, match.order, self.found)
            if half is None:
                return "the angles of the two columns of a pair are not known to be the same"
            self.halves.append(half)
        return None

    def _find_heads(self, shape: tuple[int | ir.SymbolicDim, ...]) -> str | None:
        """Sets the axis, 1 or 2, along which the tables must be, and are, the same; or says what is wrong."""
        wanted = self.match.turned if self.match.doubled else self.match.turned // 2
        possible = {1, 2}
        for table in (self.match.cos, self.match.sin):
            dims = shape_of(table)
            if dims is None or len(dims) > 4 or not dims or dims[-1] != wanted:
                return f"its cosines and sines do not have {wanted} columns"
            padded = (*[1] * (4 - len(dims)), *dims)
            if padded[0] not in (1, shape[0]):
                return "its cosines and sines have another batch than its input"
            possible &= {k for k in (1, 2) if padded[k] == 1 and padded[3 - k] == shape[3 - k]}
        if not possible:
            return "its cosines and sines are not one for each position, the same for all heads"
        self.axis = min(possible)
        return None

    def _cache(self, table: ir.Value) -> ir.Value:
        """`table`, which broadcasts to x, as [B or 1, S, n]."""

        def make() -> ir.Value:
            value, places = table, list(range(4))[4 - len(shape_of(table) or ()) :]
            if self.axis in places:
                above, at = value.producer(), places.index(self.axis)
                if is_op(above, "Unsqueeze") and _axes(above) == [at]:
                    assert above is not None and above.inputs[0] is not None
                    value = above.inputs[0]
                else:
                    value = self._insert("Squeeze", [value, self._constant([at])])
                places.remove(self.axis)
            return value if 0 in places else self._insert("Unsqueeze", [value, self._constant([0])])

        return self.tables.once(("cache", table, self.axis), make)

    def replace(self) -> list[ir.Value | None]:
        """Puts the operator in the place of the match. Returns what may be dead then."""
        match = self.match
        cos, sin = map(self._cache, self.halves)
        if match.backwards:
            sin = self.tables.once(("Neg", sin), lambda: self._insert("Neg", [sin]))
        attributes = {"interleaved": 1} if match.order == PAIRS else {}
        if match.turned < len(match.x.places):
            attributes["rotary_embedding_dim"] = match.turned
        x = value_of(match)
        if x is None:
            bounds = (match.x.places.start, match.x.places.stop, -1)
            x = self._insert("Slice", [match.x.source, *(self._constant([n]) for n in bounds)])
        last = match.node
        replaced = list(last.inputs)
        if self.axis == 1:
            node = make_node("RotaryEmbedding", [x, cos, sin], attributes, name=last.name)
            replace_node(last, [node])
        else:
            before = make_node("Transpose", [x], {"perm": _SWAP})
            node = make_node("RotaryEmbedding", [before.outputs[0], cos, sin], attributes, name=last.name)
            behind = make_node("Transpose", [node.outputs[0]], {"perm": _SWAP})
            replace_node(last, [before, node, behind])
            _join_swaps(behind)
            _join_swaps(before)
            replaced.append(behind.outputs[0])
        return replaced

    def _insert(self, op_type: str, inputs: list[ir.Value]) -> ir.Value:
        """The result of a new node."""
        node = make_node(op_type, inputs)
        self.graph.insert_before(self.found, node)
        return node.outputs[0]

    def _constant(self, numbers: list[int]) -> ir.Value:
        return add_initializer(self.graph, np.array(numbers, np.int64), "rotary.axes")


def _axes(node: ir.Node | None) -> list[int] | None:
    """The axes of an Unsqueeze, counted from the front."""
    axes = int_list(node.inputs[1]) if node is not None else None
    rank = len(shape_of(node.outputs[0]) or ()) if node is not None else 0
    return None if axes is None else [axis % rank for axis in axes]


def _join_swaps(node: ir.Node) -> None:
    """Lets readers of two swaps, one of them `node`, read what is before both."""
    pairs = [(node.inputs[0], node), *((node.outputs[0], reader) for reader in node.outputs[0].consumers())]
    for value, second in pairs:
        first = value.producer() if value is not None else None
        if not (_is_swap(first) and _is_swap(second)):
            continue
        assert first is not None and first.inputs[0] is not None and second.graph is not None
        if replace_value(second.outputs[0], first.inputs[0]):
            second.graph.remove(second, safe=True)


def _is_swap(node: ir.Node | None) -> bool:
    return node is not None and is_op(node, "Transpose") and tuple(attribute(node, "perm", ())) == _SWAP
