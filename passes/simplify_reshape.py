"""Reshape targets become constants where the operator's own 0 and -1 can say them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.passes.base import GraphPass, add_initializer, attribute, int_list, is_op, shape_of


class SimplifyReshape(GraphPass):
    """Rewrites a computed target shape, `Concat(Shape(x)[0], ..., 384)`, to a constant such as [0, 0, 384].

    A fixed dimension stands as itself, one that equals the input's at the same place as 0, and one other may
    be -1. So the arithmetic on shapes dies, and the graph no longer computes what inference knows.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in tuple(model.graph):
            if is_op(node, "Reshape") and int_list(node.inputs[1]) is None:
                modified |= self._simplify(model.graph, node)
        return ir.passes.PassResult(model, modified)

    def _simplify(self, graph: ir.Graph, node: ir.Node) -> bool:
        source, target = shape_of(node.inputs[0]), shape_of(node.outputs[0])
        if source is None or target is None:
            return False
        spelled: list[int] = []
        for i, dim in enumerate(target):
            if isinstance(dim, int) and dim > 0:
                spelled.append(dim)
            elif isinstance(dim, ir.SymbolicDim) and i < len(source) and source[i] == dim:
                spelled.append(0)
            elif isinstance(dim, ir.SymbolicDim) and -1 not in spelled:
                spelled.append(-1)
            else:
                self.refuse(
                    node, f"its target {list(map(str, target))} needs more than one computed dimension"
                )
                return False
        node.replace_input_with(1, add_initializer(graph, np.array(spelled, np.int64), f"{node.name}.shape"))
        if attribute(node, "allowzero", 0):
            node.attributes.pop("allowzero")
        return True
