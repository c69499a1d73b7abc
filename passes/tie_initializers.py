"""Equal initializers are kept once."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx_ir as ir

from qgraph.passes.base import GraphPass, printable


class TieInitializers(GraphPass):
    """Lets readers of equal initializers read one: the one with the shortest name, then the first by name.

    Equal are two values of one tensor object, or of the same dtype, shape and bytes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        modified = False
        for first, *others in equal_initializers(graph):
            for value in others:
                if value.is_graph_output() or value.name is None:
                    continue
                value.replace_all_uses_with(first)
                del graph.initializers[value.name]
                modified = True
                if value.const_value is not None and value.const_value.nbytes > 4096:
                    self.refuse(
                        f"initializer '{printable(value.name)}'",
                        f"equals '{printable(first.name)}', kept once",
                    )
        return ir.passes.PassResult(model, modified)


def equal_initializers(graph: ir.Graph) -> list[list[ir.Value]]:
    """Groups of two or more initializers that hold the same tensor, best name first.

    Bytes are compared by SHA-256, and only among tensors of one dtype, shape and first kilobyte: most
    weights are never read to their end.
    """
    groups: dict[tuple, list[ir.Value]] = {}
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and not value.is_graph_input() and not tensor.dtype.is_string():
            groups.setdefault((tensor.dtype, tuple(tensor.shape)), []).append(value)
    for digest in (_first_bytes, _all_bytes):
        finer: dict[tuple, list[ir.Value]] = {}
        for key, group in groups.items():
            if len(group) > 1:
                for value in group:
                    finer.setdefault((*key, digest(value)), []).append(value)
        groups = finer
    return [sorted(g, key=lambda v: (len(v.name or ""), v.name or "")) for g in groups.values() if len(g) > 1]


def _first_bytes(value: ir.Value) -> bytes:
    return _array(value).reshape(-1)[:256].tobytes()


def _all_bytes(value: ir.Value) -> bytes:
    # As bytes: elements of low-bit types have no buffer.
    return hashlib.sha256(np.ascontiguousarray(_array(value)).reshape(-1).view(np.uint8).data).digest()


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()
