"""Caches of RotaryEmbedding get the batch that the standard asks for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.passes.base import GraphPass, add_initializer, is_op, make_node, shape_of


class BroadcastRotary(GraphPass):
    """Expands cosines and sines [1, length, half] of a RotaryEmbedding to [batch, length, half].

    The dynamo exporter writes caches of batch 1 whatever the batch is. The standard has no such broadcast,
    and ONNX Runtime refuses to run it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        expanded: dict[tuple[ir.Value, int | ir.SymbolicDim], ir.Value] = {}
        modified = False
        for node in tuple(model.graph):
            positions = node.inputs[3] if len(node.inputs) > 3 else None
            x = shape_of(node.inputs[0]) if is_op(node, "RotaryEmbedding") else None
            if x is None or positions is not None:
                continue
            for index in (1, 2):
                cache = node.inputs[index]
                shape = shape_of(cache)
                if cache is None or shape is None or shape[0] != 1 or x[0] == 1:
                    continue
                if (cache, x[0]) not in expanded:
                    expanded[cache, x[0]] = _expand(model.graph, node, cache)
                node.replace_input_with(index, expanded[cache, x[0]])
                modified = True
        return ir.passes.PassResult(model, modified)


def _expand(graph: ir.Graph, node: ir.Node, cache: ir.Value) -> ir.Value:
    """`cache` repeated for the batch of the first input of `node`."""
    batch = make_node("Shape", [node.inputs[0]], {"start": 0, "end": 1})
    ones = add_initializer(graph, np.array([1, 1], np.int64), "rotary.ones")
    target = make_node("Concat", [batch.outputs[0], ones], {"axis": 0})
    expand = make_node("Expand", [cache, target.outputs[0]])
    graph.insert_before(node, [batch, target, expand])
    return expand.outputs[0]
