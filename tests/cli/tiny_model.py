"""A two-layer transformer of a few ten thousand weights, as an exporter would write it: for tests of the
whole chain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCABULARY, HIDDEN, INNER = 97, 64, 128


class _Graph:
    """Nodes and initializers, named in order."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def const(self, name: str, value: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def op(self, op_type: str, inputs: list[str], name: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [f"{name}_out"], name, **attributes))
        return f"{name}_out"

    def linear(self, x: str, name: str, K: int, N: int) -> str:
        weight = (self.rng.standard_normal((K, N)) / np.sqrt(K)).astype(np.float32)
        product = self.op("MatMul", [x, self.const(f"{name}.weight", weight)], name)
        bias = self.const(f"{name}.bias", (0.1 * self.rng.standard_normal(N)).astype(np.float32))
        return self.op("Add", [product, bias], f"{name}/bias")

    def norm(self, x: str, name: str) -> str:
        scale = self.const(f"{name}.weight", np.ones(HIDDEN, np.float32))
        bias = self.const(f"{name}.bias", np.zeros(HIDDEN, np.float32))
        return self.op("LayerNormalization", [x, scale, bias], name, axis=-1, epsilon=1e-5)


def tiny_transformer(layers: int = 2, seed: int = 0) -> onnx.ModelProto:
    """input_ids, attention_mask int64 [batch, sequence] -> hidden float32 [batch, sequence, 64]. Opset 20."""
    g = _Graph(seed)
    table = g.const("embedding.weight", g.rng.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32))
    x = g.norm(g.op("Gather", [table, "input_ids"], "embedding", axis=0), "norm")
    # 1 keeps, 0 hides: (1 - mask) * -1e4, [batch, 1, sequence]
    mask = g.op("Unsqueeze", ["attention_mask", g.const("axes", np.array([1], np.int64))], "mask/unsqueeze")
    mask = g.op("Cast", [mask], "mask/cast", to=TensorProto.FLOAT)
    mask = g.op("Sub", [g.const("one", np.float32(1)), mask], "mask/sub")
    mask = g.op("Mul", [mask, g.const("hide", np.float32(-1e4))], "mask/mul")
    scale = g.const("scale", np.float32(HIDDEN**-0.5))
    for i in range(layers):
        p = f"layer.{i}"
        q, k, v = (g.linear(x, f"{p}.{part}", HIDDEN, HIDDEN) for part in ("query", "key", "value"))
        scores = g.op("MatMul", [q, g.op("Transpose", [k], f"{p}/transpose", perm=[0, 2, 1])], f"{p}/scores")
        scores = g.op("Add", [g.op("Mul", [scores, scale], f"{p}/scale"), mask], f"{p}/mask")
        mixed = g.op("MatMul", [g.op("Softmax", [scores], f"{p}/softmax", axis=-1), v], f"{p}/mix")
        x = g.norm(g.op("Add", [x, g.linear(mixed, f"{p}.out", HIDDEN, HIDDEN)], f"{p}/add1"), f"{p}.norm1")
        inner = g.op("Gelu", [g.linear(x, f"{p}.up", HIDDEN, INNER)], f"{p}/gelu")
        x = g.norm(g.op("Add", [x, g.linear(inner, f"{p}.down", INNER, HIDDEN)], f"{p}/add2"), f"{p}.norm2")
    g.nodes[-1].output[0] = "hidden"
    graph = helper.make_graph(
        g.nodes,
        "tiny",
        [
            helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "sequence"])
            for n in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "sequence", HIDDEN])],
        g.initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def save_tiny(path: Path, **options: int) -> Path:
    """Write the tiny transformer to `path`."""
    onnx.save(tiny_transformer(**options), path)
    return path
