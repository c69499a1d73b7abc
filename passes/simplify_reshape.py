"""Reshape targets become constants where the operator's own 0 and -1 can say them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.passes.base import GraphPass, add_initializer, attribute, int_list, is_op, shape_of
from qgraph.passes.shapes.dims import World, from_ir


class SimplifyReshape(GraphPass):
    """Rewrites a computed target shape, `Concat(Shape(x)[0], ..., 384)`, to a constant such as [0, 0, 384].

    A fixed dimension stands as itself, one that equals the input's at the same place as 0, and one other may
    be -1. So the arithmetic on shapes dies, and the graph no longer computes what inference knows. A Reshape
    of a Reshape reads what that reads, where a constant can still say its target.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in tuple(model.graph):
            if is_op(node, "Reshape"):
                modified |= self._skip(model.graph, node) or self._simplify(model.graph, node)
        return ir.passes.PassResult(model, modified)

    def _skip(self, graph: ir.Graph, node: ir.Node) -> bool:
        """Lets a Reshape of a Reshape read the first one's input."""
        inner = node.inputs[0].producer() if node.inputs[0] is not None else None
        if inner is None or not is_op(inner, "Reshape", "Flatten"):
            return False
        spelled = _spelled(inner.inputs[0], node.outputs[0])
        if spelled is None:
            return False
        node.replace_input_with(0, inner.inputs[0])
        _set_target(graph, node, spelled)
        return True

    def _simplify(self, graph: ir.Graph, node: ir.Node) -> bool:
        target = shape_of(node.outputs[0])
        if int_list(node.inputs[1]) is not None or target is None or shape_of(node.inputs[0]) is None:
            return False
        spelled = _spelled(node.inputs[0], node.outputs[0])
        if spelled is None:
            self.refuse(node, f"its target {list(map(str, target))} needs more than one computed dimension")
            return False
        _set_target(graph, node, spelled)
        return True


def _spelled(source: ir.Value | None, result: ir.Value) -> list[int] | None:
    """The constant that makes a Reshape of `source` have the shape of `result`, or None."""
    before, target = shape_of(source), shape_of(result)
    if before is None or target is None:
        return None
    spelled: list[int] = []
    for i, dim in enumerate(target):
        if isinstance(dim, int) and dim > 0:
            spelled.append(dim)
        elif isinstance(dim, ir.SymbolicDim) and i < len(before) and before[i] == dim:
            spelled.append(0)
        elif isinstance(dim, ir.SymbolicDim) and -1 not in spelled:
            spelled.append(-1)
        else:
            return None
    # What is left for -1 cannot be told where another dimension is 0: the length of a cache may be.
    sizes = [from_ir(dim) for dim in target]
    if -1 in spelled and not all(size is not None and World().greater_equal(size, 1) for size in sizes):
        return None
    return spelled


def _set_target(graph: ir.Graph, node: ir.Node, target: list[int]) -> None:
    node.replace_input_with(1, add_initializer(graph, np.array(target, np.int64), f"{node.name}.shape"))
    if attribute(node, "allowzero", 0):
        node.attributes.pop("allowzero")
