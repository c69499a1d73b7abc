"""A tiny Llama with random weights, as an exporter would write it: with a cache, without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCABULARY, HEADS, KV_HEADS, WIDTH, INNER, POSITIONS = 61, 4, 2, 32, 96, 128
HIDDEN = HEADS * WIDTH


class _Graph:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def const(self, name: str, value: np.ndarray) -> str:
        if name not in {tensor.name for tensor in self.initializers}:
            self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def ints(self, *values: int) -> str:
        return self.const(f"ints{list(values)}", np.array(values, np.int64))

    def op(self, op_type: str, *inputs: str, name: str, outputs: int = 1, **attributes: object) -> str:
        names = [f"{name}_out"] + [f"{name}_out{i}" for i in range(1, outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name, **attributes))
        return names[0]

    def linear(self, x: str, name: str, K: int, N: int) -> str:
        weight = (self.rng.standard_normal((K, N)) / np.sqrt(K)).astype(np.float32)
        return self.op("MatMul", x, self.const(f"{name}.weight", weight), name=name)

    def norm(self, x: str, name: str) -> str:
        scale = self.const(f"{name}.weight", (1 + 0.1 * self.rng.standard_normal(HIDDEN)).astype(np.float32))
        return self.op("RMSNormalization", x, scale, name=name, axis=-1, epsilon=1e-5)


def tiny_decoder(
    *, cache: bool, mask: bool = True, positions: bool = True, layers: int = 2, seed: int = 0
) -> onnx.ModelProto:
    """input_ids (attention_mask, position_ids, past_key_values.N.*) -> logits (present.N.*). Opset 23.

    The same weights with and without a cache. Grouped queries: 4 heads of them, 2 of keys and values.
    """
    g = _Graph(seed)
    past = (
        [f"past_key_values.{i}.{part}" for i in range(layers) for part in ("key", "value")] if cache else []
    )
    table = g.const("embed.weight", g.rng.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32))
    x = g.op("Gather", table, "input_ids", name="embed")
    length = g.op("Shape", "input_ids", name="length", start=1, end=2)  # [1]
    total = length
    if cache:
        held = g.op("Shape", past[0], name="held", start=2, end=3)
        total = g.op("Add", held, length, name="total")
    where = "position_ids"
    if not positions:
        begin = g.op("Squeeze", g.op("Sub", total, length, name="begin"), name="begin0")
        end = g.op("Squeeze", total, name="end0")
        where = g.op("Range", begin, end, g.const("one", np.int64(1)), name="range")
        where = g.op("Unsqueeze", where, g.ints(0), name="range2")
        batch = g.op("Shape", "input_ids", name="batch", start=0, end=1)
        where = g.op("Expand", where, g.op("Concat", batch, g.ints(1), name="rows", axis=0), name="positions")
    angles = np.outer(np.arange(POSITIONS), 100.0 ** -(np.arange(WIDTH // 2) * 2 / WIDTH))
    cos, sin = (
        g.op("Gather", g.const(name, f(angles).astype(np.float32)), where, name=f"{name}_at")
        for name, f in (("cos", np.cos), ("sin", np.sin))
    )
    keep = ""
    if mask:  # [batch, total] -> bool [batch, 1, sequence, total]
        keep = g.op("Cast", "attention_mask", name="mask/cast", to=TensorProto.BOOL)
        keep = g.op("Unsqueeze", keep, g.ints(1, 2), name="mask/unsqueeze")
        shape = g.op("Concat", g.ints(1, 1), length, g.ints(1), name="mask/shape", axis=0)
        keep = g.op("Expand", keep, shape, name="mask/expand")
    outputs = []
    for i in range(layers):
        p = f"layer.{i}"
        h = g.norm(x, f"{p}.norm1")
        heads = []
        for part, count in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            y = g.linear(h, f"{p}.{part}", HIDDEN, count * WIDTH)
            y = g.op("Reshape", y, g.ints(0, 0, count, WIDTH), name=f"{p}.{part}/split")
            y = g.op("Transpose", y, name=f"{p}.{part}/heads", perm=[0, 2, 1, 3])
            if part != "v":
                y = g.op("RotaryEmbedding", y, cos, sin, name=f"{p}.{part}/rotary")
            heads.append(y)
        if cache:
            y = g.op(
                "Attention",
                *heads,
                keep,
                *past[2 * i : 2 * i + 2],
                name=f"{p}.attention",
                outputs=3,
                is_causal=1,
            )
            for j, part in enumerate(("key", "value"), 1):
                g.nodes[-1].output[j] = f"present.{i}.{part}"
                outputs.append(f"present.{i}.{part}")
        else:
            y = g.op("Attention", *heads, *filter(None, [keep]), name=f"{p}.attention", is_causal=1)
        y = g.op("Transpose", y, name=f"{p}.merge/tokens", perm=[0, 2, 1, 3])
        y = g.op("Reshape", y, g.ints(0, 0, HIDDEN), name=f"{p}.merge")
        x = g.op("Add", x, g.linear(y, f"{p}.o", HIDDEN, HIDDEN), name=f"{p}.add1")
        h = g.norm(x, f"{p}.norm2")
        up = g.op("Gelu", g.linear(h, f"{p}.up", HIDDEN, INNER), name=f"{p}.gelu")
        x = g.op("Add", x, g.linear(up, f"{p}.down", INNER, HIDDEN), name=f"{p}.add2")
    g.linear(g.norm(x, "norm"), "lm_head", HIDDEN, VOCABULARY)
    g.nodes[-1].output[0] = "logits"
    inputs = [("input_ids", "sequence")]
    inputs += [("attention_mask", "total_sequence" if cache else "sequence")] if mask else []
    inputs += [("position_ids", "sequence")] if positions else []
    cached = ["batch", KV_HEADS, "past", WIDTH]
    graph = helper.make_graph(
        g.nodes,
        "tiny_decoder",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", dim]) for name, dim in inputs]
        + [helper.make_tensor_value_info(name, TensorProto.FLOAT, cached) for name in past],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", VOCABULARY])]
        + [
            helper.make_tensor_value_info(
                name, TensorProto.FLOAT, ["batch", KV_HEADS, "total_sequence", WIDTH]
            )
            for name in outputs
        ],
        g.initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def save_decoder(path: Path, *, cache: bool, **options: object) -> Path:
    """Write the tiny decoder to `path`."""
    onnx.save(tiny_decoder(cache=cache, **options), path)  # type: ignore[arg-type]
    return path


def build_decoders(folder: Path) -> Path:
    """`cache0` and `cache1`, the same decoder without a cache and with one: the float model (.onnx) and its
    artifact (.qg)."""
    import qgraph

    for cache in (False, True):
        qgraph.build(save_decoder(folder / f"cache{int(cache)}.onnx", cache=cache), verify=False)
    return folder
