"""Stores keys and values of a cache in 8 bits."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.errors import UsageError
from qgraph.passes.base import GraphPass, is_op
from qgraph.passes.quantize_activations import quantize_input


class QuantizeCache(GraphPass):
    """Rounds what goes into a cache to int8, with a scale for every token and head.

    Rules: `k` and `v` of every Attention with a past go through a `DynamicQDQInt8` (along head_dim) first.
    What comes back as past has gone through it already. Codegen stores the codes and scales instead of the
    values that they stand for.

    Raises UsageError for a graph without such an Attention.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in model.graph if is_op(node, "Attention") and _past(node)]
        if not found:
            raise UsageError(
                "kv_cache 'int8': the model has no cache of keys and values (inputs past_key_values.*, "
                "outputs present.*): export it with one"
            )
        for node in found:
            for index in (1, 2):
                value = node.inputs[index]
                assert value is not None
                node.replace_input_with(index, quantize_input(value, "int8", None))
        return ir.passes.PassResult(model, True)


def _past(attention: ir.Node) -> bool:
    return len(attention.inputs) > 5 and attention.inputs[4] is not None
