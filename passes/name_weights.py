"""Weights that an exporter numbered get the names of their modules."""

from __future__ import annotations

import re

import onnx_ir as ir

from qgraph.passes.base import GraphPass, fresh_name, is_op

SCOPES = "pkg.torch.onnx.name_scopes"


class NameWeights(GraphPass):
    """`val_49`, the right operand of a MatMul of module `encoder.layer.0.attention.self.query`, becomes
    `encoder.layer.0.attention.self.query.weight`.

    The module is known from the dynamo exporter's metadata, or from a node name like
    `/encoder/layer.0/.../MatMul`. Names that have a dot are taken to be the model's own and stay.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            weight = node.inputs[1] if is_op(node, "MatMul") else None
            if weight is None or not weight.is_initializer() or "." in (weight.name or "."):
                continue
            module = module_path(node)
            if module:
                weight.name = fresh_name(model.graph, f"{module}.weight")
                modified = True
        return ir.passes.PassResult(model, modified)


def module_path(node: ir.Node) -> str:
    """The path of the module that `node` was exported from, or ""."""
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get(SCOPES, ""))
    if len(scopes) > 1:
        return scopes[-2]
    if node.name and node.name.startswith("/"):
        return ".".join(node.name.strip("/").split("/")[:-1])
    return ""
