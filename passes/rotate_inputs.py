"""Block Hadamard rotation of the inputs of quantized layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph.errors import UsageError
from qgraph.passes.base import (
    GraphPass,
    add_initializer,
    constant,
    copy_metadata,
    describe,
    make_node,
    printable,
)
from qgraph.passes.channel_flow import block_of
from qgraph.passes.channel_sources import (
    Source,
    change_constant,
    chosen_matmuls,
    floats,
    operand,
    require_selected_once,
    sources,
)
from qgraph.passes.linear_groups import LinearGroup, linear_groups
from qgraph.passes.tie_initializers import TieInitializers
from qgraph.solvers.hessian import HADAMARD_SIZES, hadamard

ROTATION = "qgraph.rotation"  # key of metadata_props: the block size, of the nodes that rotate a value
ROTATIONS = "qgraph.rotations"  # key of model.meta: dict[str, int], see RotateInputs

SIZES = HADAMARD_SIZES[::-1]


class RotateInputs(GraphPass):
    """x W = (x R)(R^-1 W), R block-diagonal of Hadamard matrices: every number becomes a sum over its block.

    MR-GPTQ (arXiv 2509.23202): blocks of 16 to 128, so that rotation stays cheap and local. With b the size
    of a block and H its Sylvester matrix of +-1, R = H / 2^ceil(log2(b)/2), R^-1 = H / 2^floor(log2(b)/2):
    orthogonal, for 32 and 128 but for a factor sqrt(2), and every element is a power of two, so that only
    the sums round.

    Each group of layers with one input gets the largest size that is allowed and divides K:
    1. where a linear layer reaches it with whole heads unmixed, as values do through attention, R goes into
       the columns and bias of that layer (a rotation within heads: the size divides the head, too);
    2. else into the graph: Reshape -> MatMul by R [b, b] -> Reshape, once for all chosen layers that read the
       value; these nodes carry `qgraph.rotation`.

    Args:
        size: the largest block: 16, 32, 64 or 128.
        groups: names of the values that chosen MatMuls read; None for all.

    `model.meta[ROTATIONS]` holds the block size for the name of every value that was rotated, as it was
    called before. Every group, rotated or not, is among the refusals with its reason.

    Raises UsageError for another size, or a name in `groups` that no chosen layer reads.
    """

    def __init__(self, size: int, groups: Sequence[str] | None = None) -> None:
        super().__init__()
        if size not in SIZES:
            raise UsageError(f"blocks to rotate have 16, 32, 64 or 128 channels, not {size}")
        self.size = size
        self.groups = None if groups is None else tuple(groups)

    def requires(self, model: ir.Model) -> None:
        """`SelectLayers` has run, and this pass has not."""
        require_selected_once(self, model, ROTATIONS)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        done: dict[str, int] = {}
        model.meta[ROTATIONS] = done
        nodes = {str(node.name): node for node in chosen_matmuls(model)}
        found = linear_groups(list(nodes.values()))
        self._check_groups(found)
        reach = {sink.node: source for source in sources(model.graph) for sink in source.flow.sinks}
        for group in found:
            if self.groups is not None and not set(group.values) & set(self.groups):
                continue
            shown = ", ".join(printable(value) for value in group.values)
            if any(value in done for value in group.values):
                self.refuse(shown, "already rotated for other layers")
                continue
            members = [nodes[name] for name in group.nodes]
            block = next((b for b in SIZES if b <= self.size and group.K % b == 0), 0)
            if not block:
                self.refuse(shown, f"no block of 16 to {self.size} channels divides {group.K}")
            elif other := _other_reader(members):
                self.refuse(shown, f"{other} needs a weight of its layers as it is")
            elif folded := _fold(reach.get(members[0]), members, block):
                done.update(dict.fromkeys(group.values, folded))
                self.refuse(
                    shown, f"rotated by blocks of {folded}, folded into {describe(reach[members[0]].node)}"
                )
            else:
                _insert(model.graph, members, block)
                done.update(dict.fromkeys(group.values, block))
                self.refuse(shown, f"rotated by blocks of {block}, as an operator")
        if done:
            TieInitializers()(model)
        return ir.passes.PassResult(model, bool(done))

    def _check_groups(self, found: Sequence[LinearGroup]) -> None:
        known = {value for group in found for value in group.values}
        if unknown := sorted(set(self.groups or ()) - known):
            raise UsageError(f"no layer to quantize reads '{printable(unknown[0])}'")


def scales(block: int) -> tuple[float, float]:
    """Powers of two (r, w) with r w = 1 / block, as near to each other as can be: R = r H, R^-1 = w H."""
    log = block.bit_length() - 1
    return 2.0 ** -((log + 1) // 2), 2.0 ** -(log // 2)


def rotate_rows(W: npt.NDArray[np.float32], block: int, scale: float) -> npt.NDArray[np.float32]:
    """scale (I x H) W for W [K, ..], H of the size `block`, which divides K: a fast Walsh-Hadamard transform.

    Sums in float64, rounded once: the result does not depend on the order of a product's sums.
    """
    K = len(W)
    out = np.empty(W.shape, np.float32)
    for start in range(0, K, block):
        rows = W[start : start + block].astype(np.float64)
        half = 1
        while half < block:
            pairs = rows.reshape(block // (2 * half), 2, half, -1)
            rows = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
            half *= 2
        out[start : start + block] = (scale * rows).reshape(block, *W.shape[1:])
    return out


def _other_reader(members: Sequence[ir.Node]) -> str:
    """What besides `members` reads one of their weights; empty when nothing does."""
    for weight in (operand(node, 1) for node in members):
        if weight.is_graph_output():
            return "an output of the graph"
        if others := [node for node in weight.consumers() if node not in members]:
            return describe(others[0])
    return ""


def _fold(source: Source | None, members: Sequence[ir.Node], block: int) -> int:
    """Rotates the channels of a linear layer and back in the rows of all weights that they reach. Returns the
    size of the blocks; 0, and nothing done, where that is not exact."""
    if source is None or not source.is_linear or source.obstacle():
        return 0
    flow = source.flow
    if {sink.node for sink in flow.sinks} != set(members) or not flow.free().all():
        return 0
    block = min(block, flow.block, *(block_of(sink.channels) for sink in flow.sinks))
    biases = [(a, constant(operand(a.node, a.index))) for a in flow.addends]
    whole = all(
        bias is not None and np.array_equal(a.channels.reshape(-1), np.arange(flow.channels))
        for a, bias in biases
    )
    if block < SIZES[-1] or flow.channels % block or not whole:
        return 0
    forward, back = scales(block)
    changes = [(source.node, 1, floats(source.node, 1).T)]
    changes += [(a.node, a.index, bias.reshape(-1, 1)) for a, bias in biases if bias is not None]
    for node, index, columns in changes:
        shape = floats(node, index).shape
        turned = rotate_rows(columns, block, forward)
        change_constant(node, index, np.ascontiguousarray(turned.T).reshape(shape))
    for node in {operand(sink.node, 1): sink.node for sink in flow.sinks}.values():
        change_constant(node, 1, rotate_rows(floats(node, 1), block, back))
    return block


def _insert(graph: ir.Graph, members: Sequence[ir.Node], block: int) -> None:
    """Rotates every value that `members` read, for them only, and back the rows of their weights."""
    forward, back = scales(block)
    for value in dict.fromkeys(operand(node, 0) for node in members):
        readers = [node for node in members if node.inputs[0] is value]
        rotated = _rotated(graph, value, readers[0], block, forward)
        for node in readers:
            node.replace_input_with(0, rotated)
    for weight in dict.fromkeys(operand(node, 1) for node in members):
        array = constant(weight)
        assert array is not None
        weight.const_value = ir.Tensor(rotate_rows(array, block, back), name=weight.name)


def _rotated(graph: ir.Graph, value: ir.Value, before: ir.Node, block: int, scale: float) -> ir.Value:
    """Nodes for value [.., K] times R, put `before` its first reader."""
    assert value.shape is not None
    name, *leading = f"{value.name}/rotate", *value.shape[:-1]
    K = value.shape[-1]
    assert isinstance(K, int)
    R = add_initializer(graph, hadamard(block) * np.float32(scale), f"hadamard.{block}")
    blocks, whole = [*leading, K // block, block], [*leading, K]

    def reshape(source: ir.Value, shape: list, part: str) -> ir.Node:
        target = np.array([0] * len(leading) + shape[len(leading) :], np.int64)
        return make_node(
            "Reshape", [source, add_initializer(graph, target, f"{name}.{part}")], name=f"{name}/{part}"
        )

    nodes = [reshape(value, blocks, "blocks")]
    nodes.append(make_node("MatMul", [nodes[-1].outputs[0], R], name=name))
    nodes.append(reshape(nodes[-1].outputs[0], whole, "whole"))
    copy_metadata(before, nodes)
    for node, shape in zip(nodes, (blocks, blocks, whole), strict=True):
        node.metadata_props[ROTATION] = str(block)
        out = node.outputs[0]
        out.name, out.type, out.shape = f"{node.name}.out", value.type, ir.Shape(shape)
    graph.insert_before(before, nodes)
    return nodes[-1].outputs[0]
