"""Bounds lengths by the tables that are looked up by position."""

from __future__ import annotations

import onnx_ir as ir
import sympy

from qgraph.passes.base import GraphPass, attribute, is_op
from qgraph.passes.index_functions import IndexFunction, axis, index_functions
from qgraph.passes.infer_shapes import CHECKS, known_checks
from qgraph.passes.shapes.dims import Dim, World, tidy, to_ir


class BoundPositions(GraphPass):
    """Adds the check that a text is no longer than a table of positions. Runs on inferred shapes.

    Rules: a Gather from a constant table (or a lookup in a quantized one) by indices that are a function of
    where they stand and rise with every axis, such as `past + i`, takes its largest index from the last place
    of all; the table has more rows than that. What cannot be told before a run is left to the run.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        known = index_functions(graph)
        world = World(at_least=known_checks(graph))
        added = []
        for node in graph:
            table, indices = _lookup(node)
            if table is None or table.shape is None or indices not in known:
                continue
            rows, last = table.shape[attribute(node, "axis", 0)], _largest(known[indices])
            if not isinstance(rows, int) or last is None or world.greater_equal(rows, tidy(last + 1)):
                continue
            offset, length = sympy.sympify(last + 1).as_coeff_Add()  # so that a length stands alone if it can
            message = f"'{table.name}' has {rows} rows, an index for each position: the text is too long"
            added.append((rows - int(offset), to_ir(tidy(length)), message))
        checks = graph.meta.get(CHECKS, [])
        new = [check for check in dict.fromkeys(added) if check not in checks]
        if new:
            graph.meta[CHECKS] = [*checks, *new]
        return ir.passes.PassResult(model, bool(new))


def _lookup(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """(table, indices) of a lookup in a constant table."""
    if is_op(node, "Gather"):
        table, indices = node.inputs[:2]
    elif node.op_type == "QGatherNVFP4":
        indices, table = node.inputs[:2]
    else:
        return None, None
    return (table if table is not None and table.is_initializer() else None), indices


def _largest(indices: IndexFunction) -> Dim | None:
    """The element at the last place of every axis, where no other is larger; else None."""
    formula = indices.formula
    if formula.is_Boolean:
        return None
    last = {axis(k): dim - 1 for k, dim in enumerate(indices.shape)}
    if any(formula.diff(a).is_nonnegative is not True for a in formula.free_symbols & last.keys()):
        return None
    return tidy(formula.subs(last, simultaneous=True))
