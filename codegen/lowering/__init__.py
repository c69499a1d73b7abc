"""Prepared (low-bit) graph -> steps over buffers: the operators that qgraph can compile, one module a
family."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.codegen.last_positions import take_last_positions
from qgraph.codegen.lowering import (  # noqa: F401
    attention,
    dynamic_quantize,
    embedding,
    linear,
    linear_group,
    movement,
    normalize,
    pointwise,
    rotary,
)
from qgraph.codegen.lowering.context import HANDLERS, Lowering, Step, check_attributes, data_inputs
from qgraph.codegen.lowering.device import DEVICES
from qgraph.codegen.lowering.linear_group import OPERATORS
from qgraph.codegen.lowering.state import find_places, find_states
from qgraph.codegen.memory import Buffer, View
from qgraph.errors import InputError, UnsupportedError, UsageError
from qgraph.schemes import COMPUTES, PACKINGS, require_use_of_packing

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


def _check_ports(low: Lowering) -> None:
    """Inputs and outputs must be such that the runtime takes them."""
    graph = low.graph
    if not graph.outputs:
        raise InputError("the graph has no outputs: there is nothing to compile")
    for kind, values in (("input", graph.inputs), ("output", graph.outputs)):
        names = [value.name or "" for value in values]
        for value, name in zip(values, names, strict=True):
            if names.count(name) > 1:
                raise UnsupportedError(f"{kind} {name!r} is listed {names.count(name)} times")
            if not name or "\0" in name:
                raise UnsupportedError(f"{kind} {name!r}: a name must not be empty or hold a NUL character")
            rank = len(low.shape(value))
            if rank > MAX_RANK:
                raise UnsupportedError(f"{kind} {name!r} has {rank} dimensions; up to {MAX_RANK} work")


def _check_lengths(low: Lowering) -> None:
    """The length of a past is a difference, which no input can bind: who has one must have become state."""
    for value in low.graph.inputs:
        for dim in low.shape(value) if value not in low.states else ():
            if dim.is_Add and any(term.could_extract_minus_sign() for term in dim.args):
                raise UnsupportedError(
                    f"input '{value.name}' of length '{dim}' looks like a cache, but no Attention has it as "
                    "its past: the layer was not recognised, or its output is not asked for"
                )


def lower(
    graph: ir.Graph, packing: str = "fast", compute: str = "f32", device: str = "cpu", part: bool = False
) -> Lowering:
    """Lower a prepared graph.

    Args:
        packing: where a weight can be stored in more than one way, `fast` or `small`: ternary codes take 2 or
            1.625 bits.
        compute: what products of more than FEW_ROWS rows with low-bit weights round float activations to:
            `f32` (not at all), `bf16` (with NVFP4 weights, in tiles), or, by the block of a weight scale,
            `int16` or `int8`.
        device: whose kernels to plan for, a key of `DEVICES`.
        part: the graph is one of several that the packing and compute are for.

    Raises UnsupportedError naming node and operator for what has no kernel, UsageError for another packing or
    compute, and unless `part` for one that changes nothing.
    """
    if packing not in PACKINGS:
        raise UsageError(f"packing '{packing}': choose from {', '.join(PACKINGS)}")
    if compute not in COMPUTES:
        raise UsageError(f"compute '{compute}': choose from {', '.join(COMPUTES)}")
    graph, positions = take_last_positions(graph)
    nodes = _needed(graph)
    _reject_unknown(nodes)
    if not part:
        formats = {s.name for end, s in OPERATORS.items() for node in nodes if node.op_type.endswith(end)}
        require_use_of_packing(packing, formats)
    low = Lowering(graph, packing, compute, DEVICES[device], positions=positions)
    _check_ports(low)
    for node in nodes:
        check_attributes(node, graph.opset_imports.get("", 0))
        low.uses.update(data_inputs(node))
    low.uses.update(graph.outputs)
    low.cache, low.states = find_states(graph)
    _check_lengths(low)
    for value in graph.inputs:
        if value in low.states:
            continue
        buffer = Buffer("input", low.dtype(value), low.shape(value), name=value.name or "")
        low.inputs.append(buffer)
        low.values[value] = View.of(buffer)
    held = {pair.present for pair in low.cache.pairs} if low.cache else set()
    for value in dict.fromkeys(graph.outputs):
        if value in held:
            continue
        low.outputs[value] = Buffer("output", low.dtype(value), low.shape(value), name=value.name or "")
    for value in graph.inputs:
        if value in low.outputs:
            low.deliver(value)
    low.places = find_places(low)
    for node in nodes:
        HANDLERS[node.domain, node.op_type](low, node)
    for value in low.outputs:
        low.deliver(value)
    kinds = low.fewer_digits if low.device.integers or compute == "bf16" else {}
    if not part and not all(any(kind in step.spec.params for step in low.steps) for kind in kinds.items()):
        without = "those of int3, and ternary ones with packing 'small', do not"
        if compute == "bf16":
            without = "only NVFP4 does" if low.device.integers else "all that are not float do"
        raise UsageError(
            f"compute '{compute}' changes nothing here: no layer multiplies float activations by weights "
            f"that have such a kernel ({without})"
        )
    return low
