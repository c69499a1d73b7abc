"""Absorbed dual scales: the same function in weights that lose less; what is left as it is, and why."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from exports import export_case, exported
from prepare_harness import feeds_for, parse, refusals, run_ort
from toy_transformer import ATTENTION, block, chosen, inputs

from qgraph.errors import UsageError
from qgraph.passes import prepare_model
from qgraph.passes.base import constant
from qgraph.passes.check_prepared import violations
from qgraph.passes.dual_scale import DUAL_SCALES, AbsorbDualScales
from qgraph.passes.infer_shapes import InferShapes
from qgraph.passes.migrate_scales import MigrateScales
from qgraph.passes.orient_weights import TIED
from qgraph.passes.select_layers import Override, SelectLayers
from qgraph.solvers import get_solver
from qgraph.solvers.dual_scale import channel_scales

SIZES = {"batch": 2, "sequence": 5}


def absorb(model: ir.Model, scheme: str = "int2", **sizes: int) -> tuple[dict, AbsorbDualScales]:
    """Runs the pass and holds it to its promises: equal outputs, inputs multiplied by c, a prepared graph."""
    feeds = feeds_for(model, high=40, **(sizes or SIZES))
    if "attention_mask" in feeds:
        feeds["attention_mask"][:] = 1
    if "token_type_ids" in feeds:
        feeds["token_type_ids"] %= 2
    expected, before = run_ort(model, feeds), inputs(model, feeds)
    names = {node.name: node.inputs[0].name for node in model.graph if node.op_type == "MatMul"}
    nodes = len(list(model.graph))
    step = AbsorbDualScales(scheme, threads=1)
    modified = step(model).modified
    done = model.meta[DUAL_SCALES]
    assert modified == bool(done)
    assert len(list(model.graph)) == nodes
    for a, b in zip(expected, run_ort(model, feeds), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())
    after = inputs(model, feeds)
    for node in model.graph:
        if node.op_type == "MatMul" and names.get(node.name) in done:
            old = before[names[node.name]] / done[names[node.name]]
            np.testing.assert_allclose(after[node.inputs[0].name], old, atol=1e-5 * np.abs(old).max())
    InferShapes()(model)
    assert not list(violations(model))
    return done, step


def weight(model: ir.Model, name: str) -> np.ndarray:
    array = constant(model.graph.initializers[name])
    assert array is not None
    return array.copy()


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scheme", ["ternary", "int2", "int3", "int4-sym"])
def test_both_sites_of_a_decoder_block(attention: str, fused: bool, scheme: str):
    done, step = absorb(block(attention, fused), scheme)
    assert set(done) == {"o_in", "d_in"}
    assert all(s.max() > 1.02 and (s > 0).all() for s in done.values())
    assert sum("behind a norm" in line for line in refusals([step])) == 2


def test_the_layer_before_takes_it():
    """c multiplies the columns and the bias of up, and divides the rows of down."""
    model = block()
    before = {name: weight(model, name) for name in ("wd", "bu", "wu")}
    done, _ = absorb(model)
    c = channel_scales(before["wd"], "int2", threads=1)
    np.testing.assert_allclose(done["d_in"], 1 / c)
    np.testing.assert_allclose(weight(model, "wd"), before["wd"] / c[:, None], rtol=1e-6)
    np.testing.assert_allclose(weight(model, "bu"), before["bu"] * c, rtol=1e-6)
    np.testing.assert_allclose(weight(model, "wu"), before["wu"] * c, rtol=1e-6)


def test_heads_that_share_values_share_their_scales():
    done, _ = absorb(block("softmax"))
    heads = done["o_in"].reshape(2, 2, 32)  # value head, query head of it, channel
    np.testing.assert_array_equal(heads[:, 0], heads[:, 1])


@pytest.mark.parametrize("scheme", ["ternary", "int2", "int3"])
@pytest.mark.parametrize("K", [172, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_a_down_projection_loses_less(scheme: str, K: int, bias: bool):
    model, W = gated(K, bias)
    absorb(model, scheme)

    def error(weight: np.ndarray, c: np.ndarray) -> float:
        back = get_solver("itf")(weight, format=scheme, threads=1).dequantize()
        return float(np.square(W - back * c).sum() / np.square(W).sum())

    after = weight(model, "down")
    assert error(after, W[:, :1] / after[:, :1]) < 0.9 * error(W, np.ones((K, 1)))


def gated(K: int, bias: bool = False, **extra: np.ndarray) -> tuple[ir.Model, np.ndarray]:
    """down(up(x) * silu(gate(x))) with uneven rows in down."""
    rng = np.random.default_rng(K)
    down = rng.standard_normal((K, 48)) * np.exp(0.6 * rng.standard_normal((K, 1)))
    floats = {
        "gate": rng.standard_normal((48, K)) / 7,
        "up": rng.standard_normal((48, K)) / 7,
        "down": down / 14,
        "bias": rng.standard_normal(K),
    }
    used = {name: array.astype(np.float32) for name, array in floats.items() if bias or name != "bias"}
    text = f"""(float[n, 48] x) => (float[n, 48] y) {{
        g = MatMul(x, gate)  s = Sigmoid(g)  a = Mul(g, s)
        u0 = MatMul(x, up)  u = {"Add(u0, bias)" if bias else "Identity(u0)"}
        h = Mul(a, u)  y = MatMul(h, down)
    }}"""
    return chosen(parse(text, **used)), used["down"]


def test_layers_that_quantize_otherwise_are_left():
    body = "t = MatMul(x, a) h = Relu(t) p = MatMul(h, b) q = MatMul(h, c) y = Add(p, q)"
    weights = np.random.default_rng(0).standard_normal((3, 64, 64)).astype(np.float32)
    for override, left in ((("p", "nvfp4"), True), (("p", "int3"), True), (("q", "none"), False)):
        model = parse(
            f"(float[n, 64] x) => (float[n, 64] y) {{ {body} }}", **dict(zip("abc", weights, strict=True))
        )
        prepare_model(model)
        for node in model.graph:
            node.name = node.outputs[0].name
        SelectLayers(overrides=(Override(*override),))(model)
        done, step = absorb(model)
        assert bool(done) != left
        assert any("no dual scales for" in line for line in refusals([step])) == left


def test_a_scheme_without_groups_has_none():
    step = AbsorbDualScales("nvfp4")
    assert not step(block()).modified
    assert any("no dual scales for nvfp4" in line for line in refusals([step]))
    with pytest.raises(UsageError, match="unknown scheme"):
        AbsorbDualScales("int5")


def test_zero_weights_are_left():
    model = chosen(
        parse(
            "(float[n, 64] x) => (float[n, 64] y) { h = Mul(x, v) y = MatMul(h, a) }",
            v=np.linspace(1, 2, 64, dtype=np.float32),
            a=np.zeros((64, 64), np.float32),
        )
    )
    done, step = absorb(model)
    assert not done and any("zero, or alike" in line for line in refusals([step]))


def test_runs_once_and_beside_migration():
    model = block()
    feeds = feeds_for(model, **SIZES)
    amax = {name: np.abs(rows).max(axis=0) for name, rows in inputs(model, feeds).items()}
    MigrateScales(amax)(model)
    done, _ = absorb(model)
    assert set(done) == {"o_in", "d_in"}
    with pytest.raises(ir.passes.PreconditionError, match="once"):
        AbsorbDualScales("int2")(model)


# -- what exporters write -----------------------------------------------------------------------------------

LLAMA = [("llama", 23, True), ("llama", 18, True), ("llama", 17, False)]
GELU = [("bert", 23, True), ("bert_eager", 14, False), ("vit", 23, True), ("vit", 14, False)]


def prepared(name: str, opset: int, dynamo: bool) -> ir.Model:
    """With all of its small layers chosen."""
    model = prepare_model(exported(name, opset, dynamo))
    SelectLayers(include=("MatMul",))(model)
    return model


@pytest.mark.parametrize(("name", "opset", "dynamo"), [export_case(*case) for case in LLAMA])
def test_exports_of_llama(name: str, opset: int, dynamo: bool):
    """Values -> o, up -> down; not norms -> q, k, v and gate, up; nor the table, which is tied."""
    model = prepared(name, opset, dynamo)
    done, step = absorb(model, batch=1, sequence=7)
    assert sorted(len(c) for c in done.values()) == [32, 64], refusals([step])
    table = [line for line in refusals([step]) if "is shared" in line]
    assert len(table) == 1
    assert sum(TIED in node.metadata_props for node in model.graph) == 2


@pytest.mark.parametrize(("name", "opset", "dynamo"), [export_case(*case) for case in GELU])
def test_a_gelu_is_in_the_way(name: str, opset: int, dynamo: bool):
    model = prepared(name, opset, dynamo)
    done, step = absorb(model, batch=2, sequence=7)
    assert [len(c) for c in done.values()] == [32]  # values -> o
    assert sum("(Gelu)" in line for line in refusals([step])) == 1, refusals([step])
