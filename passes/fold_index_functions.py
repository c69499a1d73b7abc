"""Positions and masks in their shortest form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy

from qgraph.passes.base import (
    GraphPass,
    add_initializer,
    attribute,
    is_op,
    make_node,
    remove_dead,
    replace_node,
)
from qgraph.passes.index_functions import (
    Formula,
    IndexFunction,
    axis,
    components,
    dims_of,
    index_functions,
    is_truth,
)
from qgraph.passes.shapes.dims import Dim, symbol, tidy

_RELATIONS = {sympy.Le: "LessOrEqual", sympy.Lt: "Less", sympy.Ge: "GreaterOrEqual", sympy.Gt: "Greater"}


class FoldIndexFunctions(GraphPass):
    """Writes what follows from indices alone as such. Runs on inferred shapes.

    Rules:
    1. A tensor whose elements are a function of their indices (`index_functions`), read by something that is
       not, is computed anew from Range and comparisons, where that takes fewer nodes than it has now.
    2. A GatherND whose indices are its result's own indices, `x[b, s]` at [b, 1, 1, s], becomes Transpose,
       Unsqueeze and Expand of `x`; so does a Gather from a flattened `x`, at `b * length + s`.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        known = index_functions(graph)
        modified = False
        for node in tuple(graph):
            if node.graph is None:
                continue  # an earlier step removed it
            if is_op(node, "GatherND") and node.outputs[0] not in known:
                modified |= _gather_to_view(graph, node, known)
            elif is_op(node, "Gather") and node.outputs[0] not in known:
                modified |= _flat_gather_to_view(graph, node, known)
            elif node.outputs[0] in known and _is_read(node.outputs[0], known):
                modified |= _shorten(graph, node, known)
        return ir.passes.PassResult(model, modified)


def _is_read(value: ir.Value, known: dict[ir.Value, IndexFunction]) -> bool:
    """Whether something needs the elements that is not itself a function of indices."""
    readers = [user for user, _ in value.uses() if not is_op(user, "Shape", "Size")]
    return value.is_graph_output() or any(o not in known for user in readers for o in user.outputs)


def _shorten(graph: ir.Graph, node: ir.Node, known: dict[ir.Value, IndexFunction]) -> bool:
    """Rule 1."""
    value = node.outputs[0]
    if all(dim == 1 for dim in known[value].shape):
        return False  # a single number, such as a size, is left to the passes that know shapes
    writer = _Writer(graph, known[value].shape)
    result = writer.full(known[value].formula, value.dtype)
    if result is None or len(writer.nodes) >= _size(value):
        writer.discard()
        return False
    inputs = list(node.inputs)
    writer.keep()
    replace_node(node, writer.nodes, [result])
    known[result] = known.pop(value)
    remove_dead(inputs)
    return True


def _size(value: ir.Value) -> int:
    """Nodes that `value` takes, from inputs and initializers on."""
    nodes: set[ir.Node] = set()
    waiting = [value.producer()]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting.extend(v.producer() for v in node.inputs if v is not None)
    return len(nodes)


def _gather_to_view(graph: ir.Graph, node: ir.Node, known: dict[ir.Value, IndexFunction]) -> bool:
    """Rule 2."""
    data, indices = node.inputs
    source, shape = dims_of(data), dims_of(node.outputs[0])
    if data is None or indices is None or source is None or shape is None or attribute(node, "batch_dims", 0):
        return False
    picked = components(indices, known)
    if picked is None or len(picked) > len(source):
        return False
    places = {axis(k): k for k, dim in enumerate(shape) if dim != 1}
    targets = []  # axis of the result that each axis of the data becomes
    for formula, dim in zip(picked, source, strict=False):
        place = places.get(formula)
        if place is None or shape[place] != dim:
            return False
        targets.append(place)
    targets += range(len(shape) - (len(source) - len(picked)), len(shape))
    return len(set(targets)) == len(targets) and _replace_by_view(graph, node, data, targets)


def _flat_gather_to_view(graph: ir.Graph, node: ir.Node, known: dict[ir.Value, IndexFunction]) -> bool:
    """Rule 2, of a tensor whose axes were merged into one (others of length 1 may follow)."""
    flat, indices = node.inputs
    merge = flat.producer() if flat is not None else None
    if merge is None or not is_op(merge, "Reshape", "Flatten") or indices is None or indices not in known:
        return False
    data = merge.inputs[0]
    source, merged, shape = dims_of(data), dims_of(flat), dims_of(node.outputs[0])
    if data is None or source is None or merged is None or shape is None:
        return False
    if (
        attribute(node, "axis", 0) % len(merged) != 0
        or any(dim == 1 for dim in source)
        or any(dim != 1 for dim in merged[1:])
    ):
        return False
    rest, stride = known[indices].formula, sympy.Integer(1)
    targets: list[int] = []
    for dim in reversed(source):
        term = next((k for k, d in enumerate(shape) if d == dim and rest.coeff(axis(k)) == stride), None)
        if term is None:
            return False
        rest, stride = rest - axis(term) * stride, stride * dim
        targets.insert(0, term)
    return tidy(rest) == 0 and _replace_by_view(graph, node, data, targets)


def _replace_by_view(graph: ir.Graph, node: ir.Node, data: ir.Value, targets: list[int]) -> bool:
    """Puts `data`, its axes at the places `targets` of the result, in the place of a gather."""
    shape = dims_of(node.outputs[0])
    assert shape is not None  # the caller has looked
    writer = _Writer(graph, shape)
    result = writer.view(data, targets)
    if result is None:
        writer.discard()
        return False
    inputs = list(node.inputs)
    writer.keep()
    replace_node(node, writer.nodes, [result])
    remove_dead(inputs)
    return True


def write_shape(graph: ir.Graph, shape: tuple[Dim, ...]) -> list[ir.Node] | None:
    """Nodes, of which the last gives `shape` as int64 [rank], from the sizes of the graph's inputs. None
    where they do not tell it. The nodes are for the caller to insert."""
    writer = _Writer(graph, shape)
    try:
        result = writer.shape_vector()
        if result.producer() is None:
            writer.identity(result)
    except _InexpressibleError:
        writer.discard()
        return None
    writer.keep()
    return writer.nodes


class _InexpressibleError(Exception):
    """A formula that no few operators compute."""


class _Writer:
    """Nodes that compute a formula over the indices of a tensor of `shape`. After `keep` they are for the
    caller to insert; else `discard` must let go of what they read."""

    def __init__(self, graph: ir.Graph, shape: tuple[Dim, ...]) -> None:
        self.graph = graph
        self.shape = shape
        self.nodes: list[ir.Node] = []
        self._constants: list[tuple[ir.Value, np.ndarray]] = []
        self._written: dict[Any, ir.Value] = {}

    def keep(self) -> None:
        """Registers the constants."""
        for value, array in self._constants:
            value.replace_all_uses_with(add_initializer(self.graph, array, "index"))

    def discard(self) -> None:
        for node in self.nodes:
            for i in range(len(node.inputs)):
                node.replace_input_with(i, None)

    def full(self, formula: Formula, dtype: ir.DataType | None) -> ir.Value | None:
        """The tensor itself. None where no few operators compute it."""
        try:
            return self._full(formula, dtype)
        except _InexpressibleError:
            return None

    def view(self, data: ir.Value, targets: list[int]) -> ir.Value | None:
        """`data` with its axes at the places `targets` of the result, the same along all others. None where
        the shape cannot be computed."""
        try:
            return self._view(data, targets)
        except _InexpressibleError:
            return None

    def _full(self, formula: Formula, dtype: ir.DataType | None) -> ir.Value:
        result = self._cast(formula, dtype)
        used = {k for k in range(len(self.shape)) if axis(k) in formula.free_symbols}
        if any(dim != 1 and k not in used for k, dim in enumerate(self.shape)) or (self.shape and not used):
            result = self._op("Expand", [result, self.shape_vector()])
        return result

    def _view(self, data: ir.Value, targets: list[int]) -> ir.Value:
        order = sorted(range(len(targets)), key=targets.__getitem__)
        result = data
        if order != sorted(order):
            result = self._op("Transpose", [result], {"perm": order})
        missing = [k for k in range(len(self.shape)) if k not in targets]
        if missing:
            result = self._op("Unsqueeze", [result, self._constant(missing)])
        if any(self.shape[k] != 1 for k in missing):
            result = self._op("Expand", [result, self.shape_vector()])
        return result if result is not data else self.identity(data)

    def _cast(self, formula: Formula, dtype: ir.DataType | None) -> ir.Value:
        result = self._write(formula)
        if is_truth(formula):
            return result
        return result if dtype == ir.DataType.INT64 else self._op("Cast", [result], {"to": int(dtype or 7)})

    def _write(self, formula: Formula) -> ir.Value:
        """A tensor that broadcasts to the formula's values, of int64 or bool."""
        if formula not in self._written:
            self._written[formula] = self._made(formula)
        return self._written[formula]

    def _made(self, formula: Formula) -> ir.Value:
        if formula in (sympy.true, sympy.false):
            return self._constant(formula == sympy.true)
        if isinstance(formula, sympy.Integer):
            return self._constant(int(formula))
        for k, dim in enumerate(self.shape):
            if formula == axis(k):
                limit = self._write(sympy.sympify(dim))
                positions = self._op("Range", [self._constant(0), limit, self._constant(1)])
                others = [other for other in range(len(self.shape)) if other != k]
                return self._op("Unsqueeze", [positions, self._constant(others)]) if others else positions
        if isinstance(formula, sympy.Symbol):
            return self._op("Squeeze", [self._size_of(formula)])
        if isinstance(formula, sympy.Add | sympy.Mul):
            return self._chain(
                "Add" if isinstance(formula, sympy.Add) else "Mul",
                formula.as_ordered_terms()
                if isinstance(formula, sympy.Add)
                else formula.as_ordered_factors(),
            )
        if isinstance(formula, sympy.And | sympy.Or):
            return self._chain(
                "And" if isinstance(formula, sympy.And) else "Or", sorted(formula.args, key=str)
            )
        if isinstance(formula, sympy.Not):
            return self._op("Not", [self._write(formula.args[0])])
        if isinstance(formula, sympy.Eq | sympy.Ne):
            equal = self._op("Equal", [self._write(a) for a in formula.args])
            return equal if isinstance(formula, sympy.Eq) else self._op("Not", [equal])
        if type(formula) in _RELATIONS:
            return self._op(_RELATIONS[type(formula)], [self._write(a) for a in formula.args])
        raise _InexpressibleError

    def _chain(self, op: str, parts: Iterable[Formula]) -> ir.Value:
        first, *rest = [self._write(p) for p in parts]
        for value in rest:
            first = self._op(op, [first, value])
        return first

    def _size_of(self, name: sympy.Symbol) -> ir.Value:
        """[the size of an input dimension], int64 [1]."""
        if ("size", name) not in self._written:
            self._written["size", name] = self._made_size(name)
        return self._written["size", name]

    def _made_size(self, name: sympy.Symbol) -> ir.Value:
        for value in self.graph.inputs:
            for k, dim in enumerate(value.shape or ()):
                if isinstance(dim, ir.SymbolicDim) and dim.value == name.name and symbol(name.name) == name:
                    return self._op("Shape", [value], {"start": k, "end": k + 1})
        for value in self.graph.inputs:
            for k, dim in enumerate(dims_of(value) or ()):
                rest = tidy(name - dim)  # it is told by a difference: the length of a cache
                if not isinstance(dim, int) and (isinstance(rest, int) or name not in rest.free_symbols):
                    size = self._op("Shape", [value], {"start": k, "end": k + 1})
                    return self._op("Add", [size, self._write(sympy.sympify(rest))])
        raise _InexpressibleError

    def shape_vector(self) -> ir.Value:
        """`shape` as int64 [rank]."""
        if all(isinstance(dim, int) for dim in self.shape):
            return self._constant(list(self.shape))
        parts: list[ir.Value] = []
        for dim in self.shape:
            if isinstance(dim, int):
                parts.append(self._constant([dim]))
            elif isinstance(tidy(dim), sympy.Symbol):
                parts.append(self._size_of(dim))
            else:
                parts.append(self._op("Unsqueeze", [self._write(dim), self._constant([0])]))
        return self._op("Concat", parts, {"axis": 0}) if len(parts) > 1 else parts[0]

    def identity(self, value: ir.Value) -> ir.Value:
        return self._op("Identity", [value])

    def _constant(self, content: Any) -> ir.Value:
        array = np.asarray(content)
        array = array if array.dtype == np.bool_ else array.astype(np.int64)
        value = ir.Value()
        self._constants.append((value, array))
        return value

    def _op(self, op_type: str, inputs: list[ir.Value], attributes: dict | None = None) -> ir.Value:
        self.nodes.append(make_node(op_type, inputs, attributes))
        return self.nodes[-1].outputs[0]
