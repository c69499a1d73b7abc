"""Prepared (low-bit) graph -> steps over buffers: the operators that qgraph can compile, one module a
family."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.codegen.lowering import attention, embedding, linear, movement, normalize, pointwise  # noqa: F401
from qgraph.codegen.lowering.context import HANDLERS, Lowering, Step, check_attributes, data_inputs
from qgraph.codegen.memory import Buffer, View
from qgraph.errors import UnsupportedError

MAX_RANK = 8  # of inputs and outputs (runtime/FORMAT.md)

__all__ = ["Lowering", "Step", "lower", "supported_ops"]


def supported_ops() -> list[str]:
    """Every operator with a lowering, as `domain::Op` or `Op`."""
    return sorted(f"{domain}::{op}" if domain else op for domain, op in HANDLERS)


def _needed(graph: ir.Graph) -> list[ir.Node]:
    """Nodes whose data an output of the graph depends on, in order. Shape arithmetic drops out here."""
    wanted = set(graph.outputs)
    needed = []
    for node in reversed(graph):
        if wanted.intersection(node.outputs):
            needed.append(node)
            wanted.update(data_inputs(node) if (node.domain, node.op_type) in HANDLERS else ())
    return needed[::-1]


def _reject_unknown(nodes: list[ir.Node]) -> None:
    unknown: dict[str, list[str]] = {}
    for node in nodes:
        if (node.domain, node.op_type) not in HANDLERS:
            op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            unknown.setdefault(op, []).append(node.name or "(unnamed)")
    if unknown:
        listed = "; ".join(
            f"{op} ('{names[0]}'{f' and {len(names) - 1} more' if len(names) > 1 else ''})"
            for op, names in unknown.items()
        )
        raise UnsupportedError(
            f"no kernels for operator {listed}. `qgraph doctor --ops` lists what can be compiled"
        )


def lower(graph: ir.Graph) -> Lowering:
    """Lower a prepared graph.

    Raises UnsupportedError naming node and operator for what has no kernel.
    """
    nodes = _needed(graph)
    _reject_unknown(nodes)
    low = Lowering(graph)
    for value in (*graph.inputs, *graph.outputs):
        if len(low.shape(value)) > MAX_RANK:
            raise UnsupportedError(
                f"'{value.name}' has {len(low.shape(value))} dimensions; up to {MAX_RANK} work"
            )
    for node in nodes:
        check_attributes(node, graph.opset_imports.get("", 0))
        low.uses.update(data_inputs(node))
    low.uses.update(graph.outputs)
    for value in graph.inputs:
        buffer = Buffer("input", low.dtype(value), low.shape(value), name=value.name or "")
        low.inputs.append(buffer)
        low.values[value] = View.of(buffer)
    for value in dict.fromkeys(graph.outputs):
        low.outputs[value] = Buffer("output", low.dtype(value), low.shape(value), name=value.name or "")
    for value in graph.inputs:
        if value in low.outputs:
            low.deliver(value)
    for node in nodes:
        HANDLERS[node.domain, node.op_type](low, node)
    for value in low.outputs:
        low.deliver(value)
    return low
