"""Where the channels of a value go: through which operators, and into which rows of which weights.

What a graph transform needs in order to scale or rotate the channels of one value and undo it in the weights
that read them, however many transposes, heads and shared key-value groups lie between.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph.passes.base import (
    attribute,
    constant,
    describe,
    input_dims,
    int_list,
    is_op,
    register,
    scalar,
    shape_of,
)

Labels = npt.NDArray[np.int32]  # of a value: the channel that each of its elements is a multiple of

MAX_BLOCK = 128
_MAX_ELEMENTS = 1 << 25  # of a value with fixed dims that is still followed

# Sizes that named dims have while channels are followed: no product or sum of a few is a size of another
# axis by accident, so that a reshape that mixes axes is seen to.
_SIZES = (3, 5, 7, 11, 13, 17, 19, 23)


@dataclass(frozen=True, eq=False)
class Sink:
    """A MatMul that multiplies the channels by a constant float32 [K, N]."""

    node: ir.Node
    channels: Labels  # [K], the channel that each row of the weight meets

    @property
    def weight(self) -> ir.Value:
        value = self.node.inputs[1]
        assert value is not None
        return value


@dataclass(frozen=True, eq=False)
class Addend:
    """A constant that is added to the channels on their way: a bias."""

    node: ir.Node
    index: int  # of the input
    channels: Labels  # of its shape: the channel that each element is added to


@dataclass(eq=False)
class Flow:
    """Everything that the channels of `value` [.., C] reach.

    Between the value and the sinks lie operators that are homogeneous in every channel: what multiplies a
    channel by s > 0 at the value multiplies it by s at every sink and needs s at every addend. `block` is the
    largest power of two up to 128 such that even linear maps within each aligned block of that many channels
    pass unchanged.
    """

    value: ir.Value
    channels: int
    sinks: list[Sink] = field(default_factory=list)
    addends: list[Addend] = field(default_factory=list)
    obstacles: list[tuple[npt.NDArray[np.bool_], str]] = field(default_factory=list)  # channels [C], why
    block: int = MAX_BLOCK

    def blocked(self) -> npt.NDArray[np.bool_]:
        """[C]: the channels that something else than sinks reads."""
        return np.logical_or.reduce([channels for channels, _ in self.obstacles], initial=False) | np.zeros(
            self.channels, bool
        )

    def free(self) -> npt.NDArray[np.bool_]:
        """[C]: the channels that sinks read and nothing else does."""
        reached = np.zeros(self.channels, bool)
        for sink in self.sinks:
            reached[sink.channels] = True
        return reached & ~self.blocked()

    def obstacle(self, channels: Labels) -> str:
        """Why not all of `channels` are free; empty when they are."""
        return next((why for blocked, why in self.obstacles if blocked[channels].any()), "")


class Tracer:
    """Follows channels through one graph, in which shapes have been inferred."""

    def __init__(self, graph: ir.Graph) -> None:
        self._sizes = {name: _SIZES[i % len(_SIZES)] for i, name in enumerate(input_dims(graph))}
        self._place = {node: i for i, node in enumerate(graph)}

    def flow(self, value: ir.Value) -> Flow:
        """Where the channels along the last axis of `value` go."""
        shape = self.shape(value)
        if not shape:
            raise ValueError(f"{value.name} has no axis of channels")
        flow = Flow(value, shape[-1])
        labels = {value: np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)}
        waiting = self._readers(flow, value, labels[value])
        while waiting:
            node = heapq.heappop(waiting)[1]
            read = {i: labels[v] for i, v in enumerate(node.inputs) if v in labels}
            try:
                made = self._through(flow, node, read)
            except _ObstacleError as obstacle:
                for found in read.values():
                    _block(flow, found, str(obstacle))
                continue
            for output, found in made.items():
                labels[output] = found
                for item in self._readers(flow, output, found):
                    if item not in waiting:
                        heapq.heappush(waiting, item)
        _drop_shared(flow)
        return flow

    def shape(self, value: ir.Value) -> tuple[int, ...] | None:
        """The sizes of `value` while channels are followed; None where they are not known or too large."""
        sizes = []
        for dim in shape_of(value) or ():
            size = dim if isinstance(dim, int) else dim.evaluate(self._sizes)
            if not isinstance(size, int):
                return None
            sizes.append(size)
        return tuple(sizes) if value.shape is not None and math.prod(sizes) <= _MAX_ELEMENTS else None

    def _readers(self, flow: Flow, value: ir.Value, labels: Labels) -> list[tuple[int, ir.Node]]:
        """The nodes that read `value`, by place in the graph."""
        if value.is_graph_output():
            _block(flow, labels, f"{describe(value)} is an output of the graph")
        found = {}
        for node in value.consumers():
            if node in self._place:
                found[self._place[node]] = node
            else:
                _block(flow, labels, f"{describe(node)} reads it in a subgraph")
        return sorted(found.items())

    def _through(self, flow: Flow, node: ir.Node, read: dict[int, Labels]) -> dict[ir.Value, Labels]:
        """The labels of the outputs of `node`, from those of the inputs that it reads; none of a sink."""
        if 0 in read and _is_sink(node):
            flow.sinks.append(Sink(node, _last_axis(node, read[0])))
            return {}
        if is_op(node, "Attention"):
            for index in read.keys() & {0, 1, 3}:  # queries, keys, mask
                _block(flow, read[index], f"{describe(node)} reads it too")
        # Blocked channels are left as they are: what follows from them alone is a value like any other.
        blocked = flow.blocked()
        read = {i: labels for i, labels in read.items() if not blocked[labels.reshape(-1)].all()}
        if not read:
            return {}
        rule = _RULES.get(node.op_type) if node.domain == "" else None
        if rule is None:
            raise _ObstacleError(f"{describe(node)} reads it too")
        if len(read) > 1:
            raise _ObstacleError(f"{describe(node)} joins channels with each other")
        ((index, labels),) = read.items()
        shapes = [self.shape(v) for v in node.outputs]
        if None in shapes:
            raise _ObstacleError(f"the shape of the output of {describe(node)} is not known, or too large")
        made = rule(flow, node, index, labels, [s for s in shapes if s is not None])
        for found, shape in zip(made, shapes, strict=False):
            if found.shape != shape:
                raise _ObstacleError(f"{describe(node)} is not followed: its bounds depend on sizes")
        return dict(zip(node.outputs, made, strict=False))


class _ObstacleError(Exception):
    """Why channels cannot be followed through a node."""


def _block(flow: Flow, labels: Labels, why: str) -> None:
    channels = np.zeros(flow.channels, bool)
    channels[labels.reshape(-1)] = True
    flow.obstacles.append((channels, why))


def _drop_shared(flow: Flow) -> None:
    """A weight that something else reads too, or reads otherwise, is no sink."""
    kept = []
    for sink in flow.sinks:
        same = {s.node for s in flow.sinks if np.array_equal(s.channels, sink.channels)}
        others = [n for n in sink.weight.consumers() if n not in same]
        if others or sink.weight.is_graph_output():
            by = describe(others[0]) if others else "the graph's outputs"
            _block(flow, sink.channels, f"the weight {describe(sink.weight)} is shared with {by}")
        else:
            kept.append(sink)
    flow.sinks = kept


def _is_sink(node: ir.Node) -> bool:
    """Whether `node` multiplies what it reads first by a constant matrix of floats."""
    if not is_op(node, "MatMul"):
        return False
    weight = node.inputs[1]
    return (
        weight is not None
        and weight.is_initializer()
        and not weight.is_graph_input()
        and weight.dtype == ir.DataType.FLOAT
        and weight.shape is not None
        and len(weight.shape) == 2
    )


def _last_axis(node: ir.Node, labels: Labels) -> Labels:
    """The channels along the last axis, which must be the same wherever one looks along the others."""
    row = labels[(0,) * (labels.ndim - 1)]
    if not (labels == row).all():
        raise _ObstacleError(f"{describe(node)} meets several channels in one row of its weight")
    return row


def block_of(rows: Labels) -> int:
    """The largest power of two, up to 128, of aligned neighbours that `rows` [.., n] consists of."""
    block = MAX_BLOCK
    while block > 1:
        if rows.shape[-1] % block == 0:
            blocks = rows.reshape(-1, block)
            first = blocks[:, :1]
            if (first % block == 0).all() and (blocks == first + np.arange(block)).all():
                break
        block //= 2
    return block


# -- rules: (flow, node, index of the input, its labels, shapes of the outputs) -> labels of the outputs -----

_Shapes = list[tuple[int, ...]]
_Rule = Callable[[Flow, ir.Node, int, Labels, _Shapes], list[Labels]]
_RULES: dict[str, _Rule] = {}
_rule = functools.partial(register, _RULES)


@_rule("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
def _reshape(flow: Flow, node: ir.Node, index: int, labels: Labels, shapes: _Shapes) -> list[Labels]:
    if labels.size != math.prod(shapes[0]):
        raise _ObstacleError(f"{describe(node)} is not followed: its shape depends on sizes")
    return [labels.reshape(shapes[0])]


@_rule("Shape", "Size")
def _sizes_alone(flow: Flow, node: ir.Node, index: int, labels: Labels, shapes: _Shapes) -> list[Labels]:
    """Reads no element."""
    return []


@_rule("Transpose")
def _transpose(flow: Flow, node: ir.Node, index: int, labels: Labels, shapes: _Shapes) -> list[Labels]:
    return [np.transpose(labels, attribute(node, "perm", None))]


@_rule("Expand")
def _expand(flow: Flow, node: ir.Node, index: int, labels: Labels, shapes: _Shapes) -> list[Labels]:
    return [_broadcast(node, labels, shapes[0])]


@_rule("Slice")
def _slice(flow: Flow, node: ir.Node, index: int, labels: Labels, shapes: _Shapes) -> list[Labels]:
    starts, ends, axes, steps = (
        int_list(node.inputs[i]) if len(node.inputs) > i and node.inputs[i] is not None else []
        for i in (1, 2, 3, 4)
    )
    if starts is None or ends is None or axes is None or steps is None:
        raise _ObstacleError(f"{describe(node)} is not followed: its bounds are computed")
    window = [slice(None)] * labels.ndim
    for start, end, axis, step in zip(
        starts, ends, axes or range(len(starts)), steps or [1] * len(starts), strict=True
    ):
        window[axis] = slice(start, end, step)
    return [labels[tuple(window)]]


@_rule("Split")
def _split(flow: Flow, node: ir.Node, index: int, labels: Labels, shapes: _Shapes) -> list[Labels]:
    axis = attribute(node, "axis", 0)
    ends = np.cumsum([shape[axis] for shape in shapes])
    return np.split(labels, ends[:-1], axis)


@_rule("Relu", "LeakyRelu")
def _homogeneous(flow: Flow, node: ir.Node, index: int, labels: Labels, shapes: _Shapes) -> list[Labels]:
    """f(s x) = s f(x) for s > 0."""
    flow.block = 1
    return [labels]


@_rule("Mul", "Div")
def _product(flow: Flow, node: ir.Node, index: int, labels: Labels, shapes: _Shapes) -> list[Labels]:
    """Linear in one operand, as the up projection of a gated MLP, whatever the other is."""
    if node.op_type == "Div" and index == 1:
        raise _ObstacleError(f"{describe(node)} divides by it")
    if scalar(node.inputs[1 - index]) is None:
        flow.block = 1
    return [_broadcast(node, labels, shapes[0])]


@_rule("Add")
def _sum(flow: Flow, node: ir.Node, index: int, labels: Labels, shapes: _Shapes) -> list[Labels]:
    """With a constant: a bias."""
    bias = constant(node.inputs[1 - index])
    if bias is None or bias.dtype != np.float32:
        raise _ObstacleError(f"{describe(node)} reads it too")
    out = _broadcast(node, labels, shapes[0])
    if not bias.any():
        return [out]
    shape = (1,) * (out.ndim - bias.ndim) + bias.shape
    channels = out[tuple(slice(None if size > 1 else 1) for size in shape)]
    if channels.shape != shape or not (out == channels).all():
        raise _ObstacleError(f"{describe(node)} adds one number to several channels")
    flow.addends.append(Addend(node, 1 - index, channels.reshape(bias.shape)))
    return [out]


@_rule("MatMul")
def _matmul(flow: Flow, node: ir.Node, index: int, labels: Labels, shapes: _Shapes) -> list[Labels]:
    """Probabilities times values: sums over positions, each of which has the same channels."""
    if labels.ndim < 2:
        raise _ObstacleError(f"{describe(node)} mixes channels")
    axis = labels.ndim - (2 if index == 1 else 1)
    return [_summed(flow, node, labels, axis, shapes[0])]


@_rule("Attention")
def _attention(flow: Flow, node: ir.Node, index: int, labels: Labels, shapes: _Shapes) -> list[Labels]:
    """The same by heads: query head h reads value head h // (query heads / value heads)."""
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]) or any(node.inputs[4:]):
        raise _ObstacleError(f"{describe(node)} keeps it in a cache")
    shape = shapes[0]
    if flat := labels.ndim == 3:
        q_heads, kv_heads = attribute(node, "q_num_heads", 0), attribute(node, "kv_num_heads", 0)
        labels = labels.reshape(*labels.shape[:2], kv_heads, -1).swapaxes(1, 2)
        shape = (shape[0], q_heads, shape[1], shape[2] // q_heads)
    labels = np.repeat(labels, shape[1] // labels.shape[1], axis=1)
    out = _summed(flow, node, labels, 2, shape)
    return [out.swapaxes(1, 2).reshape(shapes[0]) if flat else out]


def _summed(flow: Flow, node: ir.Node, labels: Labels, axis: int, shape: tuple[int, ...]) -> Labels:
    """The labels of sums along `axis`, broadcast to `shape`."""
    first = labels[(*[slice(None)] * axis, slice(1))]
    if not (labels == first).all():
        raise _ObstacleError(f"{describe(node)} mixes channels")
    flow.block = min(flow.block, block_of(first) if axis != labels.ndim - 1 else 1)
    return _broadcast(node, first, shape)


def _broadcast(node: ir.Node, labels: Labels, shape: tuple[int, ...]) -> Labels:
    try:
        return np.broadcast_to(labels, shape)
    except ValueError:
        raise _ObstacleError(f"{describe(node)} is not followed: its shape depends on sizes") from None
