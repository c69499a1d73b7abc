"""Orders the inputs of quantized layers so that those that suit each other share a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qgraph.passes.base import (
    GraphPass,
    add_initializer,
    constant,
    copy_metadata,
    describe,
    is_op,
    make_node,
    printable,
)
from qgraph.passes.channel_order import Channels, Digit, Order, Tracer
from qgraph.passes.channel_sources import operand, require_selected_once
from qgraph.passes.lowbit_weights import TABLES
from qgraph.passes.select_layers import DECISION
from qgraph.passes.tie_initializers import TieInitializers
from qgraph.schemes import get_scheme
from qgraph.solvers.reorder import Choice, Layer, choose_order, plain

REORDERS = "qgraph.reorders"  # key of model.meta: dict[str, Order], see ReorderInputs

MIN_GAIN = 0.01  # share of the weight error below which an order is not worth its while

Chooser = Callable[[Sequence[Layer]], Choice]


class ReorderInputs(GraphPass):
    """Permutes the channels that quantized layers read: exact, and kinder to blocks that share a scale.

    PT2-LLM's structural similarity reordering (SSR, arXiv 2510.03267), with better orders
    (solvers/reorder.py), and folded: what makes the channels makes them in their new order.

    1. All channels that have to keep an order in common, with all layers that read them, are one site
       (channel_order.py): the inputs of an MLP's down projection; the residual stream as a whole; the heads
       of attention, and likewise the channels inside of them. Its order goes into the columns, biases, norms
       and embeddings that make the channels and the rows that read them, and costs nothing. Where an output
       of the graph shows them, a Gather there puts them back.
    2. With `insert`, layers whose inputs have no such order get theirs by a Gather in front of them: a copy
       of the activations, and 8 bytes a channel in the file.

    Either is done only if it lowers the mean relative weight error of the site's layers by `min_gain`.

    Args:
        scheme: the run's, of which layers with a scheme of their own are no part.
        insert, min_gain: see above.
        threads: None is one for every CPU. The result does not depend on it.
        choose: the order for layers that have to share one; for tests.

    `model.meta[REORDERS]` holds, for the name (as it was) of every value that a quantized layer reads in
    another order than before, that order [K]: what is channel k now was channel order[k]. Every site,
    reordered or not, is among the refusals with its gain or the reason.
    """

    def __init__(
        self,
        scheme: str,
        *,
        insert: bool = False,
        min_gain: float = MIN_GAIN,
        threads: int | None = None,
        choose: Chooser | None = None,
    ) -> None:
        super().__init__()
        self.scheme, self.insert, self.min_gain = get_scheme(scheme), insert, min_gain
        self._choose = choose or (lambda layers: choose_order(layers, threads))

    def requires(self, model: ir.Model) -> None:
        """`SelectLayers` has run, and this pass has not."""
        require_selected_once(self, model, REORDERS)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        done: dict[str, Order] = {}
        model.meta[REORDERS] = done
        chosen = {
            node: format
            for node in model.graph
            if DECISION in node.meta and node.meta[DECISION].quantize and (format := self._format(node))
        }
        tracer = Tracer(model.graph)
        seen: set[ir.Value] = set()
        for value in dict.fromkeys(operand(node, 0) for node in chosen if is_op(node, "MatMul")):
            if value in seen:
                continue
            obstacles: list[str] = []
            for site in tracer.free(value, obstacles):
                self._fold(model.graph, site, chosen, done)
                seen |= {v for v, digits in site.values.items() if any(_is_last(v, d) for d in digits)}
            if value not in seen:
                self._left(model.graph, value, obstacles[0], chosen, done)
        if done:
            TieInitializers()(model)
        return ir.passes.PassResult(model, bool(done))

    def _format(self, node: ir.Node) -> str | None:
        """Of the weight that a chosen node reads; None where it stays in float."""
        own = node.meta[DECISION].scheme
        weight_format = (get_scheme(own) if own else self.scheme).weight_format
        return TABLES if weight_format is not None and is_op(node, "Gather") else weight_format

    def _fold(
        self, graph: ir.Graph, site: Channels, chosen: Mapping[ir.Node, str], done: dict[str, Order]
    ) -> None:
        """Gives the channels of a site their best order, if it is worth it; says so."""
        layers, inputs = _layers(site, chosen)
        where = _named(inputs)
        if (order := self._order(where, layers)) is None:
            return
        for value in inputs:
            size, name = _channels(value), str(value.name)
            index = np.arange(size)
            for digit in (d for d in site.values[value] if _is_last(value, d)):
                index = index[digit.index(order, size)]
            done[name] = done.get(name, np.arange(size))[index]
        for value in site.outputs:
            _restore(graph, value, site.values[value], order)
        site.permute(order)

    def _left(
        self,
        graph: ir.Graph,
        value: ir.Value,
        reason: str,
        chosen: Mapping[ir.Node, str],
        done: dict[str, Order],
    ) -> None:
        """Inserts a Gather for the chosen layers that read `value`, or says why they are left."""
        readers = [n for n in chosen if is_op(n, "MatMul") and n.inputs[0] is value]
        weights = dict.fromkeys(operand(node, 1) for node in readers)
        shared = [w for w in weights if w.is_graph_output() or any(n not in readers for n in w.consumers())]
        if not self.insert:
            self.refuse(value, reason)
            return
        if shared:
            self.refuse(value, f"{describe(shared[0])} is shared")
            return
        layers = [
            plain(array, chosen[weight.consumers()[0]], str(weight.name))
            for weight in weights
            if (array := constant(weight)) is not None
        ]
        if (order := self._order(_named([value]), layers)) is not None:
            _insert(graph, value, readers, order)
            done[str(value.name)] = order

    def _order(self, where: str, layers: Sequence[Layer]) -> Order | None:
        """The order for these layers, None to leave them; says so."""
        choice = self._choose(layers)
        figures = f"weight error {100 * choice.before:.4g} %"
        if not choice.name or choice.gain < self.min_gain:
            best = f", at best {100 * choice.after:.4g} % ({choice.name})" if choice.name else ""
            moves = any(layer.moves for layer in layers)
            reason = f"left in order: {figures}{best}" if moves else "no order changes what shares a block"
            self.refuse(where, reason)
            return None
        self.refuse(where, f"ordered by {choice.name}: {figures} -> {100 * choice.after:.4g} %")
        return choice.order


def _is_last(value: ir.Value, digit: Digit) -> bool:
    return value.shape is not None and digit.axis == len(value.shape) - 1


def _channels(value: ir.Value) -> int:
    """The size of its last axis."""
    size = value.shape[-1] if value.shape is not None else None
    assert isinstance(size, int)
    return size


def _named(values: Sequence[ir.Value]) -> str:
    names = ", ".join(printable(value.name) for value in values[:2])
    return f"{names} and {len(values) - 2} more" if len(values) > 2 else names


def _layers(site: Channels, chosen: Mapping[ir.Node, str]) -> tuple[list[Layer], list[ir.Value]]:
    """The weights, each once, whose blocks depend on the order of a site's channels; the values that they
    multiply."""
    layers: dict[ir.Value, Layer] = {}
    values: dict[ir.Value, None] = {}
    for node in chosen:
        table = is_op(node, "Gather")
        index, axis = (0, 1) if table else (1, 0)
        weight = operand(node, index)
        along = [digit for digit in site.constants.get((node, index), ()) if digit.axis == axis]
        array = constant(weight)
        if not along or array is None:
            continue
        if not table:
            values[operand(node, 0)] = None
        rows = np.concatenate(
            [np.arange(d.start, d.stop).reshape(d.outer, d.n, d.inner) for d in along], axis=0
        )
        layers[weight] = Layer(array.T if table else array, chosen[node], rows, str(weight.name))
    return list(layers.values()), list(values)


def _restore(graph: ir.Graph, value: ir.Value, digits: Sequence[Digit], order: Order) -> None:
    """Puts the channels of an output of the graph back into their old order."""
    node_name, name, out = f"{value.name}/restore", value.name, value
    nodes = []
    for digit in digits:
        assert value.shape is not None
        size = value.shape[digit.axis]
        assert isinstance(size, int)
        nodes.append(_gather(graph, out, np.argsort(digit.index(order, size)), digit.axis, node_name))
        out = nodes[-1].outputs[0]
    producer = value.producer()
    assert producer is not None
    copy_metadata(producer, nodes)
    graph.insert_after(producer, nodes)
    for i, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[i] = out
    value.name, out.name = f"{name}.ordered", name


def _insert(graph: ir.Graph, value: ir.Value, readers: Sequence[ir.Node], order: Order) -> None:
    """x -> x[.., order] for `readers`, and the rows of their weights likewise."""
    axis = len(value.shape or ()) - 1
    node = _gather(graph, value, order, axis, f"{value.name}/order")
    node.outputs[0].name = f"{value.name}.ordered"
    copy_metadata(readers[0], [node])
    graph.insert_before(readers[0], node)
    for weight in dict.fromkeys(operand(reader, 1) for reader in readers):
        array = constant(weight)
        assert array is not None
        weight.const_value = ir.Tensor(array[order], name=weight.name)
    for reader in readers:
        reader.replace_input_with(0, node.outputs[0])


def _gather(graph: ir.Graph, value: ir.Value, index: Order, axis: int, name: str) -> ir.Node:
    indices = add_initializer(graph, index.astype(np.int64), f"{value.name}.order")
    node = make_node("Gather", [value, indices], {"axis": axis}, name=name)
    out = node.outputs[0]
    out.name, out.type, out.shape = f"{name}.out", value.type, value.shape
    return node
