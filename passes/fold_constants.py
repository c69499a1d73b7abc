"""Computes at compile time what does not depend on the inputs' data."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qgraph.passes.base import GraphPass, add_initializer, printable
from qgraph.passes.infer_shapes import CONTENT

SMALL = 1 << 20  # bytes a folded tensor may always have
BUDGET = 64 << 20  # bytes that all folded tensors of a model may add to what it has

_LEFT = "qgraph.fold_bytes_left"  # in graph.meta: the budget is for all runs of the pass together

# Not functions of their inputs, or (quantized weights) larger and less useful when computed.
_KEPT = frozenset(
    [
        "Bernoulli",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Multinomial",
        "Dropout",
        "DequantizeLinear",
        "QuantizeLinear",
        "If",
        "Loop",
        "Scan",
    ]
)


class FoldConstants(GraphPass):
    """Replaces values that are known by initializers. Runs on inferred shapes.

    Rules:
    1. A small integer tensor whose elements shape inference knows as plain numbers becomes a constant.
    2. A node of constants is computed by the ONNX reference evaluator, if its result is no larger than
       `SMALL` or than twice its inputs, and all results together stay within `BUDGET` plus what the model
       holds already.
    3. Transpose of a constant matrix stays: `orient_weights` decides on weights.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        if _LEFT not in graph.meta:
            graph.meta[_LEFT] = BUDGET + sum(
                v.const_value.nbytes for v in graph.initializers.values() if v.const_value is not None
            )
        modified = False
        for node in tuple(graph):
            if any(v.is_graph_output() for v in node.outputs):
                continue
            arrays = self._known(node) or self._computed(graph, node)
            if arrays is None:
                continue
            for value, array in zip(node.outputs, arrays, strict=True):
                if value.uses():
                    name, value.name = value.name, None
                    value.replace_all_uses_with(add_initializer(graph, array, name or "folded"))
            graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)

    @staticmethod
    def _known(node: ir.Node) -> list[np.ndarray] | None:
        arrays = []
        for value in node.outputs:
            content = value.meta.get(CONTENT)
            if content is None or value.dtype is None or not all(type(v) is int for v in content.reshape(-1)):
                return None
            arrays.append(content.astype(value.dtype.numpy()))
        return arrays or None

    def _computed(self, graph: ir.Graph, node: ir.Node) -> list[np.ndarray] | None:
        if node.domain != "" or node.op_type in _KEPT or not node.outputs:
            return None
        inputs = [_tensor(v) for v in node.inputs if v is not None]
        tensors = [t for t in inputs if t is not None]
        if len(tensors) < len(inputs):
            return None
        if node.op_type == "Transpose" and tensors[0].size > 1 and len(tensors[0].shape) == 2:
            return None
        sizes = [_bytes(v) for v in node.outputs]
        if any(size is None for size in sizes):
            return None
        total = sum(size for size in sizes if size is not None)
        given = sum(t.nbytes for t in tensors)
        if total > max(SMALL, 2 * given) or total > graph.meta[_LEFT]:
            self.refuse(node, f"its constant result has {total} bytes, too many to store")
            return None
        try:
            arrays = _evaluate(node, graph.opset_imports[""])
        except Exception as error:  # the reference evaluator raises what numpy raises
            self.refuse(node, f"it could not be computed ahead: {printable(error)}")
            return None
        for value, array in zip(node.outputs, arrays, strict=True):
            if value.shape is None or value.shape.dims != array.shape or value.dtype is None:
                self.refuse(node, f"its computed shape {array.shape} is not the inferred one")
                return None
            if ir.DataType.from_numpy(array.dtype) != value.dtype:
                self.refuse(node, f"its computed type {array.dtype} is not the inferred one")
                return None
        graph.meta[_LEFT] -= total
        return arrays


def _tensor(value: ir.Value) -> ir.TensorProtocol | None:
    return None if value.is_graph_input() else value.const_value


def _bytes(value: ir.Value) -> int | None:
    if value.shape is None or value.dtype is None or not value.shape.is_static():
        return None
    return math.ceil(math.prod(value.shape.numpy()) * value.dtype.bitwidth / 8)


def _evaluate(node: ir.Node, opset: int) -> list[np.ndarray]:
    """Runs one node of constants with onnx.reference."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    proto = ir.to_proto(node)
    present = [i for i, v in enumerate(node.inputs) if v is not None]
    for i in present:
        proto.input[i] = f"input{i}"
    for i in range(len(node.outputs)):
        proto.output[i] = f"output{i}"
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [proto],
        "node",
        [info(proto.input[i], int(_held(node, i).dtype), None) for i in present],
        [info(f"output{i}", int(v.dtype or 1), None) for i, v in enumerate(node.outputs)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    feeds = {proto.input[i]: _held(node, i).numpy() for i in present}
    return [np.asarray(a) for a in ReferenceEvaluator(model).run(None, feeds)]


def _held(node: ir.Node, index: int) -> ir.TensorProtocol:
    value = node.inputs[index]
    assert value is not None and value.const_value is not None
    return value.const_value
