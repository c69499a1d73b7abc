"""Gives the low-bit operators their meaning in standard ONNX: as model-local functions, or written out in
place."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.formats.nvfp4 import NVFP4
from qgraph.passes.base import GraphPass, make_node, replace_node

DOMAIN = "ai.qgraph"
VERSION = 1
MIN_OPSET = 23  # FLOAT4E2M1 in DequantizeLinear

# Weight format -> operator that multiplies by a weight of it, and operator that looks up rows of one.
OPERATORS = {"nvfp4": "QLinearNVFP4"}
LOOKUPS = {"nvfp4": "QGatherNVFP4"}

_NVFP4_DOC = (
    "y = x @ W with an NVFP4 weight W [K, N]. W[k, n] = e2m1(codes[k, n]) * s[floor(k / 16), n], "
    "s = f32(block_scale) * global_scale. codes: FLOAT4E2M1 [K, N]; block_scale: FLOAT8E4M3FN [ceil(K / "
    "16), N]; "
    "global_scale: FLOAT []."
)
_NVFP4_LOOKUP_DOC = (
    "y = rows `ids` of an NVFP4 table T [V, H]. T[v, h] = e2m1(codes[v, h]) * s[v, floor(h / 16)], "
    "s = f32(block_scale) * global_scale. codes: FLOAT4E2M1 [V, H]; block_scale: FLOAT8E4M3FN [V, ceil(H / "
    "16)]; global_scale: FLOAT []. ids are those of Gather."
)


class AddLowbitFunctions(GraphPass):
    """Adds the definition of every low-bit operator in use, the import of its domain, and the IR version it
    needs.

    The bodies are standard ONNX, so that the file needs no qgraph to be checked, run or viewed. QLinearNVFP4
    is `MatMul(x, DequantizeLinear(codes, DequantizeLinear(block_scale, global_scale)){axis=0,
    block_size=16})`, QGatherNVFP4 `Gather(DequantizeLinear(codes, ..){axis=1, block_size=16}, ids)`.
    """

    def requires(self, model: ir.Model) -> None:
        """Opset 23 or later."""
        _require_opset(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = _raise_ir_version(model)
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

    The MatMul or Gather keeps the node's name, output and metadata; the two DequantizeLinear before it are
    named `<name>/scale` and `<name>/weight`.
    """

    def requires(self, model: ir.Model) -> None:
        """Opset 23 or later."""
        _require_opset(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = lowbit_nodes(model)
        for node in nodes:
            x, codes, block_scale, global_scale = node.inputs
            body = _BODIES[node.op_type](x, codes, block_scale, global_scale)
            scale, weight, result = body
            for part, like, label in ((scale, block_scale, "scale"), (weight, codes, "weight")):
                part.name = part.outputs[0].name = f"{node.name}/{label}"
                part.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
                part.outputs[0].shape = like.shape if like is not None else None
            result.name, result.doc_string = node.name, node.doc_string
            replace_node(node, body)
            for part in (scale, weight):  # these describe the layer, and one node is the layer
                part.metadata_props.clear()
        for key in [key for key in model.functions if key[0] == DOMAIN]:
            del model.functions[key]
        model.graph.opset_imports.pop(DOMAIN, None)
        modified = _raise_ir_version(model) or bool(nodes)
        return ir.passes.PassResult(model, modified)


def lowbit_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes of low-bit operators, in graph order."""
    return [node for node in model.graph.all_nodes() if node.domain == DOMAIN]


def _nvfp4_weight(
    codes: ir.Value | None, block_scale: ir.Value | None, global_scale: ir.Value | None, axis: int
) -> list[ir.Node]:
    """The weight in float32, its blocks along `axis`."""
    scale = make_node("DequantizeLinear", [block_scale, global_scale])
    return [
        scale,
        make_node("DequantizeLinear", [codes, scale.outputs[0]], {"axis": axis, "block_size": NVFP4.block}),
    ]


def _nvfp4_body(
    x: ir.Value | None, codes: ir.Value | None, block_scale: ir.Value | None, global_scale: ir.Value | None
) -> list[ir.Node]:
    weight = _nvfp4_weight(codes, block_scale, global_scale, axis=0)
    return [*weight, make_node("MatMul", [x, weight[-1].outputs[0]])]


def _nvfp4_lookup_body(
    ids: ir.Value | None, codes: ir.Value | None, block_scale: ir.Value | None, global_scale: ir.Value | None
) -> list[ir.Node]:
    weight = _nvfp4_weight(codes, block_scale, global_scale, axis=1)
    return [*weight, make_node("Gather", [weight[-1].outputs[0], ids])]


_BODIES = {"QLinearNVFP4": _nvfp4_body, "QGatherNVFP4": _nvfp4_lookup_body}
_DOCS = {"QLinearNVFP4": _NVFP4_DOC, "QGatherNVFP4": _NVFP4_LOOKUP_DOC}
_FORMALS = {
    "QLinearNVFP4": ("x", "codes", "block_scale", "global_scale"),
    "QGatherNVFP4": ("ids", "codes", "block_scale", "global_scale"),
}


def _function(op_type: str, opset: int) -> ir.Function:
    """The definition at the model's own opset: a function that imports another one is refused by the
    checker."""
    formals = [ir.Value(name=name) for name in _FORMALS[op_type]]
    nodes = _BODIES[op_type](*formals)
    for node, name in zip(nodes, ("scale", "weight", "y"), strict=True):
        node.name = node.outputs[0].name = name
    graph = ir.Graph(
        formals,
        nodes[-1].outputs,
        nodes=nodes,
        opset_imports={"": opset},
        name=op_type,
        doc_string=_DOCS[op_type],
    )
    return ir.Function(DOMAIN, op_type, graph=graph, attributes=[])


def _require_opset(model: ir.Model) -> None:
    opset = model.graph.opset_imports.get("", 0)
    if opset < MIN_OPSET:
        raise ir.passes.PreconditionError(f"the model is at opset {opset}, low-bit tensors need {MIN_OPSET}")


def _raise_ir_version(model: ir.Model) -> bool:
    """Sets the lowest IR version that has the model's opset, 11 for opset 23: runtimes refuse what they do
    not know."""
    from onnx.helper import find_min_ir_version_for, make_opsetid

    needed = find_min_ir_version_for([make_opsetid("", model.graph.opset_imports[""])])
    if model.ir_version == needed:
        return False
    model.ir_version = needed
    return True
