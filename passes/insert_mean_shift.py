"""Makes places where the mean of a quantized model can be set right: an Add of zeros behind norms."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from qgraph.errors import UsageError
from qgraph.passes.base import GraphPass, add_behind, add_initializer, is_op
from qgraph.passes.channel_sources import chosen_matmuls
from qgraph.passes.mean_shift import MARK, is_linear, marked, width
from qgraph.passes.select_layers import DECISIONS

PLACES = ("all", "attention")


class InsertMeanShift(GraphPass):
    """norm(x) becomes norm(x) + 0 for every reader: the same function, and a site (mean_shift.py).

    Rules: the norm is a LayerNormalization or RMSNormalization over the last axis of known size, in float32,
    with a chosen layer above it: else the quantized model has the float one's mean there. A linear layer,
    chosen or not, reads it, unless it is a LayerNormalization, whose bias takes a shift whoever reads it.
    With `attention` only the norms behind an attention, as in the paper: the first such norm, in graph order,
    that the product of two activations, or an Attention, reaches.

    The sum takes the name of what it replaces, the norm's own output is `<name>/unshifted`; the zeros are
    `<norm>.mean_shift`.

    Raises UsageError for a place that is none of `PLACES`.
    """

    def __init__(self, where: str = "all") -> None:
        super().__init__()
        if where not in PLACES:
            raise UsageError(f"mean shift: '{where}' is none of {', '.join(PLACES)}")
        self.where = where

    def requires(self, model: ir.Model) -> None:
        """`SelectLayers` has run."""
        if DECISIONS not in model.meta:
            raise ir.passes.PreconditionError("InsertMeanShift runs after SelectLayers")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        done = {add.inputs[0].producer() for add in marked(graph) if add.inputs[0] is not None}
        names = {node.name for node in graph}
        norms = [norm for norm in self._norms(model, done) if norm not in done]
        for norm in norms:
            _insert(graph, norm, names)
        return ir.passes.PassResult(model, bool(norms))

    def _norms(self, model: ir.Model, done: Collection[ir.Node | None]) -> list[ir.Node]:
        """Those that get a site, or have got one, in graph order."""
        chosen = set(chosen_matmuls(model))
        below: set[ir.Value] = set()  # values below a chosen layer
        mixed: dict[ir.Value, frozenset[ir.Node]] = {}  # attentions that reach a value, no site between
        claimed: set[ir.Node] = set()  # those whose first site is found
        found = []
        for node in model.graph:
            values = [value for value in node.inputs if value is not None]
            attentions = frozenset().union(*(mixed.get(value, ()) for value in values)) - claimed
            is_below = any(value in below for value in values)
            if is_below and (node in done or _fits(node)):
                if self.where == "all" or attentions:
                    found.append(node)
                claimed |= attentions
                attentions = frozenset()
            if _mixes_tokens(node):
                attentions |= {node}
            if is_below or node in chosen:
                below.update(node.outputs)
            mixed.update(dict.fromkeys(node.outputs, attentions))
        return found


def _fits(node: ir.Node) -> bool:
    """Whether it is a norm that takes a shift, and somewhere to fold it is in sight."""
    if not width(node):
        return False
    readers = node.outputs[0].uses()
    return is_op(node, "LayerNormalization") or any(is_linear(n) and i == 0 for n, i in readers)


def _mixes_tokens(node: ir.Node) -> bool:
    """Whether it multiplies activations by activations: a part of an attention."""
    operands = [value for value in node.inputs[:2] if value is not None]
    return is_op(node, "Attention") or (
        is_op(node, "MatMul") and not any(v.is_initializer() for v in operands)
    )


def _insert(graph: ir.Graph, norm: ir.Node, names: set[str | None]) -> None:
    shift = add_initializer(graph, np.zeros(width(norm), np.float32), f"{norm.name}.mean_shift")
    name, count = str(shift.name), 2
    while name in names:
        name, count = f"{shift.name}_{count}", count + 1
    names.add(name)
    add_behind(norm.outputs[0], shift, name, "unshifted").metadata_props[MARK] = ""
