"""Operators of ONNX Runtime's `com.microsoft` become standard ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qgraph.passes.base import GraphPass, add_initializer, attribute, make_node, replace_node, shape_of

_MS = "com.microsoft"


class ExpandContrib(GraphPass):
    """Rewrites the contrib operators that optimizers leave in transformer files.

    SkipLayerNormalization and SkipSimplifiedLayerNormalization -> Add (, Add) + norm;
    SimplifiedLayerNormalization -> RMSNormalization; Gelu, FastGelu, BiasGelu, QuickGelu; FusedMatMul
    without transposed batches. A node with other outputs or attributes stays as it is, and shape inference
    then names it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in tuple(model.graph):
            rule = _RULES.get((node.domain, node.op_type))
            if rule is not None and rule(self, model.graph, node):
                modified = True
        return ir.passes.PassResult(model, modified)

    def skip_norm(self, graph: ir.Graph, node: ir.Node) -> bool:
        rms = "Simplified" in node.op_type
        inputs = [*node.inputs, *[None] * (5 - len(node.inputs))]
        x, skip, gamma = inputs[:3]
        beta, bias = (None, inputs[3]) if rms else inputs[3:5]
        if any(v.uses() or v.is_graph_output() for v in node.outputs[1:3]):
            self.refuse(node, "its mean or inverse deviation is used")
            return False
        total = make_node("Add", [x, skip], name=f"{node.name}/skip")
        nodes = [total]
        if bias is not None:
            total = make_node("Add", [total.outputs[0], bias], name=f"{node.name}/bias")
            nodes.append(total)
        op = "RMSNormalization" if rms else "LayerNormalization"
        epsilon = attribute(node, "epsilon", 1e-12)
        norm_inputs = [total.outputs[0], gamma] + ([beta] if beta is not None else [])
        norm = make_node(op, norm_inputs, {"axis": -1, "epsilon": epsilon}, name=node.name)
        nodes.append(norm)
        outputs = [norm.outputs[0], *(ir.Value() for _ in node.outputs[1:3]), total.outputs[0]]
        replace_node(node, nodes, outputs[: len(node.outputs)])
        return True

    def simplified_norm(self, graph: ir.Graph, node: ir.Node) -> bool:
        if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
            self.refuse(node, "its inverse deviation is used")
            return False
        attributes = {
            k: attribute(node, k, d) for k, d in (("axis", -1), ("epsilon", 1e-5), ("stash_type", 1))
        }
        norm = make_node("RMSNormalization", node.inputs[:2], attributes, name=node.name)
        replace_node(node, [norm], [norm.outputs[0], *(ir.Value() for _ in node.outputs[1:])])
        return True

    def gelu(self, graph: ir.Graph, node: ir.Node) -> bool:
        x = node.inputs[0]
        nodes = []
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            biased = make_node("Add", node.inputs[:2], name=f"{node.name}/bias")
            nodes.append(biased)
            x = biased.outputs[0]
        approximate = "tanh" if node.op_type == "FastGelu" else "none"
        nodes.append(make_node("Gelu", [x], {"approximate": approximate}, name=node.name))
        replace_node(node, nodes)
        return True

    def quick_gelu(self, graph: ir.Graph, node: ir.Node) -> bool:
        alpha = add_initializer(
            graph, np.array(attribute(node, "alpha", 1.702), np.float32), f"{node.name}.alpha"
        )
        scaled = make_node("Mul", [node.inputs[0], alpha], name=f"{node.name}/scale")
        gate = make_node("Sigmoid", [scaled.outputs[0]], name=f"{node.name}/gate")
        replace_node(
            node, [scaled, gate, make_node("Mul", [node.inputs[0], gate.outputs[0]], name=node.name)]
        )
        return True

    def fused_matmul(self, graph: ir.Graph, node: ir.Node) -> bool:
        if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
            self.refuse(node, "it transposes batch axes")
            return False
        nodes, operands = [], list(node.inputs[:2])
        for index, flag in enumerate(("transA", "transB")):
            if not attribute(node, flag, 0):
                continue
            shape = shape_of(operands[index])
            if shape is None:
                self.refuse(node, f"{flag} needs the rank of its operand")
                return False
            perm = [*range(len(shape))]
            perm[-2:] = perm[:-3:-1]
            nodes.append(make_node("Transpose", [operands[index]], {"perm": perm}))
            operands[index] = nodes[-1].outputs[0]
        nodes.append(make_node("MatMul", operands, name=node.name))
        alpha = attribute(node, "alpha", 1.0)
        if alpha != 1.0:
            factor = add_initializer(graph, np.array(alpha, np.float32), f"{node.name}.alpha")
            nodes.append(make_node("Mul", [nodes[-1].outputs[0], factor], name=f"{node.name}/alpha"))
        replace_node(node, nodes)
        return True


_RULES: dict[tuple[str, str], Callable[[ExpandContrib, ir.Graph, ir.Node], bool]] = {
    (_MS, "SkipLayerNormalization"): ExpandContrib.skip_norm,
    (_MS, "SkipSimplifiedLayerNormalization"): ExpandContrib.skip_norm,
    ("", "SimplifiedLayerNormalization"): ExpandContrib.simplified_norm,
    (_MS, "SimplifiedLayerNormalization"): ExpandContrib.simplified_norm,
    (_MS, "Gelu"): ExpandContrib.gelu,
    (_MS, "BiasGelu"): ExpandContrib.gelu,
    (_MS, "FastGelu"): ExpandContrib.gelu,
    (_MS, "QuickGelu"): ExpandContrib.quick_gelu,
    (_MS, "FusedMatMul"): ExpandContrib.fused_matmul,
}
