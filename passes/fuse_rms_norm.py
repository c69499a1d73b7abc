"""Decomposed RMS normalisation becomes RMSNormalization."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.passes.base import GraphPass, make_node, remove_dead, replace_node, shape_of
from qgraph.passes.fuse_layer_norm import match_layer_norm
from qgraph.passes.norm_pattern import Normalized, absorb, affine, match_normalized, refusal


class FuseRMSNorm(GraphPass):
    """x / sqrt(mean(x^2) + epsilon) [* scale]  ->  RMSNormalization, in every spelling that `norm_pattern`
    knows.

    Runs after `FuseLayerNorm`. A norm without scale gets one of ones.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in tuple(model.graph):
            match = match_rms_norm(node) if node.graph is not None else None
            if match is None:
                continue
            if reason := refusal(match):
                self.refuse(node, reason)
                continue
            self._fuse(model.graph, match)
            modified = True
        return ir.passes.PassResult(model, modified)

    def _fuse(self, graph: ir.Graph, match: Normalized) -> None:
        dims = tuple(shape_of(match.d) or ())[match.axis :]
        last, scale = match.node, None
        if scaled := absorb(last, "Mul", dims):
            last, scale = scaled
        inputs = [match.d, affine(graph, scale, dims, f"{last.name}.scale")]
        attributes = {"axis": match.axis, "epsilon": match.epsilon}
        replaced = list(last.inputs)
        replace_node(last, [make_node("RMSNormalization", inputs, attributes, name=last.name)])
        remove_dead(replaced)


def match_rms_norm(node: ir.Node) -> Normalized | None:
    """The match whose last node is `node`, unless it is a layer normalisation."""
    return None if match_layer_norm(node) is not None else match_normalized(node)
