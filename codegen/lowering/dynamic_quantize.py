"""Activations rounded to low precision before a product."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.codegen.dims import grain_of, product
from qgraph.codegen.lowering.context import Lowering, Rounded, lowers, unsupported
from qgraph.codegen.memory import View
from qgraph.codegen.spec import KernelSpec


@lowers("DynamicQDQNVFP4", "DynamicQDQInt8", domain="ai.qgraph", data=(0,))
def dynamic_qdq(low: Lowering, node: ir.Node) -> None:
    """`DynamicQDQNVFP4(x, global_scale)` and `DynamicQDQInt8(x)`: float32 in, rounded float32 out. The latter
    is computed for readers in float32 only; linear layers take codes where they can."""
    x = node.inputs[0]
    if x is None or low.dtype(x) != "f32" or not low.shape(x):
        raise unsupported(node, "supported are rows of f32")
    state = low.places.get(node.outputs[0])
    if state is not None:
        stored = state.store(low, low.view(x), node.name or node.op_type)
        assert stored is not None, "what is rounded has a scale"
        low.layers.append((node, stored))
        return
    if node.op_type == "DynamicQDQInt8":
        low.bind(node, Rounded(node, low.dense(x)))
        return
    value = node.inputs[1]
    a = low.constant(value)
    if value is None or a is None or a.size != 1:
        raise unsupported(node, "the global scale must be an initializer of one element")
    number = a.reshape(1).astype(np.float32)
    scale = View.of(low.weight(value, "", "f32", lambda: number))
    *lead, n = low.shape(x)
    out = low.allocate(node.outputs[0])
    spec = KernelSpec.make("dynamic_nvfp4")
    source = low.dense(x)
    low.rounded_to_nvfp4[node.outputs[0]] = (source, scale)
    args = [out, source, scale, n]
    step = low.emit(node.name or node.op_type, spec, args, product(lead), grain_of(n))
    low.layers.append((node, step))
    low.bind(node, out)
