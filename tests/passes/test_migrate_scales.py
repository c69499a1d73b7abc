"""Migrated scales: equal outputs through ONNX Runtime, the formula, where scales fold, what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from prepare_harness import feeds_for, parse, refusals, run_ort
from toy_transformer import ATTENTION, amaxes, block, chosen, inputs

import qgraph.runtime
from qgraph.codegen import build_artifact
from qgraph.errors import InputError, UsageError
from qgraph.passes.base import constant
from qgraph.passes.check_prepared import violations
from qgraph.passes.infer_shapes import InferShapes
from qgraph.passes.migrate_scales import MIGRATIONS, MigrateScales, smoothing, weight_error
from qgraph.solvers import get_solver
from qgraph.solvers.balance import LIMIT

SIZES = {"batch": 2, "sequence": 5}


def migrate(model: ir.Model, high: int = 4, tolerance: float = 2e-6, **options) -> tuple[dict, MigrateScales]:
    """Runs the pass with what it needs to know and holds it to its promises: equal outputs (to `tolerance` of
    the largest), inputs of layers that were divided by s, a prepared graph."""
    feeds = feeds_for(model, **SIZES)
    expected, before = run_ort(model, feeds), inputs(model, feeds)
    names = {node.name: node.inputs[0].name for node in model.graph if node.op_type == "MatMul"}
    step = MigrateScales(options.pop("amax", amaxes(model, feeds)), **options)
    modified = step(model).modified
    done = model.meta[MIGRATIONS]
    assert modified == bool(done)
    for a, b in zip(expected, run_ort(model, feeds), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * np.abs(a).max())
    after = inputs(model, feeds)
    for node in model.graph:
        if node.op_type == "MatMul" and names.get(node.name) in done and node.inputs[0].name in after:
            old = before[names[node.name]] / done[names[node.name]]
            np.testing.assert_allclose(
                after[node.inputs[0].name], old, rtol=1e-5, atol=1e-5 * np.abs(old).max()
            )
    InferShapes()(model)
    assert not list(violations(model))
    return done, step


def weights(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("sizes", ["batch, sequence", "2, 5"])
def test_every_site_of_a_decoder_block(attention: str, fused: bool, sizes: str):
    model = block(attention, fused, sizes)
    nodes = len(list(model.graph))
    done, _ = migrate(model)
    assert set(done) == {"h1", "o_in", "h2", "d_in"}  # everything that a layer reads
    assert len(list(model.graph)) == nodes
    assert all(s.max() > 1.2 for s in done.values())


def test_strength_is_that_of_the_paper():
    model = block()
    before = weights(model)
    feeds = feeds_for(model, **SIZES)
    x = amaxes(model, feeds)
    done, _ = migrate(model, alpha=0.3)
    w = np.abs(np.concatenate([before["wg"], before["wu"]], axis=1)).max(axis=1)
    s = x["h2"] ** 0.3 / w**0.7
    np.testing.assert_allclose(done["h2"], s / np.exp(np.log(s).mean()), rtol=2**-8)
    np.testing.assert_allclose(constant(model.graph.initializers["wg"]), before["wg"] * done["h2"][:, None])
    np.testing.assert_allclose(
        constant(model.graph.initializers["bias2"]), before["bias2"] / done["h2"], rtol=1e-6
    )


def test_heads_that_share_values_share_their_scales():
    model = block("softmax")
    before = weights(model)
    x = amaxes(model, feeds_for(model, **SIZES))["o_in"]
    done, _ = migrate(model)
    heads = done["o_in"].reshape(2, 2, 32)  # value head, query head of it, channel
    np.testing.assert_array_equal(heads[:, 0], heads[:, 1])
    largest = x.reshape(2, 2, 32).max(axis=1)
    rows = np.abs(before["wo"]).max(axis=1).reshape(2, 2, 32).max(axis=1)
    s = np.sqrt(largest / rows)
    np.testing.assert_allclose(heads[:, 0], s / np.exp(np.log(s).mean()), rtol=2**-8)


@pytest.mark.parametrize("attention", ATTENTION)
def test_powers_of_two_keep_every_bit(attention: str):
    done, _ = migrate(block(attention), tolerance=0, exact=True)
    assert done and all((np.frexp(s)[0] == 0.5).all() for s in done.values())


@pytest.mark.parametrize("alpha", [0, 1])
def test_whole_strengths(alpha: float):
    done, _ = migrate(block(), alpha=alpha)
    assert len(done) == 4


# -- other places -------------------------------------------------------------------------------------------

W = np.random.default_rng(1).standard_normal((3, 64, 64)).astype(np.float32)
VECTOR = np.linspace(-2, 3, 64, dtype=np.float32)


def chain(body: str, outputs: str = "float[n, 64] y", exclude: tuple[str, ...] = (), **extra) -> ir.Model:
    """x [n, 64] through `body`, which may use the weights a, b, c [64, 64] and the vector v [64]."""
    given = dict(zip("abc", W, strict=True)) | {"v": VECTOR} | extra
    text = f"(float[n, 64] x) => ({outputs}) {{ {body} }}"
    used = {n: w for n, w in given.items() if re.search(rf"[( ]{n}[,)]", body)}
    return chosen(parse(text, **used), exclude)


def test_a_product_with_a_vector_takes_it():
    done, _ = migrate(chain("h = Mul(x, v) y = MatMul(h, a)"))
    assert set(done) == {"h"}


@pytest.mark.parametrize("act", ["Relu(t)", "LeakyRelu<alpha = 0.1>(t)", "Identity(t)"])
def test_a_relu_lets_scales_pass(act: str):
    done, _ = migrate(chain(f"t0 = MatMul(x, a) t = Add(t0, v) h = {act} y = MatMul(h, b)"))
    assert set(done) == ({"t"} if act == "Identity(t)" else {"h"})


def test_layers_that_stay_float_are_scaled_too():
    model = chain("h = Mul(x, v) y = MatMul(h, a) z = MatMul(h, b)", "float[n, 64] y, float[n, 64] z", ("b",))
    before = weights(model)
    done, _ = migrate(model)
    np.testing.assert_allclose(constant(model.graph.initializers["b"]), before["b"] * done["h"][:, None])


def test_a_constant_that_others_read_is_copied():
    model = chain("h = Mul(x, v) p = MatMul(h, a) t = Tanh(p) g = Mul(t, v) y0 = MatMul(g, b) y = Mul(y0, v)")
    done, _ = migrate(model)
    assert set(done) == {"h", "g"}
    np.testing.assert_array_equal(constant(model.graph.initializers["v"]), VECTOR)


def test_the_first_place_takes_all():
    """A norm's scale, a product and a bias in a row: one of them is divided, the bias with it."""
    done, step = migrate(chain("h = Mul(x, v) g = Mul(h, v) k = Add(g, v) y = MatMul(k, a)"))
    assert set(done) == {"k"} and len(refusals([step])) == 1


def test_gate_and_up_in_one_matrix():
    body = """t = MatMul(x, d) g, u = Split<axis = -1>(t, parts) s = Sigmoid(g) w = Mul(g, s)
              h = Mul(w, u) y = MatMul(h, b)"""
    done, _ = migrate(chain(body, d=np.concatenate(W[1:], axis=1), parts=np.array([64, 64])))
    assert set(done) == {"h"}


def test_reading_the_shape_is_no_obstacle():
    body = """t = MatMul(x, a) n0 = Shape<start = 0, end = 1>(t) f = Cast<to = 1>(n0)
              h = Relu(t) p = MatMul(h, b) y = Mul(p, f)"""
    done, _ = migrate(chain(body))
    assert set(done) == {"h"}


def test_slices_are_followed_and_computed_bounds_are_not():
    body = "t = MatMul(x, a) h = Slice({}) y = MatMul(h, d)"
    ints = {"zero": np.array([0]), "half": np.array([32]), "axis": np.array([1])}
    d = {"d": W[0][:32], **{k: v.astype(np.int64) for k, v in ints.items()}}
    done, _ = migrate(chain(body.format("t, zero, half, axis"), **d))
    assert done["h"].shape == (32,)


def test_zero_channels_are_left():
    model = chain(
        "h = Mul(x, v) y = MatMul(h, a)", a=np.where(np.arange(64)[:, None] == 5, np.float32(0), W[0])
    )
    x = np.linspace(1, 9, 64, dtype=np.float32)
    x[7] = 0
    done, _ = migrate(model, amax={"h": x})
    assert done["h"][5] == done["h"][7] == 1 and (done["h"][8:] != 1).sum() > 50
    done, step = migrate(chain("h = Mul(x, v) y = MatMul(h, a)"), amax={"h": np.zeros(64, np.float32)})
    assert not done and "every channel of its layers is zero" in refusals([step])[0]


def test_scales_are_bounded():
    s = smoothing(np.array([1e30, 1e-30, 1.0]), np.ones(3), np.ones(3, bool), 1.0, exact=False)
    assert s.tolist() == [LIMIT, 1 / LIMIT, 1]


# -- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        ("h = Mul(x, v) p = MatMul(h, a) y = Add(p, h)", "float[n, 64] y", "(Add) reads it too"),
        ("h = Mul(x, v) y = MatMul(h, a)", "float[n, 64] y, float[n, 64] h", "an output of the graph"),
        ("t = MatMul(x, a) h = Gelu(t) y = MatMul(h, b)", "float[n, 64] y", "no norm, product"),
        (
            "t = MatMul(x, a) s = Sigmoid(t) h = Mul(t, s) y = MatMul(h, b)",
            "float[n, 64] y",
            "no norm, product",
        ),
        ("t = MatMul(x, a) h = Mul(t, t) y = MatMul(h, b)", "float[n, 64] y", "no norm, product"),
        ("h = Mul(x, v) p = MatMul(h, a) t = Tanh(p) y = MatMul(t, a)", "float[n, 64] y", "is shared"),
        ("y = MatMul(x, a)", "float[n, 64] y", "no norm, product"),
        ("t = MatMul(x, a) h = Div(v, t) y = MatMul(h, b)", "float[n, 64] y", "no norm, product"),
        (
            "t = MatMul(x, a) h = Relu(t) p = MatMul(h, b) q = MatMul(p, a) y = Tanh(q)",
            "float[n, 64] y",
            "shares its weight",
        ),
    ],
)
def test_what_is_not_exact_is_left(body: str, outputs: str, reason: str):
    model = chain(body, outputs)
    before = weights(model)
    done, step = migrate(model)
    assert any(reason in line for line in refusals([step])), refusals([step])
    for name, array in weights(model).items():
        if not done:
            np.testing.assert_array_equal(array, before[name])


def test_what_was_not_calibrated_is_left():
    done, step = migrate(block(), amax={})
    assert not done and sum("was not calibrated" in line for line in refusals([step])) == 4


def test_channels_that_meet_in_one_bias_are_left():
    done, _ = migrate(chain("t = MatMul(x, a) u = Add(t, one) y = MatMul(u, b)", one=np.float32([1])))
    assert not done


def test_a_reshape_that_mixes_positions_and_channels_is_not_followed():
    body = "t = MatMul(x, a) r = Reshape(t, turned) h = Transpose<perm = [1, 0]>(r) y = MatMul(h, b)"
    done, _ = migrate(chain(body, turned=np.array([64, -1])))
    assert not done


@pytest.mark.parametrize("bad", [np.ones(3), np.full(64, np.nan), np.full(64, -1.0)])
def test_bad_statistics_are_refused(bad: np.ndarray):
    with pytest.raises(InputError, match="largest inputs of 'h'"):
        MigrateScales({"h": bad.astype(np.float32)})(chain("h = Mul(x, v) y = MatMul(h, a)"))


def test_options_are_checked():
    with pytest.raises(UsageError, match="between 0 and 1"):
        MigrateScales({}, 1.5)
    with pytest.raises(UsageError, match="need a score"):
        MigrateScales({}, (0.25, 0.5))
    model = block()
    migrate(model)
    with pytest.raises(ir.passes.PreconditionError, match="once"):
        MigrateScales({})(model)
    with pytest.raises(ir.passes.PreconditionError, match="after SelectLayers"):
        MigrateScales({})(parse("(float[2] x) => (float[2] y) { y = Tanh(x) }"))


# -- a Mul for the rest -------------------------------------------------------------------------------------


def test_insert_serves_the_quantized_layers_only():
    body = """h = Gelu(x) p = MatMul(h, a) q = MatMul(h, b) k = MatMul(h, c)
              r = Add(p, q) s = Add(r, k) y = Add(s, h)"""
    model = chain(body, exclude=("c",))
    before = weights(model)
    done, _ = migrate(model, insert=True)
    assert set(done) == {"h"}
    assert [n.op_type for n in model.graph].count("Mul") == 1
    np.testing.assert_array_equal(constant(model.graph.initializers["c"]), before["c"])


def test_insert_of_powers_of_two_keeps_every_bit():
    done, _ = migrate(
        chain("h = Gelu(x) p = MatMul(h, a) y = Add(p, h)"), tolerance=0, insert=True, exact=True
    )
    assert set(done) == {"h"}


# -- choosing alpha -----------------------------------------------------------------------------------------


def test_the_score_chooses_for_each_site():
    def score(site, s: np.ndarray) -> float:
        if site.inputs == ("h1",):
            return float(np.abs(np.log(s)).max())  # no migration is best
        return -float(np.log(s).max())  # the strongest is

    model = block()
    feeds = feeds_for(model, **SIZES)
    amax = amaxes(model, feeds)
    done, step = migrate(model, alpha=(0.5, 1.0), score=score)
    assert "h1" not in done and any("h1: no migration is best" in line for line in refusals([step]))
    strong, _ = migrate(block(), alpha=1.0, amax=amax)
    np.testing.assert_array_equal(done["o_in"], strong["o_in"])


def test_weight_error_is_the_error_of_the_outputs():
    model = block()
    feeds = feeds_for(model, batch=4, sequence=32)
    rows = inputs(model, feeds)
    seen = {}

    def score(site, s: np.ndarray) -> float:
        found = weight_error(lambda name: rows[name].T.astype(np.float64) @ rows[name], "rtn")(site, s)
        seen[site.inputs, s.tobytes()] = (site, s, found)
        return found

    MigrateScales(amaxes(model, feeds), (0.25, 0.75), score=score)(model)
    assert len(seen) == 4 * 3

    for site, s, found in seen.values():
        (name,), (weight,) = site.inputs, site.weights
        divisor = s[site.rows[0]]
        back = get_solver("rtn")(weight * divisor[:, None]).dequantize()
        x = rows[name].astype(np.float64)
        error = np.square(x / divisor @ back - x @ weight).sum() / np.square(x @ weight).sum()
        assert found == pytest.approx(error, rel=1e-3)


def test_an_artifact_of_the_migrated_model(tmp_path: Path):
    """Kernels, not only ONNX Runtime, agree with the model as it was, a Mul in it or not."""
    model = chain("h = Gelu(x) g = Mul(h, v) p = MatMul(g, a) q = MatMul(h, b) r = Add(p, h) y = Add(q, r)")
    feeds = feeds_for(model)
    (expected,) = run_ort(model, feeds)
    done, _ = migrate(model, insert=True)
    assert set(done) == {"h", "g"}
    build_artifact(model).write(tmp_path / "m.qg")
    with qgraph.runtime.load(tmp_path / "m.qg") as loaded:
        found = loaded.run(feeds)["y"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())
