"""ONNX Runtime with our kernels: every low-bit node has its packed weights and its code in one input.

The operators keep their names, `ai.qgraph::QLinearNVFP4(x, artifact) -> y`, and are those of
`libqgraph_ort.so` (runtime/ort); everything else is ONNX Runtime's own. An artifact is what `qgraph.codegen`
makes of the node alone, for any number of rows: a `.qg` file as an initializer, uint8 [bytes].
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qgraph import __version__
from qgraph.codegen import build_artifact
from qgraph.codegen.targets import parse_target
from qgraph.export import Context, require_cpu
from qgraph.passes.base import constant, is_op, replace_node, shape_of
from qgraph.passes.lowbit_functions import DOMAIN, lowbit_nodes, rounding_nodes
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
        packer.pack([*([source] if source in roundings else []), node, *_behind(node)])
    for node in roundings:
        if node.outputs[0].uses() or node.outputs[0].is_graph_output():
            packer.pack([node])
        else:
            model.graph.remove(node, safe=True)
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    RemoveUnused()(model)
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
        context = self.context
        built = build_artifact(
            _alone(chain, self.graph.opset_imports),
            target=self.target,
            packing=context.packing,
            compute=context.compute,
            metadata={"qgraph.version": __version__},
        )
        context.keep(node)
        packed = ir.node(
            node.op_type,
            [chain[0].inputs[0], self._artifact(str(node.name), built.to_bytes())],
            domain=DOMAIN,
            name=node.name,
            doc_string=node.doc_string,
        )
        replace_node(chain[-1], [packed])
        for behind in reversed(chain[chain.index(node) : -1]):
            self.graph.remove(behind, safe=True)

    def _artifact(self, node: str, data: bytes) -> ir.Value:
        key = hashlib.sha256(data).digest()
        if key not in self.made:
            value = ir.Value(
                name=f"{node}.artifact",
                type=ir.TensorType(ir.DataType.UINT8),
                shape=ir.Shape([len(data)]),
                const_value=ir.Tensor(np.frombuffer(data, np.uint8), name=f"{node}.artifact"),
            )
            self.graph.register_initializer(value)
            self.made[key] = value
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
        result = _rows(f"y{i}", node.outputs[0], kept=1)
        attributes = list(node.attributes.values())
        name = f"{node.op_type}{i}"  # not the layer's: equal layers are equal artifacts
        nodes.append(
            ir.Node(node.domain, node.op_type, [at, *parts], attributes, outputs=[result], name=name)
        )
        initializers += parts
        at = result
    graph = ir.Graph(
        [start], [at], nodes=nodes, initializers=initializers, name="layer", opset_imports=dict(opsets)
    )
    return ir.Model(graph, ir_version=11)


def _rows(name: str, like: ir.Value | None, kept: int) -> ir.Value:
    """A value with the last `kept` axes of another one behind one dim for all the rest."""
    assert like is not None and like.shape is not None
    tail = like.shape.dims[len(like.shape) - kept :]
    return ir.Value(name=name, type=like.type, shape=ir.Shape([ir.SymbolicDim(_ROWS), *tail]))
