"""Channels of inputs divided, rows of weights multiplied: what several transforms do, each by its own s."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph.passes.base import (
    GraphPass,
    add_initializer,
    copy_metadata,
    describe,
    make_node,
    printable,
)
from qgraph.passes.channel_flow import Sink
from qgraph.passes.channel_sources import (
    Source,
    change_constant,
    chosen_matmuls,
    floats,
    operand,
    require_selected_once,
    sources,
)
from qgraph.passes.tie_initializers import TieInitializers

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Site:
    """A place where channels can be divided by s > 0, and the rows of the weights that get s in return."""

    where: str  # the value or node that takes the division, for messages
    source: Source | None  # what takes it; None where a Mul is to be inserted
    nodes: tuple[ir.Node, ...]  # the quantized MatMuls
    inputs: tuple[str, ...]  # the values, [.., K], that they read
    rows: tuple[npt.NDArray[np.int32], ...]  # [K] for each of `inputs`: the channel of each row
    weights: tuple[Vector, ...]  # [K, N] for each of `inputs`: its quantized weights, side by side
    free: npt.NDArray[np.bool_]  # [channels]: those that may be divided

    @property
    def channels(self) -> int:
        return len(self.free)

    @property
    def shown(self) -> str:
        """Its inputs, for messages."""
        return ", ".join(printable(name) for name in self.inputs)

    def divide(self, s: Vector) -> dict[str, Vector]:
        """s [channels] as the divisors [K] of each of `inputs`."""
        return {name: s[rows] for name, rows in zip(self.inputs, self.rows, strict=True)}


class ScaleChannels(GraphPass):
    """x W = (x / s) (diag(s) W) for the inputs of quantized linear layers; which s, a subclass says.

    The division goes where it costs nothing: into the scale and bias of a LayerNormalization or
    RMSNormalization, the vector of a Mul, or the columns and bias of a linear layer, which the channels may
    leave through heads, attention, a ReLU or the elementwise product of a gated MLP. It must reach nothing
    but constant weights. With `insert`, inputs for which there is no such place are multiplied by 1 / s, for
    the quantized layers only.

    What was done is stored in `model.meta[mark]`: for the name of a value that a layer read before, the s
    [K] that it has been divided by. Every site, done or not, is among the refusals with its reason.
    """

    mark: str  # the pass's own key of model.meta: dict[str, float32 [K]]
    insert = False

    @abstractmethod
    def strength(self, site: Site) -> Vector | None:
        """s [channels] > 0 for a site, 1 where not `site.free`; None to leave it, after saying why."""

    def requires(self, model: ir.Model) -> None:
        """`SelectLayers` has run, and this pass has not: what it goes by would be out of date."""
        require_selected_once(self, model, self.mark)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        done: dict[str, Vector] = {}
        model.meta[self.mark] = done
        waiting = dict.fromkeys(chosen_matmuls(model))  # that nothing has been done for
        why: dict[ir.Node, str] = {}
        for source in tuple(sources(model.graph)):
            sinks = source.flow.sinks
            targets = [sink for sink in sinks if sink.node in waiting]
            if not targets:
                continue
            reason = _obstacle(source, targets)
            if not reason and any(operand(sink.node, 0).name in done for sink in sinks):
                reason = "some of the layers that it reaches are scaled already"
            if reason:
                why.update({sink.node: reason for sink in targets})
                continue
            for sink in targets:
                del waiting[sink.node]
            s = self.strength(_site(describe(source.node), source, targets, source.flow.free()))
            if s is not None and self._fold(source, s):
                done.update({str(operand(sink.node, 0).name): s[sink.channels] for sink in sinks})
        self._left(model.graph, waiting, why, done)
        if done:
            TieInitializers()(model)
        return ir.passes.PassResult(model, bool(done))

    def _left(
        self,
        graph: ir.Graph,
        waiting: Mapping[ir.Node, None],
        why: Mapping[ir.Node, str],
        done: dict[str, Vector],
    ) -> None:
        """Inserts a Mul for the layers that are `waiting`, or says why they are left."""
        by_value: dict[ir.Value, list[ir.Node]] = {}
        for node in waiting:
            by_value.setdefault(operand(node, 0), []).append(node)
        for value, nodes in by_value.items():
            reason = why.get(nodes[0]) or _unreached(value)
            shared = [n for n in nodes if any(user not in nodes for user in operand(n, 1).consumers())]
            if not self.insert or shared:
                self.refuse(value, reason if not shared else f"{describe(operand(shared[0], 1))} is shared")
                continue
            K = floats(nodes[0], 1).shape[0]
            sinks = [Sink(node, np.arange(K, dtype=np.int32)) for node in nodes]
            s = self.strength(_site(describe(value), None, sinks, np.ones(K, bool)))
            if s is not None:
                _insert(graph, value, sinks, s)
                done[str(value.name)] = s

    def _fold(self, source: Source, s: Vector) -> bool:
        """Divides the channels of `source` and multiplies the rows of every weight that they reach.

        False, and nothing done, where a constant would overflow.
        """
        divided = [(source.node, index, floats(source.node, index) / s) for index in source.indices]
        divided += [(a.node, a.index, floats(a.node, a.index) / s[a.channels]) for a in source.flow.addends]
        weights = _rows_scaled(source.flow.sinks, s)
        if not all(np.isfinite(a).all() for a in (*(a for _, _, a in divided), *weights.values())):
            self.refuse(source.node, "left after all: a constant would overflow")
            return False
        for node, index, array in divided:
            change_constant(node, index, array)
        _set(weights)
        return True


def _unreached(value: ir.Value) -> str:
    """Why nothing divides `value`, which no source reaches."""
    producer = value.producer()
    behind = f", behind {describe(producer)}" if producer is not None else ""
    return f"no norm, product with a vector or linear layer before it can take a scale exactly{behind}"


def _obstacle(source: Source, targets: Sequence[Sink]) -> str:
    """Why a source cannot serve all of `targets`; empty when it can."""
    channels = np.concatenate([sink.channels for sink in targets])
    return source.flow.obstacle(channels) or source.obstacle()


def _site(where: str, source: Source | None, targets: Sequence[Sink], free: npt.NDArray[np.bool_]) -> Site:
    by_input: dict[str, list[Sink]] = {}
    for sink in targets:
        by_input.setdefault(str(operand(sink.node, 0).name), []).append(sink)
    weights = []
    for sinks in by_input.values():
        arrays = [floats(node, 1) for node in {operand(s.node, 1): s.node for s in sinks}.values()]
        weights.append(np.concatenate(arrays, axis=1) if len(arrays) > 1 else arrays[0])
    rows = tuple(sinks[0].channels for sinks in by_input.values())
    nodes = tuple(sink.node for sink in targets)
    return Site(where, source, nodes, tuple(by_input), rows, tuple(weights), free)


def _rows_scaled(sinks: Sequence[Sink], s: Vector) -> dict[ir.Value, Vector]:
    """Every weight with its rows multiplied, each once: no other node reads them."""
    return {
        weight: floats(sink.node, 1) * s[sink.channels][:, None]
        for weight, sink in {operand(sink.node, 1): sink for sink in sinks}.items()
    }


def _set(weights: Mapping[ir.Value, Vector]) -> None:
    for value, array in weights.items():
        value.const_value = ir.Tensor(array, name=value.name)


def _insert(graph: ir.Graph, value: ir.Value, sinks: Sequence[Sink], s: Vector) -> None:
    """x -> x * (1 / s) for the readers `sinks` of `value`."""
    factor = add_initializer(graph, 1 / s, f"{value.name}.smoothing")
    node = make_node("Mul", [value, factor], name=f"{value.name}/smooth")
    copy_metadata(sinks[0].node, [node])
    out = node.outputs[0]
    out.name, out.type, out.shape = f"{value.name}.smooth", value.type, value.shape
    graph.insert_before(sinks[0].node, node)
    for sink in sinks:
        sink.node.replace_input_with(0, out)
    _set(_rows_scaled(sinks, s))
