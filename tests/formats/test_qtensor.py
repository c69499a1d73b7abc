"""QTensor, and the scale arithmetic of NVFP4 and MXFP4, against ONNX's reference evaluator and numpy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from qgraph.errors import InputError
from qgraph.formats import FORMATS, QTensor, e4m3, e8m0, mxfp4, nvfp4
from qgraph.formats.block import block_amax
from qgraph.formats.packing import pack_bits

SHAPES = [(1, 1), (3, 5), (16, 1), (17, 3), (32, 64), (40, 31), (100, 7)]


def random_qtensor(K: int, N: int, seed: int = 0) -> QTensor:
    rng = np.random.default_rng(seed)
    scale = e4m3.from_codes(rng.integers(0, e4m3.MAX_CODE + 1, (-(-K // 16), N)).astype(np.uint8))
    codes = rng.integers(0, 16, (K, N)).astype(np.uint8)
    return QTensor("nvfp4", (K, N), codes, scale, np.float32(rng.uniform(1e-6, 3)))


def onnx_dequantize(q: QTensor) -> np.ndarray:
    """The two DequantizeLinear nodes of the low-bit file, run by ONNX's reference evaluator."""
    K, N = q.shape
    blocks, packed = -(-K // 16), pack_bits(q.codes, 4).tobytes()
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["block_scale", "global_scale"], ["s"]),
            helper.make_node("DequantizeLinear", ["codes", "s"], ["w"], axis=0, block_size=16),
        ],
        "dequantize",
        [],
        [helper.make_tensor_value_info("w", TensorProto.FLOAT, [K, N])],
        [
            helper.make_tensor("codes", TensorProto.FLOAT4E2M1, [K, N], packed, raw=True),
            helper.make_tensor(
                "block_scale", TensorProto.FLOAT8E4M3FN, [blocks, N], q.block_scale.tobytes(), raw=True
            ),
            helper.make_tensor("global_scale", TensorProto.FLOAT, [], [float(q.global_scale)]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    return ReferenceEvaluator(model).run(None, {})[0]


def random_mxfp4(K: int, N: int, codes: tuple[int, int] = (90, 160)) -> QTensor:
    rng = np.random.default_rng(0)
    scale = e8m0.from_codes(rng.integers(*codes, (-(-K // 32), N)).astype(np.uint8))
    return QTensor("mxfp4", (K, N), rng.integers(0, 16, (K, N)).astype(np.uint8), scale, np.float32(1))


def blocked_model(op: str, K: int, N: int, **attributes: int) -> onnx.ModelProto:
    """One (De)QuantizeLinear of MXFP4: codes and E8M0 scales to float32, or back. Opset 24 has E8M0."""
    types = {"x": TensorProto.FLOAT4E2M1, "y": TensorProto.FLOAT}
    if op == "QuantizeLinear":
        types = {"x": TensorProto.FLOAT, "y": TensorProto.FLOAT4E2M1}
    node = helper.make_node(op, ["x", "s"], ["y"], axis=0, block_size=32, **attributes)
    inputs = [
        helper.make_tensor_value_info("x", types["x"], [K, N]),
        helper.make_tensor_value_info("s", TensorProto.FLOAT8E8M0, [-(-K // 32), N]),
    ]
    graph = helper.make_graph(
        [node], "mxfp4", inputs, [helper.make_tensor_value_info("y", types["y"], [K, N])]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("shape", [*SHAPES, (33, 5), (64, 3)])
def test_mxfp4_dequantize_is_onnx_bit_for_bit(shape: tuple[int, int]):
    q = random_mxfp4(*shape)
    model = blocked_model("DequantizeLinear", *shape, output_dtype=TensorProto.FLOAT)
    feeds = {"x": q.codes.view(ml_dtypes.float4_e2m1fn), "s": q.block_scale}
    (expected,) = ReferenceEvaluator(model).run(None, feeds)
    assert expected.dtype == np.float32 and q.dequantize().tobytes() == expected.tobytes()


def test_mxfp4_dequantize_at_the_ends_of_its_scales():
    q = random_mxfp4(64, 4, codes=(0, 3))
    values = q.codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    exact = values * np.repeat(2.0 ** (q.block_scale.view(np.uint8).astype(int) - 127), 32, axis=0)
    assert np.array_equal(q.dequantize(), exact)  # 2^-127 / 2 is a subnormal float32


@pytest.mark.parametrize("shape", [*SHAPES, (33, 5), (64, 3)])
def test_mxfp4_quantize_is_onnx_quantize_linear(shape: tuple[int, int]):
    K, N = shape
    rng = np.random.default_rng(4)
    W = rng.standard_normal(shape).astype(np.float32) * 5
    W[0, 0] = 0.25
    s = e8m0.from_codes(rng.integers(124, 130, (-(-K // 32), N)).astype(np.uint8))
    model = blocked_model("QuantizeLinear", K, N, output_dtype=TensorProto.FLOAT4E2M1)
    (expected,) = ReferenceEvaluator(model).run(None, {"x": W, "s": s})
    assert np.array_equal(mxfp4.quantize(W, s), np.asarray(expected).view(np.uint8))


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_is_onnx_bit_for_bit(shape: tuple[int, int]):
    q = random_qtensor(*shape)
    assert q.dequantize().tobytes() == onnx_dequantize(q).tobytes()


def test_dequantize_is_the_formula():
    q = random_qtensor(35, 6, seed=1)
    values = q.codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    for k in range(35):
        for n in range(6):
            s = np.float32(q.block_scale[k // 16, n]) * q.global_scale
            assert q.dequantize()[k, n] == values[k, n] * s


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_count_everything(shape: tuple[int, int]):
    K, N = shape
    q = random_qtensor(K, N)
    stored = pack_bits(q.codes, 4).nbytes + q.block_scale.nbytes + q.global_scale.nbytes
    assert q.nbytes() == stored
    assert q.bits_per_weight() == 8 * stored / (K * N)
    q = random_mxfp4(K, N)  # has no global scale to store
    assert q.nbytes() == pack_bits(q.codes, 4).nbytes + q.block_scale.nbytes


def test_bits_per_weight_of_a_real_layer():
    assert random_qtensor(384, 384).bits_per_weight() == pytest.approx(4.5, abs=1e-3)
    assert random_mxfp4(384, 384).bits_per_weight() == 4.25


def test_formats_are_listed_by_name():
    assert all(name == spec.name for name, spec in FORMATS.items())
    assert list(FORMATS) == ["nvfp4", "mxfp4", "ternary", "int2", "int3", "int4", "int4-sym", "int8"]


@pytest.mark.parametrize("a", [2.0, 0.5])
def test_mxfp4_has_no_global_scale(a: float):
    q = random_mxfp4(32, 2)
    with pytest.raises(InputError, match="mxfp4 has no global scale: it is 1"):
        QTensor("mxfp4", q.shape, q.codes, q.block_scale, np.float32(a))


def test_mxfp4_scale_that_is_nan_is_refused():
    q = random_mxfp4(32, 2)
    with pytest.raises(InputError, match="not finite"):
        QTensor("mxfp4", q.shape, q.codes, e8m0.from_codes(np.full((1, 2), 255, np.uint8)), np.float32(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "int5"}, "unknown weight format"),
        ({"shape": (16,)}, "shape"),
        ({"codes": np.zeros((16, 3), np.uint8)}, "codes is uint8"),
        ({"codes": np.zeros((16, 4), np.int8)}, "codes is uint8"),
        ({"codes": np.full((16, 4), 16, np.uint8)}, "below 16"),
        ({"block_scale": np.ones((1, 4), np.float32)}, "block_scale is float8"),
        ({"block_scale": e4m3.from_codes(np.full((2, 4), 56, np.uint8))}, "block_scale is"),
        ({"block_scale": e4m3.from_codes(np.full((1, 4), 127, np.uint8))}, "not finite"),
        ({"block_scale": e4m3.from_codes(np.full((1, 4), 129, np.uint8))}, "negative"),
        ({"global_scale": np.float32(0)}, "global_scale"),
        ({"global_scale": np.float32(np.nan)}, "global_scale"),
        ({"global_scale": np.float32(np.inf)}, "global_scale"),
        ({"global_scale": 1.0}, "global_scale"),
        ({"block_offset": np.zeros((1, 4), np.float16)}, "nvfp4 has no block offsets"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict, message: str):
    good = {
        "format": "nvfp4",
        "shape": (16, 4),
        "codes": np.zeros((16, 4), np.uint8),
        "block_scale": e4m3.from_codes(np.full((1, 4), 56, np.uint8)),
        "global_scale": np.float32(1),
    }
    QTensor(**good)
    with pytest.raises(InputError, match=message):
        QTensor(**(good | change))


@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_is_onnx_quantize_linear(shape: tuple[int, int]):
    """Codes at given scales are those of ONNX's blocked QuantizeLinear, ties and saturation included."""
    rng = np.random.default_rng(4)
    K, N = shape
    W = rng.standard_normal(shape).astype(np.float32) * 5
    W[0, 0] = 0.25  # a tie at scale 1
    d = e4m3.from_codes(rng.integers(40, 70, (-(-K // 16), N)).astype(np.uint8))
    a = np.float32(1)
    s = nvfp4.scales(d, a)
    node = helper.make_node(
        "QuantizeLinear", ["w", "s"], ["q"], axis=0, block_size=16, output_dtype=TensorProto.FLOAT4E2M1
    )
    graph = helper.make_graph(
        [node],
        "quantize",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, v.shape) for n, v in (("w", W), ("s", s))],
        [helper.make_tensor_value_info("q", TensorProto.FLOAT4E2M1, [K, N])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    (q,) = ReferenceEvaluator(model).run(None, {"w": W, "s": s})
    assert np.array_equal(nvfp4.quantize(W, d, a), np.asarray(q).view(np.uint8))


@pytest.mark.parametrize("shape", SHAPES)
def test_block_amax(shape: tuple[int, int]):
    W = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    K, N = shape
    expected = [[np.abs(W[b : b + 16, n]).max() for n in range(N)] for b in range(0, K, 16)]
    assert np.array_equal(block_amax(W, 16), np.array(expected, np.float32))
