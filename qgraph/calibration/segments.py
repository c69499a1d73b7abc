"""Cuts the prepared graph into segments that are run one after the other, each on its own.

A segment computes what a stage of calibration taps, from what earlier segments left, and leaves what later
ones need: the values alive at its border. Each is a small ONNX model without weights: these are fed to it,
from wherever they are, so that no copy of a weight is made and one layer's at a time are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qgraph.calibration.session import open_session
from qgraph.errors import UnsupportedError
from qgraph.formats.nvfp4 import NVFP4
from qgraph.passes.base import describe
from qgraph.passes.cache import Cache
from qgraph.passes.lowbit_functions import DOMAIN
from qgraph.passes.lowbit_weights import LOOKUPS
from qgraph.passes.shapes.dims import from_ir, product, to_ir

Array = npt.NDArray[Any]

# What ONNX Runtime 1.31 loads.
_NEWEST_OPSET, _NEWEST_IR = 26, 13

# Initializers up to this size are part of the segment: axes, shapes, scalars. The `own` weight of a layer is
# not, as it may change.
_INLINE_BYTES = 1024


class Weight(Protocol):
    """What an initializer holds, when it is asked for."""

    @property
    def nbytes(self) -> int: ...

    def numpy(self) -> Array: ...


class _Table:
    """The float32 table [V, H] of a quantized lookup, dequantized each time."""

    def __init__(self, node: ir.Node) -> None:
        parts = [value.const_value for value in node.inputs[1:4] if value is not None]
        self._codes, self._block_scale, self._global_scale = (part for part in parts if part is not None)
        self.nbytes = 4 * self._codes.size

    def numpy(self) -> Array:
        scale = self._block_scale.numpy().astype(np.float32) * self._global_scale.numpy()
        table = self._codes.numpy().astype(np.float32)
        table *= np.repeat(scale, NVFP4.block, axis=1)[:, : table.shape[1]]
        return table


@dataclass(frozen=True)
class Segment:
    """Nodes to run, and what goes in and out, by name."""

    feeds: tuple[str, ...]  # inputs of the model
    borders: tuple[str, ...]  # values that earlier segments left
    weights: tuple[str, ...]  # initializers
    outputs: tuple[str, ...]
    session: Any  # None where there is nothing to compute

    def run(
        self, feeds: Mapping[str, Array], borders: Mapping[str, Array], weights: Mapping[str, Array]
    ) -> dict[str, Array]:
        """The outputs for one batch. Raises what ONNX Runtime raises."""
        if self.session is None:
            return {}
        given = {name: feeds[name] for name in self.feeds}
        given |= {name: borders[name] for name in self.borders}
        given |= {name: weights[name] for name in self.weights}
        return dict(zip(self.outputs, self.session.run(list(self.outputs), given), strict=True))


class FrozenGraph:
    """A prepared graph as it is now, whatever happens to the model later. Weights are referred to, not
    copied.

    Embeddings may be quantized: their lookups become those in the dequantized table.

    Raises UnsupportedError for a graph with subgraphs or other functions, or of an opset that ONNX Runtime
    does not run.
    """

    def __init__(self, model: ir.Model) -> None:
        graph = model.graph
        self.nodes: list[onnx.NodeProto] = []
        self.producer: dict[str, int] = {}  # value -> index of its node
        self.inputs = frozenset(str(value.name) for value in graph.inputs if not value.is_initializer())
        self.weights: dict[str, Weight] = {}
        self._inline: set[str] = set()
        self._info: dict[str, onnx.ValueInfoProto] = {}
        for value in graph.initializers.values():
            assert value.const_value is not None
            self.weights[str(value.name)] = value.const_value
            if value.const_value.nbytes <= _INLINE_BYTES:
                self._inline.add(str(value.name))
        for value in (*graph.inputs, *graph.initializers.values()):
            self._info[str(value.name)] = _info(value)
        for node in graph:
            if node.domain == DOMAIN and node.op_type in LOOKUPS:
                node = self._plain_lookup(node)
            elif node.domain or any(True for _ in _subgraphs(node)):
                raise UnsupportedError(
                    f"{describe(node)}: calibration runs float models of standard operators without subgraphs"
                )
            for value in node.outputs:
                if value.name:
                    self.producer[value.name] = len(self.nodes)
                    self._info[value.name] = _info(value)
            self.nodes.append(ir.serde.serialize_node(node))
        self._opset, self._ir_version = _versions(model)

    def _plain_lookup(self, node: ir.Node) -> ir.Node:
        """`Gather` from the dequantized table, which goes by the name of its codes."""
        ids, codes, *_ = node.inputs
        assert ids is not None and codes is not None and codes.name is not None
        table = _Table(node)
        self.weights[codes.name] = table
        value = ir.Value(name=codes.name, shape=codes.shape, type=ir.TensorType(ir.DataType.FLOAT))
        self._info[codes.name] = _info(value)
        result = ir.Value(name=node.outputs[0].name, shape=node.outputs[0].shape, type=node.outputs[0].type)
        # Values of its own: the model's must not count this node among their readers.
        return ir.Node("", "Gather", [value, ir.Value(name=ids.name)], outputs=[result], name=node.name)

    def separate(self, layers: Iterable[str], *, rounds: bool) -> None:
        """Lets these nodes of two inputs, the second a weight, read one of their own, `own(weight)`, which
        may be replaced while other readers of the weight, such as a lookup that is tied to them, keep the old
        one. With `rounds` they read `rounded(x)` in the place of x, wherever that is at hand."""
        wanted = set(layers)
        for node in self.nodes:
            if node.name in wanted:
                x, weight = node.input
                node.input[1] = own(weight)
                self.weights[own(weight)] = self.weights[weight]
                if rounds:
                    node.input[0] = rounded(x)

    def ranks(self, groups: Sequence[Iterable[str]]) -> dict[str, int]:
        """For every computed value, how many of the groups of weights it depends on: all that come before.

        The value is final once groups [0, rank) are.
        """
        of_weight = {name: i + 1 for i, names in enumerate(groups) for name in names}
        ranks: dict[str, int] = {}
        for node in self.nodes:
            read = [name.removesuffix(_ROUNDED) for name in node.input]
            rank = max((max(ranks.get(n, 0), of_weight.get(n, 0)) for n in read), default=0)
            ranks.update(dict.fromkeys(filter(None, node.output), rank))
        return ranks

    def needed(self, wanted: Iterable[str], have: frozenset[str] | set[str]) -> tuple[list[int], set[str]]:
        """The nodes that compute `wanted` from `have`, in order, and what of `have` is read or wanted."""
        nodes: set[int] = set()
        read: set[str] = set()
        work, seen = list(wanted), set()
        while work:
            name = _at_hand(work.pop(), have)
            if name in seen or not name:
                continue
            seen.add(name)
            if name in have:
                read.add(name)
            elif (index := self.producer.get(name)) is not None and index not in nodes:
                nodes.add(index)
                work.extend(self.nodes[index].input)
        return sorted(nodes), read

    def weights_of(self, nodes: Iterable[int]) -> set[str]:
        """The initializers that these nodes read."""
        return {name for i in nodes for name in self.nodes[i].input if name in self.weights}

    def segment(self, outputs: Iterable[str], have: frozenset[str] | set[str], name: str) -> Segment:
        """What computes `outputs` from the values `have`, the model's inputs and its weights.

        name: for messages. Raises InputError, UnsupportedError: see `open_session`.
        """
        computed = sorted(n for n in set(outputs) - have if n in self.producer)
        nodes, read = self.needed(computed, have)
        if not nodes:
            return Segment((), (), (), (), None)
        protos = [self._resolved(self.nodes[i], have) for i in nodes]
        names = {n for proto in protos for n in proto.input if n}
        inline = names & self._inline
        feeds, borders = sorted(names & self.inputs), sorted(read)
        weights = sorted((names & self.weights.keys()) - inline)
        graph = onnx.helper.make_graph(
            protos,
            "segment",
            [self._info_of(n) for n in (*feeds, *borders, *weights)],
            [self._info[n] for n in computed],
            [onnx.numpy_helper.from_array(self.weights[n].numpy(), n) for n in sorted(inline)],
        )
        opsets = [onnx.helper.make_opsetid("", self._opset)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=self._ir_version)
        session = open_session(model, name)
        return Segment(tuple(feeds), tuple(borders), tuple(weights), tuple(computed), session)

    def _resolved(self, node: onnx.NodeProto, have: frozenset[str] | set[str]) -> onnx.NodeProto:
        """The node, reading values that there are."""
        names = [_at_hand(name, have) for name in node.input]
        if names == list(node.input):
            return node
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = names
        return copy

    def _info_of(self, name: str) -> onnx.ValueInfoProto:
        if name in self._info:
            return self._info[name]
        info = onnx.ValueInfoProto()
        info.CopyFrom(self._info[_original(name)])
        info.name = name
        return info


_ROUNDED, _OWN = "\n(rounded)", "\n(own)"  # end no name of a model: these are one line


def rounded(name: str) -> str:
    """What the rounded `name` is called."""
    return name + _ROUNDED


def own(weight: str) -> str:
    """What the weight is called as that of layers which are quantized."""
    return weight + _OWN


def _original(name: str) -> str:
    return name.removesuffix(_ROUNDED).removesuffix(_OWN)


def _at_hand(name: str, have: frozenset[str] | set[str]) -> str:
    """`name`; where that is a rounding that there is not, what is rounded."""
    return name if name in have else name.removesuffix(_ROUNDED)


def leading_dims_match(value: ir.Value, mask: ir.Value | None, cache: Cache | None = None) -> bool:
    """Whether `value` [batch, sequence, K], or [batch * sequence, K], has a row for every element of `mask`
    [batch, sequence].

    By the dims' names, not by sizes that may agree by accident. A mask that covers more than the value does,
    such as one over a cache and the new tokens, [batch, total], matches as well: where nothing is in the
    cache the sizes agree, and elsewhere `masked_rows` does not use it.
    """
    if mask is None or mask.shape is None or value.shape is None or len(mask.shape) != 2:
        return False
    rows = list(value.shape)[:-1]
    wanted = [
        to_ir(cache.sequence) if cache and not isinstance(dim, int) and dim.value == cache.total else dim
        for dim in mask.shape
    ]
    if len(rows) == 1:
        both = [from_ir(dim) for dim in wanted]
        return None not in both and product(both) == from_ir(rows[0])
    return len(rows) == 2 and all(_covers(a, b) for a, b in zip(wanted, rows, strict=True))


def masked_rows(x: Array, tokens: npt.NDArray[np.bool_] | None) -> Array:
    """The rows of x [.., K] that are no padding, as [n, K]. tokens: bool [batch, sequence]; None: all."""
    rows = x.reshape(-1, x.shape[-1])
    if tokens is None or tokens.size != len(rows):
        return rows
    return rows[tokens.reshape(-1)]


def _covers(mask: int | ir.SymbolicDim, dim: int | ir.SymbolicDim) -> bool:
    if isinstance(mask, int) or isinstance(dim, int):
        return mask == dim
    return mask.value is not None and dim.value is not None and dim.free_symbols() <= mask.free_symbols()


def _subgraphs(node: ir.Node) -> Iterable[ir.Attr]:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return (attribute for attribute in node.attributes.values() if attribute.type in kinds)


def _info(value: ir.Value) -> onnx.ValueInfoProto:
    """Name, data type and shape; named dims are left open, as ONNX Runtime would do nothing with them."""
    assert value.dtype is not None and value.shape is not None, value.name
    shape = [dim if isinstance(dim, int) else None for dim in value.shape]
    return onnx.helper.make_tensor_value_info(str(value.name), int(value.dtype), shape)


def _versions(model: ir.Model) -> tuple[int, int]:
    """Opset and IR version to run the model's operators with."""
    opset = model.opset_imports[""]
    if opset > _NEWEST_OPSET:
        for node in model.graph:
            if not node.domain and not _is_older(node, opset):
                raise UnsupportedError(
                    f"{describe(node)} is as of opset {opset}; calibration runs models up to opset "
                    f"{_NEWEST_OPSET}: export the model with opset 23"
                )
    return min(opset, _NEWEST_OPSET), min(model.ir_version, _NEWEST_IR)


def _is_older(node: ir.Node, opset: int) -> bool:
    """Whether the operator was there at `_NEWEST_OPSET` with all that the node uses of it.

    Since then operators have been given further data types, which a float model has no use for, and
    attributes.
    """
    try:
        old = onnx.defs.get_schema(node.op_type, _NEWEST_OPSET, "")
    except onnx.defs.SchemaError:
        return False
    new = onnx.defs.get_schema(node.op_type, opset, "")
    arity = len(node.inputs) <= old.max_input and len(node.outputs) <= old.max_output
    return (
        arity
        and all(
            name in node.attributes or attribute.default_value == new.attributes[name].default_value
            for name, attribute in old.attributes.items()
        )
        and node.attributes.keys() <= old.attributes.keys()
    )
