"""Inlines model-local functions."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from qgraph.errors import InputError
from qgraph.passes.base import GraphPass, printable

KEPT_DOMAIN = "ai.qgraph"


class InlineFunctions(GraphPass):
    """Replaces every call of a model-local function by its body, and drops the functions.

    Functions of domain `ai.qgraph` are quantized layers: they stay, so that a low-bit file can be prepared
    again. `structure.check_structure` has bounded the expansion before.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if not model.functions:
            return ir.passes.PassResult(model, False)
        try:
            modified = common.InlinePass(lambda function: function.domain != KEPT_DOMAIN)(model).modified
        except (ir.passes.PreconditionError, ValueError) as error:
            raise InputError(f"a model-local function cannot be inlined: {printable(error)}") from error
        called = {node.op_identifier() for node in model.graph.all_nodes()}
        for key in [key for key in model.functions if key[0] != KEPT_DOMAIN or key not in called]:
            del model.functions[key]
            modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        if left := [key for key in model.functions if key[0] != KEPT_DOMAIN]:
            raise ir.passes.PostconditionError(f"function {left[0]} was not inlined")
