"""Nodes that copy their input go."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.passes.base import (
    GraphPass,
    attribute,
    int_list,
    is_op,
    make_node,
    replace_node,
    replace_value,
    same_shape,
    scalar,
)


class EliminateIdentity(GraphPass):
    """Lets readers of a no-op read its input.

    Rules (shapes and types as inferred; a rule whose facts are not known does not apply):
    1. Identity; Dropout at inference; a Concat, Sum, Max, Min or Mean of one input.
    2. Cast to the type it has.
    3. Reshape, Expand, Tile, Squeeze, Unsqueeze, Slice, Pad, Flatten to the shape it has.
    4. Transpose that keeps the order of the axes.
    5. Add or Sub of 0, Mul or Div by 1, Pow 1, where broadcasting and types change nothing.

    An Identity from an input or initializer straight to a graph output stays: ONNX has no other way to say
    it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in tuple(model.graph):
            source = self._copied(node)
            if source is None:
                continue
            target = node.outputs[0]
            if replace_value(target, source):
                model.graph.remove(node, safe=True)
                modified = True
            elif node.op_type != "Identity":
                self._rename(node, source)
                modified = True
        return ir.passes.PassResult(model, modified)

    @staticmethod
    def _rename(node: ir.Node, source: ir.Value) -> None:
        """Puts an Identity in the place of another no-op that names a graph output."""
        identity = make_node("Identity", [source], name=node.name)
        replace_node(node, [identity], [identity.outputs[0], *(ir.Value() for _ in node.outputs[1:])])

    def _copied(self, node: ir.Node) -> ir.Value | None:
        """The input that `node` copies, or None."""
        if node.domain != "" or not node.inputs or node.inputs[0] is None:
            return None
        x = node.inputs[0]
        if node.op_type == "Identity":
            return x
        if node.op_type == "Dropout":
            return x if self._dropout_is_off(node) else None
        if node.op_type in ("Concat", "Sum", "Max", "Min", "Mean") and len(node.inputs) == 1:
            return x
        if node.op_type == "Cast":
            return x if x.dtype is not None and int(x.dtype) == attribute(node, "to", 0) else None
        if node.op_type in ("Reshape", "Expand", "Tile", "Squeeze", "Unsqueeze", "Slice", "Pad", "Flatten"):
            return x if same_shape(x, node.outputs[0]) and not _reorders(node) else None
        if node.op_type == "Transpose":
            perm = attribute(node, "perm", None)
            return x if perm is not None and list(perm) == sorted(perm) else None
        return self._neutral_operand(node)

    @staticmethod
    def _dropout_is_off(node: ir.Node) -> bool:
        if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
            return False
        training = node.inputs[2] if len(node.inputs) > 2 else None
        return training is None or scalar(training) == 0.0

    @staticmethod
    def _neutral_operand(node: ir.Node) -> ir.Value | None:
        if not is_op(node, "Add", "Sub", "Mul", "Div", "Pow") or len(node.inputs) != 2:
            return None
        neutral = 0.0 if node.op_type in ("Add", "Sub") else 1.0
        sides = (0, 1) if node.op_type in ("Add", "Mul") else (0,)
        for side in sides:
            x, other = node.inputs[side], node.inputs[1 - side]
            if (
                x is not None
                and scalar(other) == neutral
                and same_shape(x, node.outputs[0])
                and x.dtype is not None
            ):
                return x
        return None


def _reorders(node: ir.Node) -> bool:
    """A Slice with negative steps, or a Pad that cuts as much as it adds, keeps the shape but not the
    data."""
    if node.op_type == "Slice" and len(node.inputs) > 4 and node.inputs[4] is not None:
        steps = int_list(node.inputs[4])
        return steps is None or any(step < 0 for step in steps)
    if node.op_type == "Pad":
        pads = int_list(node.inputs[1]) if len(node.inputs) > 1 else None
        return pads is None or any(pads)
    return False
