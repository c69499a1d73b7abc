"""Constant nodes become initializers; initializers stop being inputs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.errors import UnsupportedError
from qgraph.passes.base import GraphPass, add_initializer, describe, is_op, make_node, printable

_ATTRIBUTE_TYPES = {
    "value_int": np.int64,
    "value_ints": np.int64,
    "value_float": np.float32,
    "value_floats": np.float32,
}


class LiftConstants(GraphPass):
    """Makes every constant an initializer of the main graph.

    Rules:
    1. `Constant` (any numeric attribute) -> initializer. A Constant that is itself a graph output is kept
       alive by an Identity, since ONNX gives an output its own name.
    2. An initializer also listed as an input (IR < 4) is a default that callers could override; it becomes a
       constant and leaves the inputs.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        modified = False
        for value in [v for v in graph.inputs if v.is_initializer()]:
            graph.inputs.remove(value)
            self.refuse(f"input '{printable(value.name)}'", "has a default value; it is now a constant")
            modified = True
        for node in tuple(graph):
            if is_op(node, "Constant"):
                self._lift(graph, node)
                modified = True
        return ir.passes.PassResult(model, modified)

    def _lift(self, graph: ir.Graph, node: ir.Node) -> None:
        output = node.outputs[0]
        tensor = self._tensor(node)
        if output.is_graph_output():
            held = add_initializer(graph, tensor, f"{output.name}.constant")
            identity = make_node("Identity", [held], name=node.name)
            ir.convenience.replace_nodes_and_values(
                graph, node, [node], [identity], [output], identity.outputs
            )
            return
        name = output.name
        output.name = None
        held = add_initializer(graph, tensor, name or "constant")
        held.metadata_props.update(output.metadata_props)
        output.replace_all_uses_with(held)
        graph.remove(node, safe=True)

    @staticmethod
    def _tensor(node: ir.Node) -> ir.TensorProtocol:
        name, given = next(iter(node.attributes.items()), (None, None))
        if name == "value" and given is not None and given.type == ir.AttributeType.TENSOR:
            return given.as_tensor()
        if name in _ATTRIBUTE_TYPES and given is not None:
            return ir.tensor(np.array(given.value, _ATTRIBUTE_TYPES[name]))
        raise UnsupportedError(f"{describe(node)}: a constant of strings or a sparse one is not supported")

    def ensures(self, model: ir.Model) -> None:
        if any(is_op(node, "Constant") for node in model.graph):
            raise ir.passes.PostconditionError("a Constant node is left")
