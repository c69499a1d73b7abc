"""ONNX Runtime with our kernels: every low-bit node has its packed weights and its code in one input.

The operators keep their names, `ai.qgraph::QLinearNVFP4(x, artifact) -> y`, and are those of
`libqgraph_ort.so` (runtime/ort); everything else is ONNX Runtime's own. An artifact is what `qgraph.codegen`
makes of the node alone, for any number of rows: a `.qg` file as an initializer, uint8 [bytes]. Columns that a
lookup picks come as rows, [*ids, K], and are turned by an operator of ONNX Runtime's where somebody wants
them as columns.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from qgraph import __version__
from qgraph.codegen import build_artifact
from qgraph.codegen.targets import parse_target
from qgraph.export import Context, require_cpu
from qgraph.passes.base import add_initializer, constant, is_op, replace_node, shape_of
from qgraph.passes.lowbit_functions import DOMAIN, drop_definitions, lowbit_nodes, rounding_nodes
from qgraph.passes.lowbit_weights import COLUMNS
from qgraph.passes.remove_unused import RemoveUnused

if TYPE_CHECKING:
    from qgraph.evaluate.runners import Runner

_ROWS = "rows"  # the dim of an artifact's input and output that is not fixed


def export(model: ir.Model, context: Context) -> ir.Model:
    """Replace every low-bit node by its packed form. Changes `model`.

    A rounding of activations becomes a part of each product that reads it, which goes on in integers; it is a
    node of its own only for others that read it.

    Raises UsageError as `qgraph.export.require_cpu`.
    """
    require_cpu("ort", context.target)
    roundings = set(rounding_nodes(model))
    layers = [node for node in lowbit_nodes(model) if node not in roundings]
    packer = _Packer(model.graph, context, parse_target(context.target).cpu)
    for done, node in enumerate(layers):
        context.on_node(done, len(layers), str(node.name))
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        if node.op_type in COLUMNS:
            packer.pack_columns(node)
        else:
            packer.pack([*([source] if source in roundings else []), node, *_behind(node)])
    for node in roundings:
        if node.outputs[0].uses() or node.outputs[0].is_graph_output():
            packer.pack([node])
        else:
            model.graph.remove(node, safe=True)
    drop_definitions(model)
    RemoveUnused()(model)
    NameFixPass()(model)  # outputs of nodes may have the names of artifacts
    return model


def _behind(node: ir.Node) -> list[ir.Node]:
    """The bias and the activation of a layer, which its kernel computes with it."""
    found: list[ir.Node] = []
    value = node.outputs[0]
    for wanted in ("Add", "Gelu"):
        uses = value.uses()
        if len(uses) != 1 or value.is_graph_output():
            break
        reader = next(iter(uses)).node
        if not is_op(reader, wanted) or reader.graph is not node.graph:
            continue
        if wanted == "Add" and not (reader.inputs[0] is value and _is_bias(reader.inputs[1])):
            continue
        found.append(reader)
        value = reader.outputs[0]
    return found


def _is_bias(value: ir.Value | None) -> bool:
    return constant(value) is not None and len(shape_of(value) or ()) == 1


def open_runner(path: Path, threads: int) -> Runner:
    """The file in ONNX Runtime, with our library."""
    from qgraph.evaluate.runners import OnnxRuntimeRunner

    return OnnxRuntimeRunner(path, threads=threads, kernels=True)


class _Packer:
    """Replaces nodes of a graph. Equal artifacts are one initializer."""

    def __init__(self, graph: ir.Graph, context: Context, target: str) -> None:
        self.graph, self.context, self.target = graph, context, target
        self.made: dict[bytes, ir.Value] = {}

    def pack(self, chain: list[ir.Node]) -> None:
        """One node in place of a chain: the low-bit one's, that of a rounding where there is no other."""
        node = next(n for n in reversed(chain) if n.domain == DOMAIN)
        replace_node(chain[-1], [self._packed(node, chain)])
        for behind in reversed(chain[chain.index(node) : -1]):
            self.graph.remove(behind, safe=True)

    def pack_columns(self, node: ir.Node) -> None:
        """A lookup of columns [K, *ids]: readers that turn them read the rows [*ids, K] instead."""
        columns = node.outputs[0]
        assert columns.shape is not None
        K, *ids = columns.shape.dims
        axes = list(range(len(ids) + 1))
        packed = self._packed(node, [node])
        if not ids:
            replace_node(node, [packed])
            return
        rows = packed.outputs[0]
        rows.name, rows.type, rows.shape = f"{node.name}/rows", columns.type, ir.Shape([*ids, K])
        turn = ir.node("Transpose", [rows], attributes={"perm": [axes[-1], *axes[:-1]]})
        turn.name = f"{node.name}/columns"
        replace_node(node, [packed, turn])
        for reader in [use.node for use in turn.outputs[0].uses()]:
            back = is_op(reader, "Transpose") and reader.attributes.get_ints("perm", ()) == (*axes[1:], 0)
            if back and not reader.outputs[0].is_graph_output():
                reader.outputs[0].replace_all_uses_with(rows)
                self.graph.remove(reader, safe=True)

    def _packed(self, node: ir.Node, chain: list[ir.Node]) -> ir.Node:
        """A new node that computes a chain, of which `node` is the one that it is named like."""
        context = self.context
        built = build_artifact(
            _alone(chain, self.graph.opset_imports),
            target=self.target,
            packing=context.packing,
            compute=context.compute,
            part=True,
            metadata={"qgraph.version": __version__},
        )
        context.keep(node)
        return ir.node(
            node.op_type,
            [chain[0].inputs[0], self._artifact(str(node.name), built.to_bytes())],
            domain=DOMAIN,
            name=node.name,
            doc_string=node.doc_string,
        )

    def _artifact(self, node: str, data: bytes) -> ir.Value:
        key = hashlib.sha256(data).digest()
        if key not in self.made:
            self.made[key] = add_initializer(self.graph, np.frombuffer(data, np.uint8), f"{node}.artifact")
        return self.made[key]


def _alone(chain: list[ir.Node], opsets: dict[str, int]) -> ir.Model:
    """A model of nodes that follow one another, on rows."""
    at = start = _rows("x", chain[0].inputs[0], kept=0 if "Gather" in chain[0].op_type else 1)
    nodes, initializers = [], []
    for i, node in enumerate(chain):
        parts = [
            ir.Value(name=part.name, type=part.type, shape=part.shape, const_value=part.const_value)
            for part in node.inputs[1:]
            if part is not None
        ]
        columns = node.op_type in COLUMNS
        result = _columns("y", node.outputs[0]) if columns else _rows(f"y{i}", node.outputs[0], kept=1)
        attributes = list(node.attributes.values())
        name = f"{node.op_type}{i}"  # not the layer's: equal layers are equal artifacts
        nodes.append(
            ir.Node(node.domain, node.op_type, [at, *parts], attributes, outputs=[result], name=name)
        )
        initializers += parts
        at = result
        if columns:
            assert result.shape is not None
            at = ir.Value(name="rows", type=result.type, shape=ir.Shape(list(reversed(result.shape.dims))))
            turn = ir.node("Transpose", [result], attributes={"perm": [1, 0]}, outputs=[at], name="turn")
            nodes.append(turn)
    graph = ir.Graph(
        [start], [at], nodes=nodes, initializers=initializers, name="layer", opset_imports=dict(opsets)
    )
    return ir.Model(graph, ir_version=11)


def _columns(name: str, like: ir.Value) -> ir.Value:
    """A value with the first axis of another one before one dim for all the rest."""
    assert like.shape is not None
    return ir.Value(name=name, type=like.type, shape=ir.Shape([like.shape[0], ir.SymbolicDim(_ROWS)]))


def _rows(name: str, like: ir.Value | None, kept: int) -> ir.Value:
    """A value with the last `kept` axes of another one behind one dim for all the rest."""
    assert like is not None and like.shape is not None
    tail = like.shape.dims[len(like.shape) - kept :]
    return ir.Value(name=name, type=like.type, shape=ir.Shape([ir.SymbolicDim(_ROWS), *tail]))
