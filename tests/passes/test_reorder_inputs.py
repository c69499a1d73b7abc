"""Reordered inputs: equal outputs for random orders, where they fold, what is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from exports import export_case, exported
from prepare_harness import feeds_for, ops, parse, refusals, run_ort
from test_exports import CASES, check_tied
from toy_transformer import ATTENTION, block, chosen, inputs

import qgraph.runtime
from qgraph.codegen import build_artifact
from qgraph.passes.check_prepared import violations
from qgraph.passes.infer_shapes import InferShapes
from qgraph.passes.reorder_inputs import REORDERS, ReorderInputs
from qgraph.passes.select_layers import Override, SelectLayers
from qgraph.solvers.reorder import Choice, Layer

SIZES = {"batch": 2, "sequence": 5}
SCHEME = "nvfp4"  # its blocks of 16 make small layers worth ordering


class Shuffle:
    """Takes a random order for every site, and remembers the layers of each."""

    def __init__(self) -> None:
        self.sites: list[list[str]] = []
        self.formats: dict[str, str] = {}
        self._rng = np.random.default_rng(0)

    def __call__(self, layers: Sequence[Layer]) -> Choice:
        self.sites.append([layer.name for layer in layers])
        self.formats.update((layer.name, layer.format) for layer in layers)
        n = layers[0].rows.shape[1]
        order = np.arange(n)
        while (order == np.arange(n)).all():
            order = self._rng.permutation(n)
        return Choice("shuffled", order, 1.0, 0.5)


def reorder(
    model: ir.Model, scheme: str = SCHEME, high: int = 4, tolerance: float = 3e-6, **options
) -> tuple[dict[str, np.ndarray], list[str], list[list[str]]]:
    """Runs the pass with random orders and holds it to its promises: equal outputs, inputs of layers in the
    order that it tells, a prepared graph. Returns the orders, what it said, and the layers of each site."""
    given = feeds(model, high)
    expected, before = run_ort(model, given), inputs(model, given)
    names = {node.name: node.inputs[0].name for node in model.graph if node.op_type == "MatMul"}
    outputs = [(v.name, v.dtype, v.shape) for v in model.graph.outputs]
    options.setdefault("choose", Shuffle())
    step = ReorderInputs(scheme, **options)
    modified = step(model).modified
    done = model.meta[REORDERS]
    assert modified == bool(done)
    assert [(v.name, v.dtype, v.shape) for v in model.graph.outputs] == outputs
    for a, b in zip(expected, run_ort(model, given), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * np.abs(a).max())
    after = inputs(model, given)
    for node in model.graph:
        if node.op_type == "MatMul" and names.get(node.name) in before:
            old, new = before[names[node.name]], after[node.inputs[0].name]
            order = done.get(names[node.name], np.arange(old.shape[1]))
            np.testing.assert_allclose(new, old[:, order], rtol=0, atol=tolerance * np.abs(old).max())
    shapes = [(v.name, v.dtype, v.shape) for node in model.graph for v in node.outputs]
    InferShapes()(model)
    assert shapes == [(v.name, v.dtype, v.shape) for node in model.graph for v in node.outputs]
    assert not list(violations(model))
    return done, refusals([step]), getattr(step._choose, "sites", [])


def feeds(model: ir.Model, high: int = 4) -> dict[str, np.ndarray]:
    cached = any(
        node.op_type == "RotaryEmbedding" for node in model.graph
    )  # exporters make caches of batch 1
    found = feeds_for(model, high=high, **{**SIZES, "batch": 1 if cached else 2})
    if "attention_mask" in found:
        found["attention_mask"] = np.ones_like(found["attention_mask"])
        found["attention_mask"][0, -2:] = 0
    if "token_type_ids" in found:
        found["token_type_ids"] %= 2
    return found


def graph(body: str, K: int, N: int = 32, **weights: np.ndarray) -> ir.Model:
    """x [n, 32] -> body -> y [n, N], with up and gate [32, K] and down [K, N], prepared and chosen."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    known = {
        "up": normal(32, K) / 6,
        "gate": normal(32, K) / 6,
        "fused": normal(32, 2 * K) / 6,
        "down": normal(K, N) / 6,
        "bu": normal(K),
        "bd": normal(N),
        "half": np.array([K, K], np.int64),
    } | weights
    used = {name: w for name, w in known.items() if any(f"{name}{end}" in body for end in "),")}
    return chosen(parse(f"(float[n, 32] x) => (float[n, {N}] y) {{ {body} }}", **used))


MLP = {
    "relu": "h = MatMul(x, up) a = Relu(h) y = MatMul(a, down)",
    "gelu with biases": """h = MatMul(x, up) b = Add(h, bu) a = Gelu(b) d = MatMul(a, down) y = Add(d, bd)""",
    "gated": """g = MatMul(x, gate) u = MatMul(x, up) s = Sigmoid(g) silu = Mul(g, s) a = Mul(silu, u)
        y = MatMul(a, down)""",
    "gated, fused": """f = MatMul(x, fused) g, u0 = Split<axis = -1>(f, half) u = Add(u0, bu) s = Sigmoid(g)
        silu = Mul(g, s) a = Mul(silu, u) y = MatMul(a, down)""",
    "norm inside": """h = MatMul(x, up) a = LayerNormalization<axis = -1>(h, bu, bu) y = MatMul(a, down)""",
    "softmax inside": """h = MatMul(x, up) a = Softmax<axis = -1>(h) y = MatMul(a, down)""",
}


@pytest.mark.parametrize("body", MLP)
@pytest.mark.parametrize("K", [96, 172, 200])
def test_mlp(body: str, K: int):
    model = graph(MLP[body], K)
    before = ops(model)
    done, said, sites = reorder(model)
    assert sites == [["down"]]
    assert list(done) == ["a"] and sorted(done["a"]) == list(range(K))
    assert ops(model) == before
    assert any("a: ordered by shuffled" in line for line in said)
    assert any("'x': 'x' is an input of the graph" in line for line in said)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("sizes", ["batch, sequence", "2, 5"])
def test_grouped_heads_of_a_decoder_block(attention: str, fused: bool, sizes: str):
    """4 heads of 32 on 2 key-value heads: pairs of heads, heads in a pair, channels in a head."""
    model = block(attention, fused, sizes)
    before = ops(model)
    done, said, sites = reorder(model)
    assert set(done) == {"o_in", "d_in"} and ops(model) == before
    assert sites == [["wo"], ["wo"], ["wo"], ["wd"]]
    heads, channels = np.divmod(done["o_in"].reshape(4, 32), 32)
    assert (heads == heads[:, :1]).all()  # heads stay whole
    assert (heads[:, 0] // 2).tolist() in ([0, 0, 1, 1], [1, 1, 0, 0])  # and with those of their group
    assert (channels == channels[0]).all() and sorted(channels[0]) == list(range(32))
    assert any("is an input of the graph" in line for line in said)


def test_a_stream_shown_by_outputs_is_put_back():
    body = """r = Gather(table, ids) h = MatMul(r, up) a = Relu(h) d = MatMul(a, down) y = Add(r, d)
        z = RMSNormalization<axis = -1>(y, scale) p = MatMul(z, last)"""
    rng = np.random.default_rng(0)
    shapes = {"table": (9, 64), "up": (64, 96), "down": (96, 64), "scale": (64,), "last": (64, 40)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    text = f"(int64[n] ids) => (float[n, 64] y, float[n, 64] z, float[n, 40] p) {{ {body} }}"
    model = chosen(parse(text, **weights))
    done, said, sites = reorder(model, high=9)
    assert sites == [["up", "last"], ["down"]] and set(done) == {"r", "z.ordered", "a"} - {"z.ordered"} | {
        "z"
    }
    assert ops(model).count("Gather") == 3  # the lookup, and one for each output
    assert any("r, z: ordered by shuffled" in line for line in said)


@pytest.mark.parametrize(("name", "opset", "dynamo"), [export_case(*case[:3]) for case in CASES])
def test_exports(name: str, opset: int, dynamo: bool):
    model = chosen(exported(name, opset, dynamo))
    before = ops(model)
    done, said, sites = reorder(model, high=40, tolerance=1e-5)
    wanted = set(inputs(model, feeds(model, 40)))
    assert len(done) == len(wanted), said  # every input of a layer: the stream, the heads, the MLP
    assert len(sites[0]) >= 4  # the stream has all layers that read it
    restored = 0 if name == "llama" else 1
    assert len(ops(model)) == len(before) + restored
    if name == "llama":
        check_tied(model)


def test_tied_embeddings_stay_one():
    """Rows of W [K, V] are the channels both of the lookup and of the output layer."""
    body = """t = Transpose<perm = [1, 0]>(table) r = Gather(table, ids)
        n = RMSNormalization<axis = -1>(r, scale) h = MatMul(n, up)
        a = Relu(h) d = MatMul(a, down) s = Add(r, d) logits = MatMul(s, t)"""
    rng = np.random.default_rng(0)
    shapes = {"table": (50, 64), "scale": (64,), "up": (64, 96), "down": (96, 64)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    model = chosen(parse(f"(int64[b, n] ids) => (float[b, n, 50] logits) {{ {body} }}", **weights))
    done, _, _ = reorder(model, high=50)
    assert set(done) == {"n", "a"}
    (table,) = [v for v in model.graph.initializers.values() if v.const_value.shape == [64, 50]]
    np.testing.assert_array_equal(table.const_value.numpy(), weights["table"].T[done["n"]])


@pytest.mark.parametrize("scheme", ["nvfp4", "int2"])
def test_a_quantized_table_counts_as_a_layer(scheme):
    """Its blocks run along the channels, too; it is in NVFP4, whatever the layers are in."""
    body = "r = Gather(table, ids) h = MatMul(r, up) a = Relu(h) d = MatMul(a, down) y = Add(d, bias)"
    rng = np.random.default_rng(0)
    shapes = {"table": (99, 64), "up": (64, 96), "down": (96, 32), "bias": (32,)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    model = chosen(parse(f"(int64[n] ids) => (float[n, 32] y) {{ {body} }}", **weights))
    SelectLayers(embeddings="nvfp4")(model)
    choose = Shuffle()
    done, _, sites = reorder(model, scheme, high=99, choose=choose)
    assert sites == [["table", "up"], ["down"]]
    assert choose.formats == {"table": "nvfp4", "up": scheme, "down": scheme}
    table = model.graph.initializers["table"].const_value.numpy()
    np.testing.assert_array_equal(table, weights["table"][:, done["r"]])


@pytest.mark.parametrize(
    "body",
    {
        "mean": "m = ReduceMean<keepdims = 1>(r, last) c = Sub(r, m) z = Mul(c, c) h = MatMul(z, up)",
        "window": "w = Slice(r, zero, one, zero) z = Sqrt(w) q = Abs(z) h = MatMul(q, up)",
        "turned": "t = Transpose(r) s = Softmax<axis = 0>(t) z = Transpose(s) h = MatMul(z, up)",
        "stacked": "u = Unsqueeze(r, one) z = Concat<axis = 1>(u, u) q = Flatten<axis = 2>(z) "
        "h = MatMul(q, up)",
        "sides": "m = Mul(r, scale) w = Where(positive, r, m) h = MatMul(w, up)",
        "two axes": "g = Transpose(r) s = MatMul(r, g) z = MatMul(s, r) h = MatMul(z, up)",
    }.items(),
    ids=lambda item: item[0],
)
def test_on_the_way_of_a_stream(body: tuple[str, str]):
    text = f"r = Gather(table, ids) {body[1]} a = Relu(h) y = MatMul(a, down)"
    rng = np.random.default_rng(0)
    shapes = {"table": (9, 64), "up": (64, 96), "down": (96, 32), "scale": (64,)}
    weights = {name: rng.uniform(0.1, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    weights |= {"zero": np.array([0]), "one": np.array([1]), "last": np.array([-1])}
    weights["positive"] = rng.integers(0, 2, (1, 64)).astype(bool)
    used = {name: w for name, w in weights.items() if any(f"{name}{end}" in text for end in "),")}
    model = chosen(parse(f"(int64[n] ids) => (float[m, 32] y) {{ {text} }}", **used))
    before = ops(model)
    done, said, sites = reorder(model, high=9)
    assert sites == [["up"], ["down"]] and len(done) == 2, said
    assert ops(model) == before


def test_equal_constants_of_other_sites_stay_as_they_are():
    """A bias that two sites share, kept once: each gets its own."""
    body = """h = MatMul(x, up) i = Add(h, bu) a = Gelu(i) k = MatMul(x, gate) l = Add(k, bu) c = Gelu(l)
        d = MatMul(a, down) e = MatMul(c, other) y = Add(d, e)"""
    other = np.random.default_rng(1).standard_normal((96, 32)).astype(np.float32)
    model = graph(body, 96, other=other)
    done, _, sites = reorder(model)
    assert sites == [["down"], ["other"]] and not np.array_equal(done["a"], done["c"])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = MatMul(x, up)", "'x' is an input of the graph"),
        (
            "h = MatMul(x, up) a = CumSum(h, one) y = MatMul(a, down)",
            r"node 'n1' \(CumSum\) is not followed",
        ),
        (
            "h = MatMul(x, up) p, q = Split<axis = -1>(h, odd) a = Concat<axis = -1>(q, p) "
            "y = MatMul(a, down)",
            r"node 'n2' \(Concat\) cuts it into pieces",
        ),
        (
            "h = MatMul(x, up) g = Slice(h, zero, ten, last) s = ReduceSum(g, last) a = Mul(h, s) "
            "y = MatMul(a, down)",
            r"node 'n1' \(Slice\) cuts it into pieces",
        ),
        (
            "h = MatMul(x, up) k = Add(x, x) g = MatMul(k, up) r = Relu(h) m = Tanh(g) a = Add(r, bu) "
            "q = MatMul(m, other) d = MatMul(a, down) y = Add(q, d)",
            "'up' is shared with node 'n2'",
        ),
    ],
)
def test_refusals(body: str, reason: str):
    weights = {
        "one": np.array(1, np.int64),
        "zero": np.array([0], np.int64),
        "ten": np.array([10], np.int64),
        "last": np.array([1], np.int64),
        "odd": np.array([40, 56], np.int64),
        "other": np.ones((96, 32), np.float32),
    }
    model = graph(body, 96, 96 if "down" not in body else 32, **weights)
    done, said, _ = reorder(model)
    assert not done
    assert any(re.search(reason, line) for line in said), said


def test_insertion():
    model = graph(
        "h = MatMul(x, up) g = MatMul(x, gate) s = Add(h, g) y = CumSum(s, one)", 96, 96, one=np.array(1)
    )
    done, _, sites = reorder(model, insert=True)
    assert sites == [["up", "gate"]] and set(done) == {"x"}
    assert ops(model).count("Gather") == 1  # for both


def test_insertion_leaves_shared_weights():
    body = "k = Add(x, x) h = MatMul(x, up) g = MatMul(k, up) s = Add(h, g) y = CumSum(s, one)"
    done, said, _ = reorder(graph(body, 96, 96, one=np.array(1)), insert=True)
    assert not done and any("'up' is shared" in line for line in said)


def test_only_what_gains_is_done():
    """Real orders: rows of two scales, shuffled, are worth it, noise is not; both are told."""
    rng = np.random.default_rng(0)
    body = """h = MatMul(x, up) a = Relu(h) d = MatMul(a, down) i = MatMul(x, gate) c = Relu(i)
        e = MatMul(c, other) y = Add(d, e)"""
    K = N = 512
    other = (rng.standard_normal((K, N)) * 8.0 ** rng.integers(0, 2, (K, 1))).astype(np.float32)
    model = graph(body, K, N, other=other)
    done, said, _ = reorder(model, "ternary", choose=None, min_gain=0.02)
    assert set(done) == {"c"}
    assert any("c: ordered by magnitude" in line and "->" in line for line in said)
    assert any("a: left in order: weight error" in line for line in said)
    again = graph(body, K, N, other=other)
    ReorderInputs("ternary", threads=1, min_gain=0.02)(again)
    np.testing.assert_array_equal(again.meta[REORDERS]["c"], done["c"])


def test_one_block_has_nothing_to_order():
    done, said, _ = reorder(graph(MLP["gated"], 96), "ternary", choose=None)
    assert not done
    assert any("a: no order changes what shares a block" in line for line in said)


def test_layers_with_a_scheme_of_their_own():
    """Blocks are those of the layer's scheme; a layer that stays float goes along and does not count."""
    body = "h = MatMul(x, up) a = Relu(h) d = MatMul(a, down) e = MatMul(a, other) y = Add(d, e)"
    other = np.random.default_rng(1).standard_normal((96, 32)).astype(np.float32)
    model = graph(body, 96, other=other)
    SelectLayers(overrides=(Override("down", "ternary"), Override("other", "none")))(model)
    done, said, sites = reorder(model, choose=None)
    assert not done and any("no order changes what shares a block" in line for line in said)
    SelectLayers(overrides=(Override("other", "none"),))(model)
    del model.meta[REORDERS]
    done, _, sites = reorder(model)
    assert set(done) == {"a"} and sites == [["down"]]


def test_runs_once_and_after_selection():
    model = graph(MLP["relu"], 96)
    ReorderInputs(SCHEME)(model)
    with pytest.raises(ir.passes.PreconditionError, match="runs once"):
        ReorderInputs(SCHEME)(model)


def test_an_artifact_of_the_reordered_model(tmp_path: Path):
    """Kernels, not only ONNX Runtime, agree with the model as it was, Gathers in it or not."""
    model = block()
    x = feeds_for(model, **SIZES)
    (expected,) = run_ort(model, x)
    done, _, _ = reorder(model, insert=True)
    assert set(done) == {"h1", "o_in", "h2", "d_in"} and ops(model).count("Gather") == 2
    build_artifact(model).write(tmp_path / "m.qg")
    with qgraph.runtime.load(tmp_path / "m.qg") as loaded:
        found = loaded.run(x)["y"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())
