"""One block of a decoder with grouped heads, in several spellings: what transforms of channels are tested
on."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from prepare_harness import parse, run_ort

from qgraph.passes import prepare_model
from qgraph.passes.channel_sources import chosen_matmuls
from qgraph.passes.select_layers import SelectLayers

HIDDEN, HEADS, KV_HEADS, HEAD, FFN = 64, 4, 2, 32, 96

# [batch, heads, sequence, HEAD] or, with 3-D, [batch, sequence, heads * HEAD] -> o_in [batch, sequence, ..]
ATTENTION = {
    "attention-4d": """
        q4 = Reshape(q, heads)  k4 = Reshape(k, kv_heads)  v4 = Reshape(v, kv_heads)
        qt = Transpose<perm = [0, 2, 1, 3]>(q4)  kt = Transpose<perm = [0, 2, 1, 3]>(k4)
        vt = Transpose<perm = [0, 2, 1, 3]>(v4)
        a = Attention<is_causal = 1>(qt, kt, vt)
        at = Transpose<perm = [0, 2, 1, 3]>(a)
        o_in = Reshape(at, merged)""",
    "attention-3d": """
        o_in = Attention<q_num_heads = 4, kv_num_heads = 2, is_causal = 1>(q, k, v)""",
    "softmax": """
        q4 = Reshape(q, heads)  k4 = Reshape(k, kv_heads)  v4 = Reshape(v, kv_heads)
        qt = Transpose<perm = [0, 2, 1, 3]>(q4)  kt = Transpose<perm = [0, 2, 3, 1]>(k4)
        vt = Transpose<perm = [0, 2, 1, 3]>(v4)
        k5 = Unsqueeze(kt, two)  v5 = Unsqueeze(vt, two)
        kx = Expand(k5, repeat)  vx = Expand(v5, repeat)
        kr = Reshape(kx, keys)  vr = Reshape(vx, values)
        scores = MatMul(qt, kr)
        scaled = Mul(scores, factor)
        p = Softmax(scaled)
        a = MatMul(p, vr)
        at = Transpose<perm = [0, 2, 1, 3]>(a)
        o_in = Reshape(at, merged)""",
}

_QKV = """
        q = MatMul(h1, wq)  k = MatMul(h1, wk)
        v0 = MatMul(h1, wv)  v = Add(v0, bv)"""
_FUSED = """
        qkv = MatMul(h1, wqkv)
        q, k, v0 = Split<axis = -1>(qkv, parts)
        v = Add(v0, bv)"""


def block(attention: str = "attention-4d", fused: bool = False, sizes: str = "batch, sequence") -> ir.Model:
    """x -> RMSNorm -> attention -> + x -> LayerNorm -> gated MLP -> + : prepared, all layers chosen."""
    text = f"""(float[{sizes}, {HIDDEN}] x) => (float[{sizes}, {HIDDEN}] y) {{
        h1 = RMSNormalization<axis = -1, epsilon = 0.00001>(x, scale1)
        {_FUSED if fused else _QKV}
        {ATTENTION[attention]}
        o = MatMul(o_in, wo)
        r = Add(x, o)
        h2 = LayerNormalization<axis = -1>(r, scale2, bias2)
        g = MatMul(h2, wg)  u0 = MatMul(h2, wu)  u = Add(u0, bu)
        sg = Sigmoid(g)  silu = Mul(g, sg)
        d_in = Mul(silu, u)
        d = MatMul(d_in, wd)
        y = Add(r, d)
    }}"""
    q, kv = HEADS * HEAD, KV_HEADS * HEAD
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * rng.uniform(0.1, 2, shape[-1])).astype(np.float32)

    floats = {
        "scale1": normal(HIDDEN),
        "wq": normal(HIDDEN, q) / 8,
        "wk": normal(HIDDEN, kv) / 8,
        "wv": normal(HIDDEN, kv) / 8,
        "bv": normal(kv),
        "wo": normal(q, HIDDEN) / 8,
        "scale2": normal(HIDDEN),
        "bias2": normal(HIDDEN),
        "wg": normal(HIDDEN, FFN) / 8,
        "wu": normal(HIDDEN, FFN) / 8,
        "bu": normal(FFN),
        "wd": normal(FFN, HIDDEN) / 8,
        "factor": np.array(HEAD**-0.5, np.float32),
    }
    floats["wqkv"] = np.concatenate([floats["wq"], floats["wk"], floats["wv"]], axis=1)
    ints = {
        "heads": [0, 0, HEADS, HEAD],
        "kv_heads": [0, 0, KV_HEADS, HEAD],
        "merged": [0, 0, q],
        "two": [2],
        "repeat": [1, 1, HEADS // KV_HEADS, 1, 1],
        "keys": [0, HEADS, HEAD, -1],
        "values": [0, HEADS, -1, HEAD],
        "parts": [q, kv, kv],
    }
    weights = floats | {name: np.array(value, np.int64) for name, value in ints.items()}
    return chosen(parse(text, **{n: w for n, w in weights.items() if f"{n})" in text or f"{n}," in text}))


def chosen(model: ir.Model, exclude: Iterable[str] = ()) -> ir.Model:
    """Prepared, with layers selected."""
    prepare_model(model)
    SelectLayers(exclude=tuple(exclude))(model)
    return model


def inputs(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the chosen layers read, as rows [tokens, K] by the name of the value."""
    proto = ir.to_proto(model)
    names = list(dict.fromkeys(str(node.inputs[0].name) for node in chosen_matmuls(model)))
    for name in names:
        output = proto.graph.output.add()
        output.name, output.type.tensor_type.elem_type = name, 1
    results = run_ort(proto, feeds)[len(model.graph.outputs) :]
    return {n: r.reshape(-1, r.shape[-1]) for n, r in zip(names, results, strict=True)}


def amaxes(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.abs(rows).max(axis=0) for name, rows in inputs(model, feeds).items()}
