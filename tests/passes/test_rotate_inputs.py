"""Rotated inputs: equal outputs through ONNX Runtime and as an artifact, folding, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from prepare_harness import feeds_for, ops, parse, refusals, run_ort
from toy_transformer import ATTENTION, HEAD, block, chosen, inputs

import qgraph.runtime
from qgraph.codegen import build_artifact
from qgraph.errors import UsageError
from qgraph.passes import load_model, prepare_model
from qgraph.passes.base import constant
from qgraph.passes.check_prepared import violations
from qgraph.passes.infer_shapes import InferShapes
from qgraph.passes.lowbit_functions import AddLowbitFunctions, lowbit_nodes
from qgraph.passes.quantize_weights import QuantizeWeights
from qgraph.passes.rotate_inputs import ROTATION, ROTATIONS, RotateInputs, hadamard, rotate_rows, scales
from qgraph.passes.save import save_lowbit
from qgraph.report import layers_of

SIZES = {"batch": 2, "sequence": 5}


def rotate(model: ir.Model, size: int, *groups: str) -> tuple[dict[str, int], RotateInputs]:
    """Runs the pass and holds it to its promises: equal outputs, rotated inputs, a prepared graph."""
    feeds = feeds_for(model, **SIZES)
    expected, before = run_ort(model, feeds), inputs(model, feeds)
    names = {node.name: node.inputs[0].name for node in model.graph if node.op_type == "MatMul"}
    step = RotateInputs(size, groups or None)
    modified = step(model).modified
    done = model.meta[ROTATIONS]
    assert modified == bool(done)
    for a, b in zip(expected, run_ort(model, feeds), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=3e-6 * np.abs(a).max())
    after = inputs(model, feeds)
    for node in model.graph:
        if node.op_type == "MatMul" and node.inputs[0].name in after:
            old = before[names[node.name]]
            b = done.get(names[node.name], 1)
            R = hadamard(b) * scales(b)[0]
            wanted = (old.reshape(len(old), -1, b).astype(np.float64) @ R).reshape(old.shape)
            found = after[node.inputs[0].name]
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    shapes = [(v.name, v.dtype, v.shape) for node in model.graph for v in node.outputs]
    InferShapes()(model)
    assert shapes == [(v.name, v.dtype, v.shape) for node in model.graph for v in node.outputs]
    assert not list(violations(model))
    return done, step


@pytest.mark.parametrize("size", [1, 2, 16, 32, 64, 128])
def test_rotation_and_its_inverse(size: int):
    H = hadamard(size)
    np.testing.assert_array_equal(H @ H, size * np.eye(size))
    forward, back = scales(size)
    assert forward * back * size == 1
    W = np.random.default_rng(0).standard_normal((3 * size, 7)).astype(np.float32)
    blocks = np.kron(np.eye(3), H) * back
    np.testing.assert_allclose(rotate_rows(W, size, back), blocks @ W, rtol=0, atol=1e-6)
    whole = np.random.default_rng(0).integers(-8, 8, (size, 3)).astype(np.float32)
    np.testing.assert_array_equal(rotate_rows(rotate_rows(whole, size, forward), size, back), whole)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("size", [16, 128])
@pytest.mark.parametrize("sizes", ["batch, sequence", "2, 5"])
def test_every_input_of_a_decoder_block(attention: str, size: int, sizes: str):
    model = block(attention, sizes=sizes)
    done, step = rotate(model, size)
    # heads of 32: values through attention fold; the largest block that divides 64 and 96
    assert done == {"h1": min(size, 64), "o_in": min(size, HEAD), "h2": min(size, 64), "d_in": min(size, 32)}
    operators = [n for n in model.graph if ROTATION in n.metadata_props]
    assert [n.op_type for n in operators] == ["Reshape", "MatMul", "Reshape"] * 3
    assert sum("folded into" in line for line in refusals([step])) == 1
    matrices = [n for n in model.graph.initializers if n.startswith("hadamard")]
    assert len(matrices) == len({block for name, block in done.items() if name != "o_in"})


def test_fused_projections_are_rotated_by_an_operator():
    model = block(fused=True)
    done, step = rotate(model, 32)
    assert done["o_in"] == 32 and not any("folded" in line for line in refusals([step]))


def test_chosen_groups_only():
    model = block()
    before = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    done, _ = rotate(model, 32, "o_in")
    assert set(done) == {"o_in"}
    changed = {n for n, v in model.graph.initializers.items() if not np.array_equal(constant(v), before[n])}
    assert changed == {"wv", "bv", "wo"}


# -- small graphs -------------------------------------------------------------------------------------------

W = np.random.default_rng(1).standard_normal((3, 48, 48)).astype(np.float32)


def chain(body: str, outputs: str = "float[n, 48] y", exclude: tuple[str, ...] = ()) -> ir.Model:
    given = {name: w for name, w in zip("abc", W, strict=True) if f" {name})" in body}
    return chosen(parse(f"(float[n, 48] x) => ({outputs}) {{ {body} }}", **given), exclude)


def test_layers_that_stay_float_read_the_value_as_it_was():
    model = chain("p = MatMul(x, a) q = MatMul(x, b) y = Add(p, q)", exclude=("b",))
    done, _ = rotate(model, 128)
    assert done == {"x": 16}
    np.testing.assert_array_equal(constant(model.graph.initializers["b"]), W[1])
    assert not np.array_equal(constant(model.graph.initializers["a"]), W[0])


def test_layers_that_share_a_weight_are_rotated_together():
    model = chain("p = MatMul(x, a) t = Tanh(p) y = MatMul(t, a)")
    done, _ = rotate(model, 16)
    assert done == {"x": 16, "t": 16}


def test_a_block_as_wide_as_the_input_needs_no_more_than_a_product():
    model = chosen(
        parse("(float[n, 64] x) => (float[n, 32] y) { y = MatMul(x, a) }", a=W[0].repeat(2, 0)[:64, :32])
    )
    assert rotate(model, 64)[0] == {"x": 64}


def test_a_linear_layer_before_takes_the_rotation():
    model = chain("p = MatMul(x, a) y = MatMul(p, b)")
    done, step = rotate(model, 128)
    assert done == {"x": 16, "p": 16} and "MatMul" in ops(model)
    assert sum("folded into" in line for line in refusals([step])) == 1


@pytest.mark.parametrize(
    ("body", "outputs", "exclude"),
    [
        ("p = MatMul(x, a) y = MatMul(p, b) z = Tanh(p)", "float[n, 48] y, float[n, 48] z", ()),
        ("p = MatMul(x, a) h = Relu(p) y = MatMul(h, b)", "float[n, 48] y", ()),
        ("p = MatMul(x, a) y = MatMul(p, b) z = MatMul(p, c)", "float[n, 48] y, float[n, 48] z", ("c",)),
        ("p = MatMul(x, a) q = MatMul(p, b) y = MatMul(q, a)", "float[n, 48] y", ()),
    ],
)
def test_what_does_not_fold_becomes_an_operator(body: str, outputs: str, exclude: tuple[str, ...]):
    model = chain(body, outputs, exclude)
    done, step = rotate(model, 16, *(n for n in ("p", "h") if f"{n} = " in body and f"({n}, b)" in body))
    assert done and not any("folded" in line for line in refusals([step]))


def test_a_width_without_a_block_is_left():
    model = chosen(parse("(float[n, 40] x) => (float[n, 32] y) { y = MatMul(x, a) }", a=W[0][:40, :32]))
    done, step = rotate(model, 128)
    assert not done and "no block of 16 to 128 channels divides 40" in refusals([step])[0]


def test_a_weight_that_others_read_is_left():
    model = chain("p = MatMul(x, a) t = Tanh(p) y = MatMul(t, a)")
    node = next(n for n in model.graph if n.op_type == "MatMul")
    node.meta.clear()  # as if it had been excluded
    done, step = rotate(model, 16)
    assert not done and "needs a weight of its layers as it is" in refusals([step])[0]


def test_options_are_checked():
    with pytest.raises(UsageError, match="not 48"):
        RotateInputs(48)
    with pytest.raises(UsageError, match="no layer to quantize reads 'nope'"):
        RotateInputs(16, ["nope"])(block())
    model = block()
    RotateInputs(16)(model)
    with pytest.raises(ir.passes.PreconditionError, match="once"):
        RotateInputs(16)(model)
    with pytest.raises(ir.passes.PreconditionError, match="after SelectLayers"):
        RotateInputs(16)(parse("(float[2] x) => (float[2] y) { y = Tanh(x) }"))


# -- beyond the pass ----------------------------------------------------------------------------------------


def run_artifact(model: ir.Model, folder: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    build_artifact(model).write(folder / "m.qg")
    with qgraph.runtime.load(folder / "m.qg") as loaded:
        return loaded.run(feeds)["y"]


def test_an_artifact_of_the_rotated_model(tmp_path: Path):
    """Kernels, not only ONNX Runtime, agree with the model as it was."""
    model = block()
    feeds = feeds_for(model, **SIZES)
    (expected,) = run_ort(model, feeds)
    RotateInputs(64)(model)
    found = run_artifact(model, tmp_path, feeds)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_the_low_bit_file_of_the_rotated_model(tmp_path: Path):
    """Written, read and prepared again, rotations are there, are no layers, and the rest is quantized."""
    model = block()
    RotateInputs(64)(model)
    QuantizeWeights("nvfp4", "rtn")(model)
    AddLowbitFunctions()(model)
    feeds = feeds_for(model, **SIZES)
    save_lowbit(model, tmp_path / "m.onnx")
    again = prepare_model(load_model(tmp_path / "m.onnx"))
    assert sum(ROTATION in n.metadata_props for n in again.graph) == 9
    assert len(layers_of(again)) == len(lowbit_nodes(again)) == 7
    assert {layer.scheme for layer in layers_of(again)} == {"nvfp4"}

    (expected,) = ReferenceEvaluator(str(tmp_path / "m.onnx")).run(None, feeds)
    found = run_artifact(again, tmp_path, feeds)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
