"""Activations rounded to low precision before a product."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.codegen.dims import grain_of, product
from qgraph.codegen.lowering.context import Lowering, lowers, unsupported
from qgraph.codegen.memory import View
from qgraph.codegen.spec import KernelSpec


@lowers("DynamicQDQNVFP4", "DynamicQDQInt8", domain="ai.qgraph", data=(0,))
def dynamic_qdq(low: Lowering, node: ir.Node) -> None:
    """`DynamicQDQNVFP4(x, global_scale)` and `DynamicQDQInt8(x)`: float32 in, rounded float32 out."""
    x = node.inputs[0]
    if x is None or low.dtype(x) != "f32" or not low.shape(x):
        raise unsupported(node, "supported are rows of f32")
    state = low.places.get(node.outputs[0])
    if state is not None:
        stored = state.store(low, low.view(x), node.name or node.op_type)
        assert stored is not None, "what is rounded has a scale"
        low.layers.append((node, stored))
        return
    scales: list[View] = []
    if node.op_type == "DynamicQDQNVFP4":
        value = node.inputs[1]
        a = low.constant(value)
        if value is None or a is None or a.size != 1:
            raise unsupported(node, "the global scale must be an initializer of one element")
        number = a.reshape(1).astype(np.float32)
        scales.append(View.of(low.weight(value, "", "f32", lambda: number)))
    spec = KernelSpec.make("dynamic_nvfp4" if scales else "dynamic_int8")
    *lead, n = low.shape(x)
    out = low.allocate(node.outputs[0])
    grain = grain_of(n)
    step = low.emit(node.name or node.op_type, spec, [out, low.dense(x), *scales, n], product(lead), grain)
    low.layers.append((node, step))
    low.bind(node, out)
