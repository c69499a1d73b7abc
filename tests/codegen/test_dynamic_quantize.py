"""Rounded activations: the kernels give the bits of the numpy functions, alone and in a whole artifact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from emulated import emulated_with
from end_to_end import parse, run_artifact
from kernel_harness import compile_kernel, link_kernel, native_isas, stack_bytes
from onnx.reference import ReferenceEvaluator

from qgraph.codegen import build_artifact
from qgraph.codegen.isa import ISAS, Isa
from qgraph.codegen.lowering import lower
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import UnsupportedError
from qgraph.formats import FORMATS
from qgraph.formats.activations import dynamic_int8, dynamic_nvfp4
from qgraph.formats.packing import pack_bits
from qgraph.passes import prepare_model
from qgraph.passes.lowbit_functions import DOMAIN, AddLowbitFunctions, InlineLowbitFunctions
from qgraph.passes.quantize_activations import quantize_input
from qgraph.solvers import get_solver

isas = pytest.mark.parametrize("isa", native_isas(), ids=lambda i: i.name)
all_isas = pytest.mark.parametrize("isa", ISAS.values(), ids=lambda i: i.name)
SPECS = {"nvfp4": KernelSpec.make("dynamic_nvfp4"), "int8": KernelSpec.make("dynamic_int8")}
SIZES = (1, 3, 15, 16, 17, 33, 64, 172, 384)
A = np.float32(0.003)


def awkward(K: int) -> npt.NDArray[np.float32]:
    """[64, K]: rows of every magnitude, zeros of both signs, ties, one huge element, NaN and infinities."""
    rng = np.random.default_rng(K)
    x = rng.standard_normal((64, K)) * np.exp(5 * rng.standard_normal((64, 1)))
    x[0], x[1] = 0.0, -0.0
    x[2] = rng.integers(-24, 25, K) / 4 * np.float64(A)  # ties of E2M1 where the block scale is 1
    x[2, 0] = 6 * np.float64(A)
    x[3] *= 1e-42 / np.abs(x[3]).max()
    x[4] *= 3e38 / np.abs(x[4]).max()
    x[5, K // 2] = 1e6
    x[6] = 6 * np.float64(A) * np.linspace(0.0005, 460, K)  # block scales from below 2^-9 to beyond 448
    x[7, K // 3] = 0.0
    x[8, -1], x[9, 0], x[10, K // 2] = np.nan, -np.inf, np.inf
    x[11] = np.nan
    return x.astype(np.float32)


def assert_same_bits(got: npt.NDArray[np.float32], want: npt.NDArray[np.float32]) -> None:
    """Equal, signs of zeros included; any NaN equals any other."""
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got[~nan].view(np.int32), want[~nan].view(np.int32))


def rounded(x: npt.NDArray[np.float32], activation_format: str, a: np.float32 = A) -> npt.NDArray[np.float32]:
    return dynamic_nvfp4(x, a) if activation_format == "nvfp4" else dynamic_int8(x)


def run(
    isa: Isa,
    activation_format: str,
    x: npt.NDArray[np.float32],
    a: np.float32 = A,
    split: tuple[int, ...] | None = None,
) -> npt.NDArray[np.float32]:
    y = np.full_like(x, -7)
    scale = [np.array([a], np.float32)] if activation_format == "nvfp4" else []
    compile_kernel(SPECS[activation_format], isa)(
        y, x.copy(), *scale, x.shape[1], blocks=len(x), split=split, guard=split is None
    )
    return y


@isas
@pytest.mark.parametrize("activation_format", SPECS)
@pytest.mark.parametrize("K", SIZES)
def test_the_bits_of_numpy(isa: Isa, activation_format: str, K: int) -> None:
    x = awkward(K)
    want = rounded(x, activation_format)
    assert_same_bits(run(isa, activation_format, x), want)
    assert_same_bits(run(isa, activation_format, x, split=(5, 1, 30)), want)


@isas
@pytest.mark.parametrize("a", [2.0**-126, 1e-20, 1.0, 1e30, 3e38])
def test_every_global_scale(isa: Isa, a: float) -> None:
    x = awkward(40)
    with np.errstate(all="ignore"):
        want = dynamic_nvfp4(x, a)
    assert_same_bits(run(isa, "nvfp4", x, np.float32(a)), want)


@isas
def test_every_block_scale(isa: Isa) -> None:
    """Each E4M3 number and each tie between two, one float32 to either side."""
    codes = np.arange(1, 127, dtype=np.uint8).view(FORMATS["nvfp4"].scale_dtype).astype(np.float32)
    amax = 6 * np.concatenate([codes, (codes[1:] + codes[:-1]) / 2, [2.0**-10, 2.0**-11, 449, 464, 480, 1e9]])
    amax = amax.astype(np.float32)
    x = np.stack([np.nextafter(amax, 0), amax, np.nextafter(amax, np.float32(np.inf))]).reshape(-1, 1)
    assert_same_bits(run(isa, "nvfp4", x, np.float32(1)), dynamic_nvfp4(x, 1.0))


@isas
def test_quotients_beside_every_tie(isa: Isa) -> None:
    """Rows of 16 whose scale is known: quotients one float32 around each tie of E2M1, of either sign."""
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 1e-30], np.float32)
    near = np.concatenate([np.nextafter(ties, 0), ties, np.nextafter(ties, np.float32(7))])
    near = np.concatenate([near, -near])
    x = np.zeros((len(near), 16), np.float32)
    x[:, 0], x[:, 1] = 6, near
    y = run(isa, "nvfp4", x, np.float32(1))
    assert_same_bits(y, dynamic_nvfp4(x, 1.0))
    assert set(np.abs(y[:, 1])) == {0, 0.5, 1, 1.5, 2, 3, 4, 6}


@all_isas
@pytest.mark.parametrize("activation_format", SPECS)
def test_links_and_stays_on_a_small_stack(isa: Isa, activation_format: str) -> None:
    assert link_kernel(SPECS[activation_format], isa).code
    assert stack_bytes(SPECS[activation_format], isa) < 4096


@emulated_with("activation_format", list(SPECS), [])
@pytest.mark.parametrize("K", [17, 172])
def test_the_bits_of_numpy_on_aarch64(isa: Isa, activation_format: str, K: int) -> None:
    """(armv7 has no subnormals for them.)"""
    x = awkward(K)
    assert_same_bits(run(isa, activation_format, x), rounded(x, activation_format))


# Whole models


def quantized_layers(activation_format: str, amax: dict[str, float]) -> ir.Model:
    """Two products that share an input, K = 172, and one of K = 64 behind them, all NVFP4."""
    rng = np.random.default_rng(0)
    shapes = {"wq": (172, 64), "wk": (172, 64), "wo": (64, 172)}
    weights = {n: (rng.standard_normal(s) / np.sqrt(s[0])).astype(np.float32) for n, s in shapes.items()}
    proto = parse(
        """(float[batch, sequence, 172] x) => (float[batch, sequence, 172] y) {
          [q] q = MatMul(x, wq) [k] k = MatMul(x, wk) [gate] s = Sigmoid(q) [mul] h = Mul(s, k)
          [o] o = MatMul(h, wo) [rest] y = Add(o, x) }""",
        weights,
    )
    model = prepare_model(ir.from_proto(proto))
    for node in [n for n in model.graph if n.op_type == "MatMul"]:
        value, weight = node.inputs
        q = get_solver("sweep")(weights[weight.name], name=weight.name)
        parts = {
            "codes": ir.PackedTensor(pack_bits(q.codes, 4), ir.DataType.FLOAT4E2M1, shape=q.codes.shape),
            "block_scale": ir.Tensor(q.block_scale, dtype=ir.DataType.FLOAT8E4M3FN),
            "global_scale": ir.Tensor(np.array(q.global_scale)),
        }
        stored = []
        for name, tensor in parts.items():
            stored.append(ir.Value(name=f"{weight.name}.{name}", const_value=tensor))
            stored[-1].type, stored[-1].shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape)
            model.graph.register_initializer(stored[-1])
        read = quantize_input(value, activation_format, amax[value.name])
        layer = ir.node("QLinearNVFP4", [read, *stored], domain=DOMAIN, name=node.name)
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [layer], node.outputs, layer.outputs
        )
        del model.graph.initializers[weight.name]
    AddLowbitFunctions()(model)
    return model


def dequantized(model: ir.Model, weight: str = "wo") -> npt.NDArray[np.float32]:
    """The weight by the standard's formula, in float32."""
    codes, block_scale, global_scale = (
        model.graph.initializers[f"{weight}.{part}"].const_value.numpy()
        for part in ("codes", "block_scale", "global_scale")
    )
    s = block_scale.astype(np.float32) * global_scale
    return codes.astype(np.float32) * np.repeat(s, 16, axis=0)[: len(codes)]


@pytest.mark.parametrize("activation_format", SPECS)
@pytest.mark.parametrize("style", ["function", "qdq"])
def test_a_whole_model(activation_format: str, style: str, tmp_path: Path) -> None:
    """From file to artifact: the rounded values bit for bit, the products as near as sums of float32 are."""
    model = quantized_layers(activation_format, {"x": 3.0, "h": 2.0})
    names = [f"{v}/{activation_format}" for v in "xh"]
    for node in tuple(model.graph):  # let the rounded values and what was rounded be seen
        if node.name in names:
            model.graph.outputs.extend([node.outputs[0], *([node.inputs[0]] if node.name[0] == "h" else [])])
    if style == "qdq":
        InlineLowbitFunctions()(model)
    proto = ir.to_proto(model)
    x = (np.random.default_rng(1).standard_normal((2, 3, 172)) * 1.5).astype(np.float32)
    want = dict(
        zip([o.name for o in proto.graph.output], ReferenceEvaluator(proto).run(None, {"x": x}), strict=True)
    )
    artifact = build_artifact(prepare_model(ir.from_proto(proto)))
    got = run_artifact(artifact, tmp_path, {"x": x})
    assert_same_bits(got[names[0]], want[names[0]])
    scale = np.float32(2.0 / (6 * 448))
    assert_same_bits(got[names[1]], rounded(got["h"], activation_format, scale))
    np.testing.assert_allclose(got["h"], want["h"], rtol=0, atol=1e-5)
    # The sums of h may differ in the last bit, and the rounding then make neighbours of them: what is rounded
    # here and what follows is held against these very sums.
    weight = dequantized(model)
    np.testing.assert_allclose(got["y"], got[names[1]] @ weight + x, rtol=0, atol=1e-5)
    found = {layer.node_name: layer.compute for layer in artifact.layers}
    label = {
        "nvfp4": "W4A4 emulated: NVFP4 weights and activations",
        "int8": "W4A8: NVFP4 weights, int8 activations, integer products",
    }
    assert all(found[name].startswith(label[activation_format]) for name in ("q", "k", "o"))
    # int8: once in float32, as an output, and once as codes.
    shown, read = ([name] * (1 + (activation_format == "int8")) for name in names)
    assert [layer.node_name for layer in artifact.layers] == [*shown, "q", "k", *read, "o"]


def test_rounded_values_are_codes_unless_somebody_else_reads_them() -> None:
    """Made once for q and k, in float32 for no linear layer; in float32 too for a reader that takes that."""
    model = quantized_layers("int8", {"x": 3.0, "h": 2.0})
    plain = [step.spec.op for step in lower(prepare_model(model).graph).steps]
    quantize, product = "quantize_int8", "matmul_nvfp4_a8"
    assert [op for op in plain if op != "elementwise"] == [quantize, product, product, quantize, product]
    model = quantized_layers("int8", {"x": 3.0, "h": 2.0})
    rounded = next(node for node in model.graph if node.name == "x/int8").outputs[0]
    rest = next(node for node in model.graph if node.op_type == "Add")
    rest.replace_input_with(1, rounded)
    both = [step.spec.op for step in lower(prepare_model(model).graph).steps]
    assert sorted(both) == sorted([*plain, "dynamic_int8"])


def test_a_strided_input_is_made_dense(tmp_path: Path) -> None:
    """The rounding of a transposed input goes along the new last axis."""
    model = ir.from_proto(
        parse(
            """(float[batch, 40, n] x) => (float[batch, n, 40] y) {
              t = Transpose<perm=[0, 2, 1]>(x) y = Neg(t) }""",
            {},
        )
    )
    prepare_model(model)
    turned = next(node for node in model.graph if node.op_type == "Transpose").outputs[0]
    (negative,) = (node for node in model.graph if node.op_type == "Neg")
    negative.replace_input_with(0, quantize_input(turned, "nvfp4", float(A) * 6 * 448))
    artifact = build_artifact(prepare_model(model))
    x = np.random.default_rng(0).standard_normal((2, 40, 5)).astype(np.float32)
    got = run_artifact(artifact, tmp_path, {"x": x})["y"]
    assert_same_bits(got, -dynamic_nvfp4(np.ascontiguousarray(x.transpose(0, 2, 1)), A))


def test_a_scale_that_is_no_initializer_is_refused() -> None:
    model = quantized_layers("nvfp4", {"x": 3.0, "h": 2.0})
    scale = model.graph.initializers.pop("x.act_scale")
    scale.const_value = None
    model.graph.inputs.append(scale)
    with pytest.raises(UnsupportedError, match="DynamicQDQNVFP4 node 'x/nvfp4': the global scale"):
        build_artifact(model)
