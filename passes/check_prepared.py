"""Holds the prepared graph to its contract (docs/architecture.md, "The prepared graph")."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from qgraph.errors import InputError, UnsupportedError
from qgraph.formats.activations import SMALLEST_NORMAL
from qgraph.passes.base import GraphPass, describe, input_dims, is_op, printable, scalar
from qgraph.passes.fuse_gelu import match_gelu
from qgraph.passes.fuse_layer_norm import match_layer_norm
from qgraph.passes.inline_functions import KEPT_DOMAIN
from qgraph.passes.norm_pattern import match_normalized, refusal
from qgraph.passes.raise_opset import TARGET
from qgraph.passes.tie_initializers import equal_initializers


class CheckPrepared(GraphPass):
    """Changes nothing. Its `ensures` raises where the contract does not hold.

    Raises (as the cause of `onnx_ir.passes.PostconditionError`):
        InputError: the graph is not in the prepared form.
        UnsupportedError: it is, but its linear layers are not float32, or the scale of an activation is no
            positive constant.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(model, False)

    def ensures(self, model: ir.Model) -> None:
        for problem in violations(model):
            raise problem


def violations(model: ir.Model) -> Iterator[InputError | UnsupportedError]:
    """Every way in which `model` misses the contract, as the error to raise."""
    graph = model.graph
    if not graph.outputs:
        yield InputError("the graph has no outputs: there is nothing to compile")
    yield from _imports(model)
    names = set(input_dims(graph))
    for value in (*graph.inputs, *graph.initializers.values()):
        yield from _typed(value, names)
    seen: set[str] = set()
    for node in graph:
        yield from _node(node)
        for value in node.outputs:
            yield from _typed(value, names)
            if value.name in seen:
                yield InputError(f"two values are named {describe(value)}")
            seen.add(value.name or "")
        if not any(v.uses() or v.is_graph_output() for v in node.outputs):
            yield InputError(f"{describe(node)} is dead")
    for value in graph.initializers.values():
        if not value.uses() and not value.is_graph_output():
            yield InputError(f"initializer {describe(value)} is dead")
        if value.is_graph_input():
            yield InputError(f"initializer {describe(value)} is an input too")
    for first, *others in equal_initializers(graph):
        if others := [v for v in others if not v.is_graph_output()]:
            yield InputError(
                f"initializers {describe(first)} and {describe(others[0])} are equal but stored twice"
            )


def _imports(model: ir.Model) -> Iterator[InputError]:
    if model.opset_imports.get("", 0) < TARGET:
        yield InputError(f"opset {model.opset_imports.get('')} is below {TARGET}")
    for domain in model.opset_imports:
        if domain not in ("", KEPT_DOMAIN):
            yield InputError(f"domain '{printable(domain)}' is imported")
    for key in model.functions:
        if key[0] != KEPT_DOMAIN:
            yield InputError(f"function '{printable(key[1])}' is left")


def _typed(value: ir.Value, names: set[str]) -> Iterator[InputError]:
    if value.dtype is None or value.shape is None:
        yield InputError(f"{describe(value)} has no shape or type")
        return
    for dim in value.shape:
        if isinstance(dim, ir.SymbolicDim) and (dim.value is None or not dim.free_symbols() <= names):
            yield InputError(f"{describe(value)} has the dimension '{dim}', which the inputs do not tell")


def _node(node: ir.Node) -> Iterator[InputError | UnsupportedError]:
    source = node.inputs[0] if node.inputs else None
    if is_op(node, "Constant", "Gemm", "Dropout"):
        yield InputError(f"{describe(node)} is left")
    if is_op(node, "Identity"):
        free = source is not None and not source.is_graph_input() and not source.is_initializer()
        if not node.outputs[0].is_graph_output() or (
            free and source is not None and not source.is_graph_output()
        ):
            yield InputError(f"{describe(node)} is left")
    if is_op(node, "Transpose") and source is not None and source.is_initializer():
        yield from (
            InputError(f"{describe(node)} turns a weight")
            for reader in node.outputs[0].consumers()
            if is_op(reader, "MatMul")
        )
    if is_op(node, "MatMul") and node.inputs[1] is not None and node.inputs[1].is_initializer():
        weight = node.inputs[1]
        if weight.shape is not None and len(weight.shape) == 2 and weight.dtype != ir.DataType.FLOAT:
            yield UnsupportedError(
                f"{describe(node)}: its weight {describe(weight)} is {weight.dtype}; export the model in "
                "float32"
            )
    if node.domain == KEPT_DOMAIN and node.op_type == "DynamicQDQNVFP4":
        scale = scalar(node.inputs[1])
        if scale is None or not SMALLEST_NORMAL <= scale < math.inf:
            held = "not constant" if scale is None else f"{scale:g}"
            yield UnsupportedError(
                f"{describe(node)}: its global scale is {held}; kernels take a positive normal float32"
            )
    if is_op(node, "Add", "Mul") and len(node.inputs) == 2:
        left, right = node.inputs
        if left is not None and right is not None and left.is_initializer() and not right.is_initializer():
            yield InputError(f"{describe(node)} has its constant first")
    found = match_layer_norm(node)
    match = found[0] if found is not None else match_normalized(node)
    if match is not None and refusal(match) is None:
        yield InputError(f"{describe(node)} ends a decomposed norm")
    if match_gelu(node) is not None:
        yield InputError(f"{describe(node)} is part of a decomposed GELU")
