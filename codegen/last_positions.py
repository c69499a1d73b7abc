"""The logits of the last positions only: what a decoder is asked for when it generates.

A graph that maps token ids [batch, sequence] to [batch, sequence, vocabulary] gets an output
[batch, logits, vocabulary] with the last `logits` positions of that, all of them unless a run asks for fewer.
Everything that treats each position by itself behind the last layer that does not, from the feed-forward
layer of the last block to the lm_head, is then done for these positions alone.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir

from qgraph.codegen.dims import CONTENT, Dim, equal, is_one, size, symbol

LOGITS = symbol("logits")

_ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Pow", "Neg", "Abs", "Sqrt", "Reciprocal", "Max", "Min", "Clip"}
_FUNCTIONS = {"Exp", "Log", "Erf", "Tanh", "Sigmoid", "Relu", "Gelu", "Swish", "Softplus", "Where", "Cast"}
_BY_ELEMENT = _ARITHMETIC | _FUNCTIONS | {"Identity"}
_BY_ROW = {"LayerNormalization", "RMSNormalization", "Softmax", "LogSoftmax"}


def take_last_positions(graph: ir.Graph) -> tuple[ir.Graph, Dim | None]:
    """A copy of a prepared graph that ends in the last positions, and the number of all positions; the graph
    itself and None where no output is the logits of token ids."""
    found = [v for v in dict.fromkeys(graph.outputs) if _is_logits(graph, v)]
    names = {s.name for v in graph.inputs for d in v.shape or () for s in size(d).free_symbols}
    if not found or len({_positions(v) for v in found}) > 1 or LOGITS.name in names:
        return graph, None
    length = _positions(found[0])
    assert length is not None
    places = [graph.outputs.index(v) for v in found]
    graph = graph.clone()
    shortened, borders = _follow(graph, [graph.outputs[i] for i in places], length)
    for value in shortened:
        assert value.shape is not None
        value.shape = ir.Shape([*value.shape[:-2], ir.SymbolicDim(LOGITS.name), value.shape[-1]])
    for value, readers in borders.items():
        _cut(graph, value, readers, length)
    return graph, length


def _positions(value: ir.Value | None) -> Dim | None:
    """The length of the second last axis, where that is a dimension with a name."""
    if value is None or value.shape is None or len(value.shape) != 3:
        return None
    dim = value.shape[-2]
    return size(dim) if isinstance(dim, ir.SymbolicDim) and size(dim).is_Symbol else None


def _is_logits(graph: ir.Graph, value: ir.Value) -> bool:
    """Whether an output is, by elements, the product of a linear layer over the positions of token ids."""
    length = _positions(value)
    if length is None or value.uses() or value.dtype != ir.DataType.FLOAT or graph.outputs.count(value) > 1:
        return False
    batch = size(value.shape[0])  # type: ignore[index]
    ids = any(
        v.dtype in (ir.DataType.INT64, ir.DataType.INT32)
        and v.shape is not None
        and len(v.shape) == 2
        and equal(size(v.shape[0]), batch)
        and equal(size(v.shape[1]), length)
        for v in graph.inputs
    )
    node = value.producer()
    while ids and node is not None and not _is_linear(node):
        along = [v for v in node.inputs if v is not None and _positions(v) == length]
        if node.domain or node.op_type not in _BY_ELEMENT or len(along) != 1 or len(along[0].uses()) > 1:
            return False
        node = along[0].producer()
    return ids and node is not None


def _is_linear(node: ir.Node) -> bool:
    if node.domain == "ai.qgraph":
        return node.op_type.startswith("QLinear")
    weight = node.inputs[1] if not node.domain and node.op_type == "MatMul" else None
    return weight is not None and weight.const_value is not None and len(weight.shape or ()) == 2


def _is_rounding(node: ir.Node) -> bool:
    return node.domain == "ai.qgraph" and node.op_type.startswith("DynamicQDQ")


def _read_by_position(node: ir.Node, length: Dim) -> list[int] | None:
    """The inputs of `node` with an axis of positions, where position i of its output depends on nothing but
    position i of those; else None."""
    if _is_linear(node) or _is_rounding(node):
        along = [0]
    elif not node.domain and node.op_type in _BY_ROW:
        if node.attributes.get_int("axis", -1) not in (-1, 2):
            return None
        along = [0]
    elif not node.domain and node.op_type in _BY_ELEMENT:
        along = [i for i, v in enumerate(node.inputs) if _positions(v) == length]
        others = [v for i, v in enumerate(node.inputs) if v is not None and i not in along]
        if any(v.shape is None or (len(v.shape) > 1 and not is_one(size(v.shape[-2]))) for v in others):
            return None
    else:
        return None
    return along if along and all(_positions(node.inputs[i]) == length for i in along) else None


def _follow(
    graph: ir.Graph, outputs: list[ir.Value], length: Dim
) -> tuple[list[ir.Value], dict[ir.Value, list[tuple[ir.Node, int]]]]:
    """The values of which `outputs` need the last positions and nobody needs more; and those of which others
    need more, with the nodes and inputs that need the last."""
    wanted: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    shortened: list[ir.Value] = []
    whole = Counter(v for v in graph.outputs if v not in outputs)
    for node in reversed(graph):
        value = node.outputs[0]
        alone = value in outputs or (value in wanted and len(wanted[value]) == len(value.uses()))
        along = _read_by_position(node, length)
        if not alone or value in whole or along is None or any(v.uses() for v in node.outputs[1:]):
            continue
        shortened.append(value)
        wanted.pop(value, None)
        for i in along:
            source = node.inputs[i]
            assert source is not None
            wanted.setdefault(source, []).append((node, i))
    return shortened, wanted


def _cut(graph: ir.Graph, value: ir.Value, readers: list[tuple[ir.Node, int]], length: Dim) -> None:
    """The last positions of `value` for `readers`."""
    rounding = value.producer()
    if rounding is None or not _is_rounding(rounding):
        last = _last(graph, value, length)
    else:
        # Rounded once more, by itself: linear layers take the codes of a rounding, not its floats.
        x = rounding.inputs[0]
        assert x is not None
        again = ir.node(
            rounding.op_type,
            [_last(graph, x, length), *rounding.inputs[1:]],
            domain=rounding.domain,
            name=f"{rounding.name}/last",
        )
        last = again.outputs[0]
        assert value.shape is not None
        last.name, last.type = f"{value.name}/last", value.type
        last.shape = ir.Shape([value.shape[0], ir.SymbolicDim(LOGITS.name), value.shape[2]])
        graph.insert_after(rounding, again)
    for reader, index in readers:
        reader.replace_input_with(index, last)


def _last(graph: ir.Graph, value: ir.Value, length: Dim) -> ir.Value:
    """The last positions of `value`."""

    def integers(name: str, item: object) -> ir.Value:
        content = np.empty(1, object)
        content[0] = item
        made = ir.Value(
            name=f"{value.name}/{name}", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64)
        )
        made.meta[CONTENT] = content
        return made

    parts = [
        integers("starts", ir.SymbolicDim(length - LOGITS)),
        integers("ends", ir.SymbolicDim(length)),
        integers("axes", 1),
    ]
    node = ir.node("Slice", [value, *parts], name=f"{value.name}/last")
    last = node.outputs[0]
    last.name, last.type = f"{value.name}/last", value.type
    assert value.shape is not None
    last.shape = ir.Shape([value.shape[0], ir.SymbolicDim(LOGITS.name), value.shape[2]])
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, node)
    else:
        graph.insert_before(graph[0], node)
    return last
