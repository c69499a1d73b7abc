"""Equal initializers are kept once."""

from __future__ import annotations

import hashlib

import onnx_ir as ir

from qgraph.passes.base import GraphPass, printable


class TieInitializers(GraphPass):
    """Lets readers of equal initializers read one: the one with the shortest name, then the first by name.

    Equal are two values of one tensor object, or of the same dtype, shape and bytes. Bytes are only compared (by
    SHA-256) among tensors of one dtype and shape, so most weights are never read here.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        groups: dict[tuple, list[ir.Value]] = {}
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and not value.is_graph_input() and not tensor.dtype.is_string():
                groups.setdefault((tensor.dtype, tuple(tensor.shape)), []).append(value)
        modified = False
        for group in groups.values():
            if len(group) > 1:
                modified |= self._tie(graph, group)
        return ir.passes.PassResult(model, modified)

    def _tie(self, graph: ir.Graph, group: list[ir.Value]) -> bool:
        modified = False
        digests: dict[int, bytes] = {}
        kept: dict[bytes, ir.Value] = {}
        for value in sorted(group, key=lambda v: (len(v.name or ""), v.name)):
            tensor = value.const_value
            assert tensor is not None and value.name is not None
            if id(tensor) not in digests:
                digests[id(tensor)] = hashlib.sha256(tensor.tobytes()).digest()
            first = kept.setdefault(digests[id(tensor)], value)
            if first is value or value.is_graph_output():
                continue
            value.replace_all_uses_with(first)
            del graph.initializers[value.name]
            if tensor.size > 1:
                self.refuse(f"initializer '{printable(value.name)}'", f"equals '{printable(first.name)}', kept once")
            modified = True
        return modified
