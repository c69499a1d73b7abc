"""Gives the low-bit operators their meaning in standard ONNX: as model-local functions, or written out in
place."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.passes.base import GraphPass, replace_node
from qgraph.passes.lowbit_bodies import DEFINITIONS
from qgraph.passes.lowbit_weights import OF_LAYERS

DOMAIN = "ai.qgraph"
VERSION = 1
MIN_OPSET = 23  # FLOAT4E2M1 in QuantizeLinear and DequantizeLinear

# Activation format -> operator that rounds to it and back.
ROUNDINGS = {"nvfp4": "DynamicQDQNVFP4", "int8": "DynamicQDQInt8"}


class AddLowbitFunctions(GraphPass):
    """Adds the definition of every low-bit operator in use, the import of its domain, and the opset and IR
    version it needs: 25 for 2-bit elements.

    The bodies (lowbit_bodies.py) are standard ONNX, so that the file needs no qgraph to be checked, run or
    viewed.
    """

    def requires(self, model: ir.Model) -> None:
        """Opset 23 or later."""
        _require_opset(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = _raise_versions(model)
        for op_type in sorted({node.op_type for node in lowbit_nodes(model)}):
            if (DOMAIN, op_type, "") not in model.functions:
                function = _function(op_type, model.graph.opset_imports[""])
                model.functions[function.identifier()] = function
                model.graph.opset_imports[DOMAIN] = VERSION
                modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """Every low-bit operator is defined."""
        undefined = {n.op_type for n in lowbit_nodes(model) if n.op_identifier() not in model.functions}
        if undefined:
            raise ir.passes.PostconditionError(f"not defined: {', '.join(sorted(undefined))}")


class InlineLowbitFunctions(GraphPass):
    """Writes the body of every low-bit operator in its place, and drops definitions and domain
    (`--onnx-style qdq`).

    The last node of the body keeps the node's name, output and metadata; those before it are named
    `<name>/<part>`, as in the function.
    """

    def requires(self, model: ir.Model) -> None:
        """Opset 23 or later."""
        _require_opset(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = lowbit_nodes(model)
        raised = _raise_versions(model)
        for node in nodes:
            body = DEFINITIONS[node.op_type].body(node.inputs)
            *parts, result = body
            for part in parts:
                part.name = part.outputs[0].name = f"{node.name}/{part.name}"
            result.name, result.doc_string = node.name, node.doc_string
            replace_node(node, body)
            for part in parts:  # these describe the layer, and one node is the layer
                part.metadata_props.clear()
        drop_definitions(model)
        model.graph.opset_imports.pop(DOMAIN, None)
        return ir.passes.PassResult(model, raised or bool(nodes))


def rounding_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes that round activations, in graph order."""
    return [node for node in lowbit_nodes(model) if node.op_type in ROUNDINGS.values()]


def drop_definitions(model: ir.Model) -> None:
    """Removes the functions of the domain."""
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]


def lowbit_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes of low-bit operators, in graph order."""
    return [node for node in model.graph.all_nodes() if node.domain == DOMAIN]


def _function(op_type: str, opset: int) -> ir.Function:
    """The definition at the model's own opset: a function that imports another one is refused by the
    checker."""
    operator = DEFINITIONS[op_type]
    formals = [ir.Value(name=name) for name in operator.formals]
    nodes = operator.body(formals)
    graph = ir.Graph(
        formals,
        nodes[-1].outputs,
        nodes=nodes,
        opset_imports={"": opset},
        name=op_type,
        doc_string=operator.doc,
    )
    return ir.Function(DOMAIN, op_type, graph=graph, attributes=[])


def _require_opset(model: ir.Model) -> None:
    opset = model.graph.opset_imports.get("", 0)
    if opset < MIN_OPSET:
        raise ir.passes.PreconditionError(f"the model is at opset {opset}, low-bit tensors need {MIN_OPSET}")


def _raise_versions(model: ir.Model) -> bool:
    """Raises the opset to what the low-bit weights need (what a prepared graph has means the same in all
    later ones), and sets the lowest IR version that has the opset, 11 for 23 and 13 for 25: runtimes refuse
    what they do not know."""
    from onnx.helper import find_min_ir_version_for, make_opsetid

    opset = model.graph.opset_imports[""]
    needs = [OF_LAYERS[node.op_type].opset for node in lowbit_nodes(model) if node.op_type in OF_LAYERS]
    needed = max([opset, *needs])
    model.graph.opset_imports[""] = needed
    for function in model.functions.values():
        function.opset_imports[""] = needed
    ir_version = find_min_ir_version_for([make_opsetid("", needed)])
    modified = needed != opset or model.ir_version != ir_version
    model.ir_version = ir_version
    return modified
