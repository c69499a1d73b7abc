"""Dead code goes."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.passes.base import GraphPass, all_graphs


class RemoveUnused(GraphPass):
    """Removes what no graph output depends on.

    Rules: 1. nodes none of whose outputs is read; 2. initializers that nobody reads; 3. optional trailing
    outputs that nobody reads (the mean of LayerNormalization); 4. empty trailing inputs; 5. imports of opsets
    without nodes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for graph in reversed(all_graphs(model)):
            for node in reversed(tuple(graph)):
                if not any(v.uses() or v.is_graph_output() for v in node.outputs):
                    graph.remove(node, safe=True)
                    modified = True
                else:
                    modified |= self._trim(node)
        for graph in model.graphs():
            for name, value in list(graph.initializers.items()):
                if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
                    del graph.initializers[name]
                    modified = True
        domains = {
            "",
            *(key[0] for key in model.functions),
            *(n.domain for g in all_graphs(model) for n in g),
        }
        for domain in [domain for domain in model.opset_imports if domain not in domains]:
            del model.opset_imports[domain]
            modified = True
        return ir.passes.PassResult(model, modified)

    @staticmethod
    def _trim(node: ir.Node) -> bool:
        modified = False
        keep = len(node.inputs)
        while keep and node.inputs[keep - 1] is None:
            keep -= 1
        if keep < len(node.inputs):
            node.resize_inputs(keep)
            modified = True
        keep, least = len(node.outputs), _required_outputs(node)
        while keep > least and not (
            node.outputs[keep - 1].uses() or node.outputs[keep - 1].is_graph_output()
        ):
            keep -= 1
        if keep < len(node.outputs):
            node.resize_outputs(keep)
            modified = True
        return modified


def _required_outputs(node: ir.Node) -> int:
    """How many outputs the operator must have; all of them where outputs are variadic or the operator
    unknown."""
    import onnx

    if node.domain != "" or not onnx.defs.has(node.op_type):
        return len(node.outputs)
    formal = onnx.defs.get_schema(node.op_type).outputs
    option = onnx.defs.OpSchema.FormalParameterOption
    if any(f.option == option.Variadic for f in formal):
        return len(node.outputs)
    return sum(f.option == option.Single for f in formal)
