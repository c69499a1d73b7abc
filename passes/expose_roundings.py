"""Shows what goes into the roundings of activations and what comes out, for a check of each by itself."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.formats.activations import Rounding
from qgraph.passes.cache import find_cache
from qgraph.passes.lowbit_functions import ROUNDINGS, rounding_nodes


def expose_roundings(model: ir.Model) -> list[Rounding]:
    """Makes the input and the output of every rounding an output of the graph. Returns the roundings.

    What goes into a cache in int8 exists only as codes and scales in the artifact: shown is what the same
    node gives besides. Not for a model that is kept: its outputs are no longer the original's.
    """
    formats = {op_type: name for name, op_type in ROUNDINGS.items()}
    graph, found = model.graph, []
    cache = find_cache(graph)
    cached = {value for pair in cache.pairs for value in pair.node.inputs[1:3]} if cache else set()
    for node in rounding_nodes(model):
        x, y = node.inputs[0], node.outputs[0]
        assert x is not None
        scale = node.inputs[1] if len(node.inputs) > 1 else None
        number = None if scale is None or scale.const_value is None else float(scale.const_value.numpy())
        found.append(Rounding(str(x.name), str(y.name), formats[node.op_type], number))
        if y in cached:
            y = _beside(node)
        for value in (x, y):
            if value not in graph.outputs and value not in graph.inputs:
                graph.outputs.append(value)
    return found


def _beside(node: ir.Node) -> ir.Value:
    """The output of a second such node, under the first one's name."""
    y = node.outputs[0]
    twin = ir.Value(name=y.name, shape=y.shape, type=y.type)
    y.name = f"{y.name}/stored"
    again = ir.Node(
        node.domain,
        node.op_type,
        list(node.inputs),
        node.attributes.values(),
        outputs=[twin],
        name=f"{node.name}/shown",
    )
    assert node.graph is not None
    node.graph.insert_after(node, again)
    return twin
