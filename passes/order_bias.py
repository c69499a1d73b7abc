"""The bias of a linear layer is the second operand of its Add."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.passes.base import GraphPass, is_op


class OrderBias(GraphPass):
    """Add(constant, x) -> Add(x, constant), and the same for Mul, so that patterns need to know one order
    only."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            if not is_op(node, "Add", "Mul") or len(node.inputs) != 2:
                continue
            left, right = node.inputs
            if (
                left is not None
                and right is not None
                and left.is_initializer()
                and not right.is_initializer()
            ):
                node.replace_input_with(0, right)
                node.replace_input_with(1, left)
                modified = True
        return ir.passes.PassResult(model, modified)
