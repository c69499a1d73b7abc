"""A chain of linear layers as ONNX: y = (x W0)[:, :K] W1 ... , each weight [K, N] its own, N >= K.

The layers of a chain differ in nothing but the bytes of their weights, so a pass over the chain takes as many
times what one layer takes when its weights are cold, without a pause between layers in which threads fall
asleep, and with Python's share counted once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

X, Y = "x", "y"
ROWS = "rows"
SHIFT = 4099  # bytes that the weights of a layer are turned by against those of the one before


def one_layer(K: int, N: int, path: Path) -> Path:
    """A float model of one MatMul, [rows, K] to [rows, N], with seeded normal weights that keep lengths."""
    import onnx
    from onnx import helper, numpy_helper

    weight = np.random.default_rng(0).standard_normal((K, N), dtype=np.float32) / np.float32(K**0.5)
    node = helper.make_node("MatMul", [X, "W"], [Y], name="layer")
    onnx.save(_model([node], [numpy_helper.from_array(weight, "W")], K, N), path)
    return path


def chain(layer: Path, layers: int, path: Path) -> Path:
    """The model of one layer, float or quantized, `layers` times in a row, written to `path`.

    Each copy has weights of its own: those of the first, their bytes turned around. So they are valid codes
    and scales whatever the format is. Raises ValueError for more layers than there are turns.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(layer)
    graph = model.graph
    K, N = (value.type.tensor_type.shape.dim[1].dim_value for value in (graph.input[0], graph.output[0]))
    nodes, weights = list(graph.node), list(graph.initializer)
    turns = min(len(tensor.raw_data) for tensor in weights if len(tensor.raw_data) > 8) // 8
    if layers > turns:
        raise ValueError(f"weights of {K}x{N} have {turns} turns: too few for {layers} layers")
    del graph.node[:]
    del graph.initializer[:]
    bounds = {"from": 0, "to": K, "axis": 1}
    graph.initializer.extend(numpy_helper.from_array(np.array([v], np.int64), n) for n, v in bounds.items())
    value = X
    for i in range(layers):
        if i and N > K:
            graph.node.append(helper.make_node("Slice", [value, *bounds], [f"{i}/{X}"], name=f"{i}/slice"))
            value = f"{i}/{X}"
        inner = {X: value, Y: Y if i == layers - 1 else f"{i}/{Y}"}
        for node in nodes:
            copy = graph.node.add()
            copy.CopyFrom(node)
            copy.name = f"{i}/{node.name}"
            for names in (copy.input, copy.output):
                names[:] = [inner.get(name, f"{i}/{name}") if name else "" for name in names]
        for tensor in weights:
            copy = graph.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = f"{i}/{tensor.name}"
            copy.raw_data = _turned(tensor.raw_data, i * SHIFT)
        value = inner[Y]
    onnx.save(model, path)
    return path


def _turned(data: bytes, by: int) -> bytes:
    """Turned by a multiple of 8, so that elements stay whole; numbers that stand alone stay as they are."""
    if len(data) <= 8:
        return data
    by = 8 * by % len(data)
    return data[by:] + data[:by]


def bits_chain(K: int, N: int, layers: int, *, bits: int, block: int, accuracy: int) -> bytes:
    """A chain of ONNX Runtime's MatMulNBits with random weights: `bits` in blocks of `block`, a float32 scale
    each, symmetric; `accuracy` 1 computes in float32, 4 with activations rounded to int8."""
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    blocks = -(-K // block)
    nodes, weights = [], []
    settings = {"K": K, "N": N, "bits": bits, "block_size": block, "accuracy_level": accuracy}
    value = X
    for i in range(layers):
        if i and N > K:
            nodes.append(helper.make_node("Slice", [value, "from", "to", "axis"], [f"{i}/{X}"]))
            value = f"{i}/{X}"
        codes = rng.integers(0, 256, (N, blocks, block * bits // 8), np.uint8)
        # As large as it takes for layers to keep the lengths of their inputs.
        scales = (rng.random((N, blocks), np.float32) + 0.5) * np.float32(4 / 2**bits / K**0.5)
        named = {f"{i}/codes": codes, f"{i}/scales": scales.reshape(-1)}
        weights += [numpy_helper.from_array(array, name) for name, array in named.items()]
        output = Y if i == layers - 1 else f"{i}/{Y}"
        nodes.append(
            helper.make_node("MatMulNBits", [value, *named], [output], domain="com.microsoft", **settings)
        )
        value = output
    bounds = {"from": 0, "to": K, "axis": 1}
    weights += [numpy_helper.from_array(np.array([v], np.int64), name) for name, v in bounds.items()]
    return _model(nodes, weights, K, N).SerializeToString()


def _model(nodes: list[Any], weights: list[Any], K: int, N: int) -> Any:
    from onnx import TensorProto, helper

    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [ROWS, size])
        for name, size in ((X, K), (Y, N))
    ]
    graph = helper.make_graph(nodes, "chain", ports[:1], ports[1:], weights)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)
