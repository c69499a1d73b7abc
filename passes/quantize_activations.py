"""Gives the inputs of linear layers the nodes that round them to low precision."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qgraph.errors import InputError
from qgraph.formats import nvfp4
from qgraph.passes.base import add_initializer, describe
from qgraph.passes.lowbit_functions import DOMAIN, ROUNDINGS


def quantize_input(value: ir.Value, activation_format: str, amax: float | None) -> ir.Value:
    """The value that a layer which reads `value` is to read instead: `value` rounded at run time.

    The node stands right behind the producer of `value` (an input of the graph: before all nodes) and is
    shared: asked again for the same value, format and scale, this gives the same one. It and its output are
    named `<value>/<activation_format>`, its global scale `<value>.act_scale`. `AddLowbitFunctions` adds the
    definition.

    Args:
        value: float32, of a graph at opset 23 or later.
        activation_format: `nvfp4` (blocks of 16 along the last axis) or `int8` (rows of the last axis).
        amax: the largest magnitude seen in calibration, which `nvfp4` needs; `int8` does not look at it.

    Raises InputError for a value that is not float32, and for an `amax` that is not finite or negative.
    """
    if value.dtype != ir.DataType.FLOAT:
        raise InputError(f"{describe(value)} is {value.dtype}; only float32 activations can be quantized")
    op_type = ROUNDINGS[activation_format]
    scale = None
    if activation_format == "nvfp4":
        if amax is None or not 0 <= amax < math.inf:
            raise InputError(
                f"{describe(value)}: NVFP4 activations need the largest magnitude seen in calibration, a "
                f"finite number, not {amax}"
            )
        scale = nvfp4.global_scale(float(amax))
    graph = value.graph
    assert isinstance(graph, ir.Graph)
    for node in value.consumers():
        if (node.domain, node.op_type) == (DOMAIN, op_type) and _scale_of(node) == scale:
            return node.outputs[0]
    inputs = [value]
    if scale is not None:
        inputs.append(add_initializer(graph, np.array(scale, np.float32), f"{value.name}.act_scale"))
    name = _free_name(graph, f"{value.name}/{activation_format}")
    node = ir.node(op_type, inputs, domain=DOMAIN, name=name)
    node.metadata_props["qgraph.activations"] = activation_format  # stays when the body is written out
    rounded = node.outputs[0]
    rounded.name, rounded.type, rounded.shape = name, ir.TensorType(ir.DataType.FLOAT), value.shape
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, node)
    elif len(graph):
        graph.insert_before(graph[0], node)
    else:
        graph.append(node)
    return rounded


def _scale_of(node: ir.Node) -> np.float32 | None:
    """The constant global scale of a rounding node, None where it has none."""
    scale = node.inputs[1] if len(node.inputs) > 1 else None
    if scale is None or scale.const_value is None:
        return None
    return np.float32(scale.const_value.numpy().reshape(()))


def _free_name(graph: ir.Graph, wanted: str) -> str:
    """`wanted`, or `wanted_2`, ... : the name of no node or value of `graph`."""
    taken = {value.name for node in graph for value in node.outputs} | {node.name for node in graph}
    taken |= {value.name for value in graph.inputs} | set(graph.initializers)
    name, count = wanted, 2
    while name in taken:
        name, count = f"{wanted}_{count}", count + 1
    return name
