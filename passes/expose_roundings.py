"""Shows what goes into the roundings of activations and what comes out, for a check of each by itself."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qgraph.passes.lowbit_functions import DOMAIN, ROUNDINGS


@dataclass(frozen=True)
class ExposedRounding:
    """A `DynamicQDQ` node: names of its input and output, its format, and its global scale where it has
    one."""

    input: str
    output: str
    format: str
    global_scale: float | None


def expose_roundings(model: ir.Model) -> list[ExposedRounding]:
    """Makes the input and the output of every rounding an output of the graph. Returns the roundings.

    Not for a model that is kept: its outputs are no longer the original's.
    """
    formats = {op_type: name for name, op_type in ROUNDINGS.items()}
    graph, found = model.graph, []
    for node in graph:
        if node.domain != DOMAIN or node.op_type not in formats:
            continue
        x, y = node.inputs[0], node.outputs[0]
        assert x is not None
        scale = node.inputs[1] if len(node.inputs) > 1 else None
        number = None if scale is None or scale.const_value is None else float(scale.const_value.numpy())
        found.append(ExposedRounding(str(x.name), str(y.name), formats[node.op_type], number))
        for value in (x, y):
            if value not in graph.outputs and value not in graph.inputs:
                graph.outputs.append(value)
    return found
