"""Cosines and sines of a rotary embedding: which are the same, and their half where each stands twice."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qgraph.passes.base import (
    add_initializer,
    attribute,
    constant,
    int_list,
    is_op,
    make_node,
    remove_dead,
    shape_of,
)

_DEPTH = 16  # nodes between an angle and what it is computed from, which is more than any exporter writes

HALVES, PAIRS = 0, 1  # a table's columns are (f, f), or f0, f0, f1, f1, ...


_RANDOM = (
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
)


class RotaryTables:
    """What is known of the tables that rotary embeddings of a graph read.

    To be asked in the order of the nodes that read them.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._first: dict[tuple, ir.Value] = {}
        self._canonical: dict[ir.Value, ir.Value] = {}
        self._halves: dict[tuple[ir.Value, int], ir.Value | None] = {}
        self._once: dict[tuple, ir.Value] = {}
        self._made: list[ir.Value] = []

    def canonical(self, value: ir.Value, depth: int = _DEPTH) -> ir.Value:
        """The first value seen that is computed as `value` is: same operators, attributes and inputs."""
        if value in self._canonical:
            return self._canonical[value]
        node = value.producer()
        if node is None or depth == 0 or len(node.outputs) > 1 or is_op(node, *_RANDOM):
            return value
        if any(map(_holds_graph, _attributes(node))):
            return value
        inputs = tuple(None if v is None else self.canonical(v, depth - 1) for v in node.inputs)
        attributes = tuple(sorted((a.name, repr(a.value)) for a in _attributes(node)))
        key = (node.op_identifier(), inputs, attributes)
        self._canonical[value] = self._first.setdefault(key, value)
        return self._canonical[value]

    def alike(self, a: ir.Value, b: ir.Value) -> bool:
        """Whether two values are computed in the same way."""
        return self.canonical(a) is self.canonical(b)

    def once(self, key: tuple, make: Callable[[], ir.Value]) -> ir.Value:
        """What `make` made when it was first asked for `key`."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def half(self, table: ir.Value, order: int, before: ir.Node) -> ir.Value | None:
        """[.., n] of [.., 2n], where each column is known to stand twice in the given order, else None.

        New nodes are put before the given one.
        """
        value = self.canonical(table)
        if (value, order) not in self._halves:
            self._halves[value, order] = self._half(value, order, before)
        return self._halves[value, order]

    def discard_unused(self) -> None:
        """Removes the halves that nobody came to read."""
        remove_dead(self._made)
        for value in self._made:
            if value.is_initializer() and not value.uses():
                del self._graph.initializers[value.name or ""]

    def _half(self, value: ir.Value, order: int, before: ir.Node) -> ir.Value | None:
        shape = shape_of(value)
        if not shape or not isinstance(shape[-1], int) or shape[-1] % 2:
            return None
        array = constant(value)
        if array is not None:
            first, second = _parts(array, order)
            if not np.array_equal(first, second):
                return None
            half = add_initializer(self._graph, np.ascontiguousarray(first), f"{value.name}.half")
            self._made.append(half)
            return half
        node = value.producer()
        if node is None or node.domain != "":
            return None
        if (single := self._repeated(node, order)) is not None:
            return single
        if not _keeps_columns(node, shape):
            return None
        inputs = list(node.inputs)
        for index, operand in enumerate(node.inputs):
            dims = shape_of(operand)
            if index == 0 or is_op(node, "Add", "Sub", "Mul", "Div"):
                if operand is None or not dims:
                    if dims is None:
                        return None
                    continue  # a scalar
                if dims[-1] == 1 and shape[-1] != 1:
                    continue  # the same for every column
                inputs[index] = self.half(operand, order, before)
                if inputs[index] is None:
                    return None
        made = make_node(node.op_type, inputs, {a.name: a.value for a in _attributes(node)})
        self._graph.insert_before(before, made)
        half = made.outputs[0]
        self._made.append(half)
        half.type, half.shape = value.type, ir.Shape([*shape[:-1], shape[-1] // 2])
        return half

    def _repeated(self, node: ir.Node, order: int) -> ir.Value | None:
        """f, where the node writes each of its columns twice."""
        if order == HALVES:
            return self._both(node, len(shape_of(node.outputs[0]) or ()) - 1)
        source = node.inputs[0] if is_op(node, "Reshape") else None
        inner, out = shape_of(source), shape_of(node.outputs[0])
        if source is None or inner is None or out is None or inner[-1] != 2 or inner[:-2] != out[:-1]:
            return None
        writer = source.producer()
        if writer is None or len(inner) != len(out) + 1:
            return None
        column = writer.inputs[0] if is_op(writer, "Expand", "Tile") else self._both(writer, len(inner) - 1)
        behind = column.producer() if column is not None else None
        if not is_op(behind, "Unsqueeze") or shape_of(column) != (*inner[:-1], 1):
            return None
        assert behind is not None
        return behind.inputs[0] if shape_of(behind.inputs[0]) == inner[:-1] else None

    def _both(self, node: ir.Node, axis: int) -> ir.Value | None:
        """The value that a Concat along `axis` reads twice and nothing else."""
        if not is_op(node, "Concat") or len(node.inputs) != 2:
            return None
        left, right = node.inputs
        if left is None or right is None or attribute(node, "axis", 0) not in (axis, -1):
            return None
        return left if self.alike(left, right) else None


def _attributes(node: ir.Node) -> list[ir.Attr]:
    return list(node.attributes.values())


def _holds_graph(given: ir.Attr) -> bool:
    return given.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _parts(table: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """The two columns of each pair, in that order."""
    n = table.shape[-1] // 2
    if order == HALVES:
        return table[..., :n], table[..., n:]
    return table[..., ::2], table[..., 1::2]


def _keeps_columns(node: ir.Node, shape: tuple[int | ir.SymbolicDim, ...]) -> bool:
    """Whether each column of the node's result is made of the same column of its operands alone."""
    rank = len(shape)
    if is_op(node, "Cos", "Sin", "Cast", "Neg", "Add", "Sub", "Mul", "Div"):
        return True
    inner = shape_of(node.inputs[0])
    if not inner or inner[-1] != shape[-1]:
        return False
    if is_op(node, "Unsqueeze", "Squeeze"):
        axes = int_list(node.inputs[1]) if len(node.inputs) > 1 else None
        rank = max(rank, len(inner))
        return axes is not None and all(axis % rank != rank - 1 for axis in axes)
    if is_op(node, "Transpose"):
        perm = attribute(node, "perm", None)
        return perm is not None and perm[-1] == rank - 1
    if is_op(node, "Gather"):
        return attribute(node, "axis", 0) % len(inner) != len(inner) - 1
    if is_op(node, "Slice"):
        axes = int_list(node.inputs[3]) if len(node.inputs) > 3 else None
        return axes is not None and all(axis % rank != rank - 1 for axis in axes)
    return False
