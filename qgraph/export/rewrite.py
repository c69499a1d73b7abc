"""What emitters share: nodes in the place of a node, weights as they lie in the graph, layers left in
float."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from qgraph.passes.base import add_initializer, replace_node
from qgraph.passes.lowbit_functions import DOMAIN, InlineLowbitFunctions
from qgraph.passes.lowbit_weights import COLUMNS, LINEARS, LOOKUPS, from_node
from qgraph.passes.remove_unused import RemoveUnused


class Replacement:
    """Collects the nodes that take the place of `node`, and puts them there (`finish`).

    They are named `<node>/<part>`; the last one is named like the node, and has its output and metadata.
    """

    def __init__(self, node: ir.Node) -> None:
        assert isinstance(node.graph, ir.Graph)
        self.node, self.graph = node, node.graph
        self._nodes: list[ir.Node] = []

    def add(
        self, part: str, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: object
    ) -> ir.Value:
        """The first output of a new node; the value is named like the node."""
        name = f"{self.node.name}/{part}"
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain, name=name)  # type: ignore[arg-type]
        node.outputs[0].name = name
        self._nodes.append(node)
        return node.outputs[0]

    def add_two(
        self, part: str, op_type: str, *inputs: ir.Value, domain: str, **attributes: object
    ) -> list[ir.Value]:
        """Both outputs of a new node that has two."""
        name = f"{self.node.name}/{part}"
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain, name=name, num_outputs=2)  # type: ignore[arg-type]
        for i, value in enumerate(node.outputs):
            value.name = f"{name}_{i}"
        self._nodes.append(node)
        return list(node.outputs)

    def tensor(self, name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
        """A new initializer of this name, or one near it."""
        return add_initializer(self.graph, array, name)

    def ints(self, part: str, *values: int) -> ir.Value:
        """One of int64, `<node>/<part>`."""
        return self.tensor(f"{self.node.name}/{part}", np.array(values, np.int64))

    def number(self, part: str, value: float | np.float32) -> ir.Value:
        """A scalar of float32."""
        return self.tensor(f"{self.node.name}/{part}", np.array(value, np.float32))

    def behind(self, value: ir.Value) -> None:
        """Put the nodes so far right behind the producer of `value`, for other nodes to read, too."""
        producer = value.producer()
        if producer is not None:
            self.graph.insert_after(producer, self._nodes)
        else:
            self.graph.insert_before(self.graph[0], self._nodes)
        self._nodes = []

    def finish(self) -> None:
        """Put them in place."""
        *parts, last = self._nodes
        last.name = self.node.name
        replace_node(self.node, self._nodes)
        for part in parts:  # these describe the layer, and one node is the layer
            part.metadata_props.clear()


def weight_name(node: ir.Node) -> str:
    """The name of the weight that a low-bit node reads, as it was before quantization."""
    return str(input_of(node, 1).name).removesuffix(".codes")


def input_of(node: ir.Node, index: int) -> ir.Value:
    """An input that is there."""
    value = node.inputs[index]
    assert value is not None
    return value


def constant_shape(value: ir.Value) -> list[int]:
    """Of an initializer."""
    assert value.const_value is not None
    return [int(dim) for dim in value.const_value.shape.numpy()]


def rank(value: ir.Value) -> int:
    """The number of dims of a value of a prepared graph, which is known."""
    assert value.shape is not None
    return len(value.shape)


def width(value: ir.Value) -> int:
    """The last dim of the input of a linear layer, which is a number."""
    assert value.shape is not None
    K = value.shape[-1]
    assert isinstance(K, int)
    return K


def to_float(node: ir.Node, tables: dict[ir.Value, ir.Value]) -> None:
    """Writes a linear layer or lookup as the float operator, on its dequantized weight; `tables` holds
    those that were dequantized before."""
    new = Replacement(node)
    codes = input_of(node, 1)
    if codes not in tables:
        W = from_node(node).dequantize()
        tables[codes] = new.tensor(f"{weight_name(node)}.float", W.T.copy() if node.op_type in LOOKUPS else W)
    if node.op_type in LINEARS:
        new.add("y", "MatMul", node.inputs[0], tables[codes])
    else:
        new.add("y", "Gather", tables[codes], node.inputs[0], axis=int(node.op_type in COLUMNS))
    new.finish()


def finish(model: ir.Model, domains: Mapping[str, int]) -> ir.Model:
    """Low-bit nodes that are left (roundings) written out, nothing unused, the domains in use declared."""
    InlineLowbitFunctions()(model)
    model.graph.opset_imports.update(domains)
    RemoveUnused()(model)
    NameFixPass()(model)  # names of new values may be taken
    assert not any(node.domain == DOMAIN for node in model.graph.all_nodes())
    return model
