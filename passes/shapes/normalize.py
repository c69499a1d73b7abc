"""Normalisations with statistics as further outputs."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.passes.shapes.node import NodeView, rule


@rule("LayerNormalization")
def layer_norm(n: NodeView) -> None:
    x = n.shape(0)
    axis = n.axis(n.attr("axis", -1), len(x))
    _check_affine(n, x[axis:])
    n.out(0, n.dtype(0), x)
    stash = ir.DataType(n.attr("stash_type", 1))
    for index in (1, 2):
        n.out(index, stash, [*x[:axis], *[1] * (len(x) - axis)])


@rule("RMSNormalization")
def rms_norm(n: NodeView) -> None:
    x = n.shape(0)
    _check_affine(n, x[n.axis(n.attr("axis", -1), len(x)) :])
    n.out(0, n.dtype(1), x)


def _check_affine(n: NodeView, normalized) -> None:
    for index in (1, 2):
        if n.has(index) and n.broadcast(normalized, n.shape(index)) != tuple(normalized):
            n.fail(f"scale or bias {list(n.shape(index))} does not broadcast to {list(normalized)}")


@rule("BatchNormalization")
def batch_norm(n: NodeView) -> None:
    if n.attr("training_mode", 0):
        n.refuse("batch normalization in training mode is not supported")
    n.out(0, n.dtype(0), n.shape(0))
