"""Layers of group formats, lowered and compiled: beside ONNX's reference evaluator on the low-bit model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from end_to_end import assert_close, parse, run_artifact
from kernel_harness import native_isas
from onnx.reference import ReferenceEvaluator

from qgraph.codegen import Artifact, build_artifact
from qgraph.codegen.lowering import lower
from qgraph.errors import InputError, UnsupportedError, UsageError
from qgraph.passes import prepare_model
from qgraph.passes.lowbit_functions import AddLowbitFunctions
from qgraph.passes.lowbit_weights import LINEARS
from qgraph.passes.quantize_activations import quantize_input
from qgraph.passes.quantize_weights import QuantizeWeights
from qgraph.passes.select_layers import Override, SelectLayers

# Every format, with the epilogues that the float layers have; q, k and v read one value.
TEXT = """(float[b, s, 172] x) => (float[b, s, 172] y) {
    [q] q = MatMul(x, wq) [k] k = MatMul(x, wk) [v] v = MatMul(x, wv)
    p = Mul(q, k) h = Add(p, v) [up] u0 = MatMul(h, wu) u1 = Add(u0, bu) u = Gelu(u1) [mid] m = MatMul(u, wm)
    [out] o = MatMul(m, wo) [last] l = MatMul(o, wl) y = Add(l, x) }"""
SHAPES = {"wq": (172, 40), "wk": (172, 40), "wv": (172, 40), "wu": (40, 131)}
SHAPES |= {"wm": (131, 36), "wo": (36, 172), "wl": (172, 172)}
FORMATS = {"q": "ternary", "k": "ternary", "v": "int2", "up": "int3", "mid": "int4", "out": "int4-sym"}


def quantized(text: str, shapes: dict[str, tuple[int, ...]], formats: dict[str, str]) -> ir.Model:
    """A low-bit model of random weights; layers that `formats` does not name are int8."""
    rng = np.random.default_rng(0)
    weights = {n: (rng.standard_normal(s) / np.sqrt(s[0])).astype(np.float32) for n, s in shapes.items()}
    model = prepare_model(ir.from_proto(parse(text, weights)))
    overrides = [Override(name, scheme) for name, scheme in formats.items()]
    for step in (SelectLayers(overrides=overrides), QuantizeWeights("int8"), AddLowbitFunctions()):
        step(model)
    return model


@pytest.fixture(scope="module")
def lowbit() -> onnx.ModelProto:
    return ir.to_proto(quantized(TEXT, {**SHAPES, "bu": (131,)}, FORMATS))


@pytest.fixture(scope="module")
def artifact(lowbit: onnx.ModelProto) -> Artifact:
    return build_artifact(prepare_model(ir.from_proto(lowbit)))


@pytest.mark.parametrize("isa", native_isas(), ids=lambda i: i.name)
@pytest.mark.parametrize("shape", [(1, 1), (2, 7)])
def test_a_layer_of_every_format(
    isa, shape: tuple[int, int], lowbit: onnx.ModelProto, artifact: Artifact, tmp_path: Path
) -> None:
    x = np.random.default_rng(1).standard_normal((*shape, 172)).astype(np.float32)
    want = ReferenceEvaluator(lowbit).run(None, {"x": x})
    assert_close(run_artifact(artifact, tmp_path, {"x": x}, isa=isa.name), {"y": want[0]}, 5e-6)


def test_kernels_and_bytes(artifact: Artifact) -> None:
    layers = {layer.node_name: layer for layer in artifact.layers}
    assert {name: layer.kernel for name, layer in layers.items()} == {
        "q": "matmul_ternary",
        "k": "matmul_ternary",
        "v": "matmul_int2",
        "up": "matmul_int3",
        "mid": "matmul_int4",
        "out": "matmul_int4sym",
        "last": "matmul_int8",
    }
    assert layers["up"].compute == "W3A16: int3 weights with means, float32 activations and sums"
    # 40 columns are 3 tiles: 11 words, 2 scales and 2 means a lane; the bias is not the layer's matrix.
    assert layers["q"].nbytes == layers["k"].nbytes == 3 * 16 * (4 * 11 + 2 * 2 + 2 * 2)
    # 36 columns: 17 words, 5 scales, 3 bytes of zero points.
    assert layers["mid"].nbytes == 3 * 16 * (4 * 17 + 2 * 5 + 3)
    bias = next(t.data.nbytes for t in artifact.tensors if t.name == "w/bu")
    assert sum(layer.nbytes for layer in layers.values()) == artifact.weight_bytes - bias


def test_digits_and_sums_are_computed_once_for_all_layers_that_read_a_value(lowbit: onnx.ModelProto) -> None:
    steps = lower(prepare_model(ir.from_proto(lowbit)).graph).steps
    made = Counter(s.spec.op for s in steps)
    # Digits of x for q and k, and with other sums for v, of what mid, out and last read; int3, up, takes sums
    # of h.
    assert made["split_digits"] == 5 and made["block_sums"] == 1
    digits = {step.args[0][1] for step in steps if step.spec.op == "split_digits"}
    read = [{arg[1] for arg in step.args if arg[0] == "v"} & digits for step in steps]
    users = {step.name: found for step, found in zip(steps, read, strict=True) if found}
    assert users["q"] == users["k"] and users["q"] != users["v"]
    assert {"mid", "out", "last"} < set(users) and "up" not in users


def test_a_copy_that_several_layers_need_is_made_once() -> None:
    text = """(float[n, 64, b] x) => (float[b, n, 16] y) {
        t = Transpose<perm = [2, 0, 1]>(x) a = MatMul(t, wa) c = MatMul(t, wb) y = Add(a, c) }"""
    model = quantized(text, {"wa": (64, 16), "wb": (64, 16)}, {})
    ops = [s.spec.op for s in lower(model.graph).steps]
    assert ops == ["elementwise", "split_digits", "matmul_int8", "matmul_int8"]


def test_ternary_packed_small_behind_rounded_activations(tmp_path: Path) -> None:
    text = "(float[b, 172] x) => (float[b, 40] y) { [q] y = MatMul(x, wq) }"
    model = quantized(text, {"wq": (172, 40)}, {"q": "ternary"})
    (node,) = model.graph
    node.replace_input_with(0, quantize_input(model.graph.inputs[0], "int8", None))
    AddLowbitFunctions()(model)
    proto = ir.to_proto(model)
    artifact = build_artifact(prepare_model(model), packing="small")
    x = np.random.default_rng(1).standard_normal((3, 172)).astype(np.float32)
    want = ReferenceEvaluator(proto).run(None, {"x": x})
    assert_close(run_artifact(artifact, tmp_path, {"x": x}), {"y": want[0]})
    layer = artifact.layers[-1]
    assert layer.nbytes == 3 * 16 * (35 + 2 * 2 + 2 * 2)
    assert layer.compute == "W2A8 emulated: ternary weights, int8 activations, float32 products"


def test_a_packing_that_there_is_not() -> None:
    with pytest.raises(UsageError, match="packing 'tiny': choose from fast, small"):
        build_artifact(quantized(TEXT, {**SHAPES, "bu": (131,)}, FORMATS), packing="tiny")


def layer(weight_format: str) -> tuple[ir.Model, ir.Node]:
    text = "(float[b, 40] x) => (float[b, 16] y) { [q] y = MatMul(x, wq) }"
    model = quantized(text, {"wq": (40, 16)}, {"q": weight_format})
    return model, next(iter(model.graph))


def test_weights_that_are_not_of_the_format_are_refused() -> None:
    for weight_format, part, bad, message in (
        ("ternary", 1, np.full((40, 16), -2, np.int8), "codes of ternary are below 3"),
        ("int3", 1, np.full((40, 16), 8, np.uint8), "codes of int3 are below 8"),
        ("int8", 2, np.full((1, 16), np.nan, np.float16), "block_scale holds a number that is negative"),
        ("int2", 3, np.full((1, 16), np.inf, np.float16), "block_offset holds a number that is not finite"),
    ):
        model, node = layer(weight_format)
        node.inputs[part].const_value = ir.Tensor(bad)
        with pytest.raises(InputError, match=f"{node.op_type} node 'q': {message}"):
            lower(model.graph)


def test_a_mean_that_is_no_initializer_is_refused() -> None:
    model, node = layer("int2")
    node.replace_input_with(3, ir.Value(name="computed"))
    with pytest.raises(UnsupportedError, match="QLinearInt2 node 'q': codes, scales and offsets must be"):
        lower(model.graph)


def test_every_operator_has_its_kernel() -> None:
    from qgraph.codegen.lowering import supported_ops

    assert {f"ai.qgraph::{op}" for op in LINEARS} <= set(supported_ops())
