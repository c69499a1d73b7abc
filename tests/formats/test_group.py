"""Integer and ternary weights in groups: against ONNX's reference evaluator, and what they take to store."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from qgraph.errors import InputError
from qgraph.formats import FORMATS, BlockFormat, QTensor
from qgraph.formats.group import GROUP_FORMATS, SMALLEST_SCALE
from qgraph.formats.packing import pack_bits
from qgraph.solvers import GROUP_NAMES

SHAPES = [
    (1, 1),
    (3, 5),
    (31, 2),
    (32, 7),
    (33, 3),
    (127, 4),
    (128, 3),
    (129, 5),
    (172, 3),
    (200, 1),
    (300, 9),
]
every_format = pytest.mark.parametrize("spec", GROUP_FORMATS, ids=lambda spec: spec.name)

# ONNX type of the codes, its bits, and the level that the type's zero stands for less that of code 0.
TYPES = {
    "ternary": (TensorProto.INT2, 2, 1),
    "int2": (TensorProto.UINT2, 2, 0),
    "int3": (TensorProto.UINT4, 4, 0),
    "int4": (TensorProto.UINT4, 4, 0),
    "int4-sym": (TensorProto.INT4, 4, 8),
    "int8": (TensorProto.INT8, 8, 128),
}


def random_qtensor(spec: BlockFormat, K: int, N: int, exponents: tuple[int, int] = (-10, 4)) -> QTensor:
    rng = np.random.default_rng(0)
    blocks = (spec.blocks(K), N)
    codes = rng.integers(0, len(spec.values), (K, N)).astype(np.uint8)
    scale = (rng.uniform(1, 2, blocks) * 2.0 ** rng.integers(*exponents, blocks)).astype(np.float16)
    offset = None
    if spec.offset == "zero_point":
        offset = rng.integers(0, len(spec.values), blocks).astype(np.uint8)
    elif spec.offset == "mean":
        offset = np.clip(rng.standard_normal(blocks) * scale, -65504, 65504).astype(np.float16)
    return QTensor(spec.name, (K, N), codes, scale, block_offset=offset)


def onnx_dequantize(spec: BlockFormat, q: QTensor) -> np.ndarray:
    """A blocked DequantizeLinear and, for a mean, an Add, run by ONNX's reference evaluator."""
    kind, bits, zero = TYPES[spec.name]
    stored = ((q.codes.astype(np.int16) - zero) & ((1 << bits) - 1)).astype(np.uint8)
    tensors = [
        helper.make_tensor("codes", kind, q.shape, pack_bits(stored, bits).tobytes(), raw=True),
        helper.make_tensor(
            "scale", TensorProto.FLOAT16, q.block_scale.shape, q.block_scale.tobytes(), raw=True
        ),
    ]
    inputs = ["codes", "s"]
    nodes = [helper.make_node("Cast", ["scale"], ["s"], to=TensorProto.FLOAT)]
    if spec.offset == "zero_point":
        packed = pack_bits(q.block_offset, bits).tobytes()
        tensors.append(helper.make_tensor("zero", kind, q.block_offset.shape, packed, raw=True))
        inputs.append("zero")
    nodes.append(helper.make_node("DequantizeLinear", inputs, ["w"], axis=0, block_size=spec.block))
    if spec.offset == "mean":
        tensors += [
            helper.make_tensor(
                "mean", TensorProto.FLOAT16, q.block_offset.shape, q.block_offset.tobytes(), raw=True
            ),
            helper.make_tensor("block", TensorProto.INT64, q.shape[:1], np.arange(q.shape[0]) // spec.block),
        ]
        nodes += [
            helper.make_node("Cast", ["mean"], ["m"], to=TensorProto.FLOAT),
            helper.make_node("Gather", ["m", "block"], ["rows"], axis=0),
            helper.make_node("Add", ["w", "rows"], ["sum"]),
        ]
    output = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, q.shape)
    graph = helper.make_graph(nodes, "dequantize", [], [output], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=13)
    onnx.checker.check_model(model, full_check=True)
    (result,) = ReferenceEvaluator(model).run(None, {})
    assert result.dtype == np.float32
    return result


@every_format
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_dequantize_is_onnx_bit_for_bit(spec: BlockFormat, shape: tuple[int, int]):
    q = random_qtensor(spec, *shape)
    assert q.dequantize().tobytes() == onnx_dequantize(spec, q).tobytes()


@every_format
@pytest.mark.parametrize("exponents", [(-24, -14), (14, 15)])
def test_dequantize_at_the_ends_of_float16(spec: BlockFormat, exponents: tuple[int, int]):
    q = random_qtensor(spec, 2 * spec.block + 5, 6, exponents)
    back = q.dequantize()
    assert np.isfinite(back).all() and back.tobytes() == onnx_dequantize(spec, q).tobytes()


@every_format
def test_dequantize_is_the_formula(spec: BlockFormat):
    q = random_qtensor(spec, spec.block + 3, 4)
    back = q.dequantize()
    lowest = {"ternary": -1, "int4-sym": -8, "int8": -128}.get(spec.name, 0)
    for k in range(q.shape[0]):
        for n in range(q.shape[1]):
            at = k // spec.block, n
            level, s = lowest + int(q.codes[k, n]), np.float32(q.block_scale[at])
            if spec.offset == "zero_point":
                level -= lowest + int(q.block_offset[at])
            expected = np.float32(level) * s
            if spec.offset == "mean":
                expected += np.float32(q.block_offset[at])
            assert back[k, n] == expected


@every_format
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_sizes_count_everything(spec: BlockFormat, shape: tuple[int, int]):
    K, N = shape
    q = random_qtensor(spec, K, N)
    bits = {"ternary": 2, "int2": 2, "int3": 3, "int4": 4, "int4-sym": 4, "int8": 8}[spec.name]
    stored = -(-K * N * bits // 8) + q.block_scale.nbytes
    if spec.offset == "mean":
        stored += q.block_offset.nbytes
    elif spec.offset == "zero_point":
        stored += pack_bits(q.block_offset, bits).nbytes
    assert q.nbytes() == stored and q.bits_per_weight() == 8 * stored / (K * N)


def test_bits_per_weight_of_a_real_layer():
    found = {spec.name: random_qtensor(spec, 384, 384).bits_per_weight() for spec in GROUP_FORMATS}
    assert found == {
        "ternary": 2 + 32 / 128,
        "int2": 2 + 32 / 128,
        "int3": 3 + 32 / 128,
        "int4": 4 + (16 + 4) / 32,
        "int4-sym": 4 + 16 / 32,
        "int8": 8 + 16 / 128,
    }


def test_the_names_that_load_no_numpy_are_the_formats():
    assert tuple(spec.name for spec in GROUP_FORMATS) == GROUP_NAMES
    assert all(FORMATS[spec.name] is spec for spec in GROUP_FORMATS)
    assert np.float16(SMALLEST_SCALE) > 0 and np.float16(SMALLEST_SCALE / 2.1) == 0


@every_format
def test_parts_that_do_not_fit_are_refused(spec: BlockFormat):
    q = random_qtensor(spec, spec.block + 1, 3)
    good = {
        "format": spec.name,
        "shape": q.shape,
        "codes": q.codes,
        "block_scale": q.block_scale,
        "block_offset": q.block_offset,
    }
    QTensor(**good)
    low, high = q.codes.copy(), q.block_scale.copy()
    changes = [
        ({"block_scale": q.block_scale.astype(np.float32)}, "block_scale is float16"),
        ({"block_scale": q.block_scale[:1]}, r"block_scale is float16 \[2, 3\]"),
        ({"block_scale": np.full_like(high, -1)}, "negative or not finite"),
        ({"block_scale": np.full_like(high, np.nan)}, "negative or not finite"),
        ({"block_scale": np.full_like(high, np.inf)}, "negative or not finite"),
        ({"global_scale": np.float32(2)}, f"{spec.name} has no global scale"),
    ]
    if len(spec.values) < 256:
        low[0, 0] = len(spec.values)
        changes.append(({"codes": low}, f"codes of {spec.name} are below {len(spec.values)}"))
    if spec.offset == "none":
        changes.append(({"block_offset": np.zeros((2, 3), np.float16)}, f"{spec.name} has no block offsets"))
    else:
        other = np.float16 if spec.offset == "zero_point" else np.uint8
        name = np.dtype(spec.offset_dtype).name
        changes += [
            ({"block_offset": None}, f"{spec.name} needs block offsets"),
            ({"block_offset": q.block_offset.astype(other)}, f"block_offset is {name}"),
            ({"block_offset": q.block_offset[:1]}, rf"block_offset is {name} \[2, 3\]"),
        ]
    if spec.offset == "zero_point":
        beyond = np.full_like(q.block_offset, len(spec.values))
        changes.append(({"block_offset": beyond}, f"zero points of {spec.name} are below"))
    elif spec.offset == "mean":
        changes += [
            ({"block_offset": np.full_like(q.block_offset, bad)}, "block_offset holds a number that is not")
            for bad in (np.nan, np.inf)
        ]
    for change, message in changes:
        with pytest.raises(InputError, match=message):
            QTensor(**(good | change))
