"""Decomposed layer normalisation becomes LayerNormalization."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.passes.base import GraphPass, is_op, make_node, remove_dead, replace_node, shape_of
from qgraph.passes.norm_pattern import (
    Normalized,
    absorb,
    affine,
    match_normalized,
    refusal,
    same_value,
    trailing_axis,
)


class FuseLayerNorm(GraphPass):
    """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon) [* scale] [+ bias]  ->  LayerNormalization.

    Every spelling that `norm_pattern` knows, over the last axes. Scale and bias join where they are read by
    nothing else and have the shape of the normalized dimensions. A norm without scale gets one of ones.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in tuple(model.graph):
            found = match_layer_norm(node) if node.graph is not None else None
            if found is None:
                continue
            match, x = found
            if reason := refusal(match):
                self.refuse(node, reason)
                continue
            self._fuse(model.graph, match, x)
            modified = True
        return ir.passes.PassResult(model, modified)

    def _fuse(self, graph: ir.Graph, match: Normalized, x: ir.Value) -> None:
        dims = tuple(shape_of(x) or ())[match.axis :]
        last, scale, bias = match.node, None, None
        if scaled := absorb(last, "Mul", dims):
            last, scale = scaled
        if biased := absorb(last, "Add", dims):
            last, bias = biased
        name = last.name
        inputs = [x, affine(graph, scale, dims, f"{name}.scale")]
        if bias is not None:
            inputs.append(affine(graph, bias, dims, f"{name}.bias"))
        norm = make_node(
            "LayerNormalization", inputs, {"axis": match.axis, "epsilon": match.epsilon}, name=name
        )
        replaced = list(last.inputs)
        replace_node(last, [norm])
        remove_dead(replaced)


def match_layer_norm(node: ir.Node) -> tuple[Normalized, ir.Value] | None:
    """The match whose last node is `node`, and x."""
    match = match_normalized(node)
    sub = match.d.producer() if match is not None else None
    if match is None or not is_op(sub, "Sub"):
        return None
    assert sub is not None
    x, mean = sub.inputs
    reduce = mean.producer() if mean is not None else None
    if x is None or not is_op(reduce, "ReduceMean"):
        return None
    assert reduce is not None
    if not same_value(reduce.inputs[0], x) or trailing_axis(reduce) != match.axis:
        return None
    return match, x
