"""The ONNX form of every integer and ternary format: against ONNX's checker and reference evaluator."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from qgraph.errors import InputError
from qgraph.formats import FORMATS, QTensor
from qgraph.passes import prepare_model
from qgraph.passes.lowbit_functions import DOMAIN, AddLowbitFunctions, InlineLowbitFunctions
from qgraph.passes.lowbit_weights import FORMS, from_arrays, from_node, to_arrays, to_tensors
from qgraph.passes.recognize_lowbit import RecognizeLowbit

GROUPS = [name for name in FORMS if name != "nvfp4"]
SHAPES = [(1, 1), (32, 16), (129, 3), (172, 5), (200, 7)]


def random_weight(format: str, shape: tuple[int, int]) -> QTensor:
    """Any codes, scales and offsets that the format has."""
    rng, spec, (K, N) = np.random.default_rng(0), FORMATS[format], shape
    levels, blocks = len(spec.values), (spec.blocks(K), N)
    offsets = {
        "none": None,
        "zero_point": rng.integers(0, levels, blocks).astype(np.uint8),
        "mean": rng.standard_normal(blocks).astype(np.float16),
    }
    scale = rng.uniform(1e-3, 3, blocks).astype(np.float16)
    codes = rng.integers(0, levels, shape).astype(np.uint8)
    return QTensor(format, shape, codes, scale, block_offset=offsets[spec.offset])


def layer(q: QTensor, opset: int = 23) -> ir.Model:
    """y = x @ W, one low-bit node."""
    K, N = q.shape
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", K]))
    parts = [
        ir.Value(name=t.name, type=ir.TensorType(t.dtype), shape=ir.Shape(t.shape.numpy()), const_value=t)
        for t in to_tensors(q, "w")
    ]
    node = ir.node(FORMS[q.format].linear, [x, *parts], domain=DOMAIN, name="layer")
    (y,) = node.outputs
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", N])
    graph = ir.Graph([x], [y], nodes=[node], initializers=parts, opset_imports={"": opset}, name="layer")
    model = ir.Model(graph, ir_version=11)
    AddLowbitFunctions()(model)
    return model


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return ReferenceEvaluator(proto).run(None, {"x": x})[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", GROUPS)
def test_the_body_is_the_weight_bit_for_bit(format: str, shape: tuple[int, int]):
    q = random_weight(format, shape)
    unit = np.eye(shape[0], dtype=np.float32)
    model = layer(q)
    assert run(model, unit).tobytes() == q.dequantize().tobytes()
    InlineLowbitFunctions()(model)
    assert DOMAIN not in model.graph.opset_imports
    assert run(model, unit).tobytes() == q.dequantize().tobytes()


@pytest.mark.parametrize("format", GROUPS)
def test_opset_and_ir_version_are_the_lowest_that_have_the_type(format: str):
    model = layer(random_weight(format, (40, 3)))
    two_bits = format in ("ternary", "int2")
    assert (model.graph.opset_imports[""], model.ir_version) == ((25, 13) if two_bits else (23, 11))
    assert all(f.opset_imports[""] == model.graph.opset_imports[""] for f in model.functions.values())
    assert layer(random_weight(format, (40, 3)), opset=26).graph.opset_imports[""] == 26


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", list(FORMS))
def test_to_onnx_and_to_arrays_and_back(format: str, shape: tuple[int, int]):
    if format == "nvfp4":
        from qgraph.solvers import get_solver

        q = get_solver("rtn")(np.random.default_rng(1).standard_normal(shape).astype(np.float32))
    else:
        q = random_weight(format, shape)
    for back in (from_node(next(iter(layer(q).graph))), from_arrays(format, shape, to_arrays(q))):
        assert np.array_equal(back.codes, q.codes) and back.global_scale == q.global_scale
        assert back.block_scale.tobytes() == q.block_scale.tobytes()
        assert (back.block_offset is None) == (q.block_offset is None)
        if q.block_offset is not None:
            assert np.array_equal(back.block_offset, q.block_offset)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", GROUPS)
def test_bytes_in_the_file(format: str, shape: tuple[int, int]):
    """What the table says, and but for the 3-bit codes, which take 4, what the format says."""
    q = random_weight(format, shape)
    stored = sum(len(value.raw_data) for value in ir.to_proto(layer(q)).graph.initializer)
    assert stored == FORMS[format].nbytes(*shape)
    if format != "int3":
        assert stored == q.nbytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", GROUPS)
def test_written_out_it_is_recognised(format: str, shape: tuple[int, int]):
    q = random_weight(format, shape)
    model = layer(q)
    InlineLowbitFunctions()(model)
    model = prepare_model(ir.from_proto(ir.to_proto(model)))
    (node,) = model.graph
    assert (node.op_type, node.name) == (FORMS[format].linear, "layer")
    assert from_node(node).dequantize().tobytes() == q.dequantize().tobytes()


def find(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op_type)


@pytest.mark.parametrize(
    ("format", "bits"), [("ternary", 2), ("int2", 2), ("int3", 4), ("int4", 4), ("int4-sym", 4), ("int8", 8)]
)
@pytest.mark.parametrize("spoiled", ["block_size", "axis", "mean", "scale"])
def test_other_integer_weights_stay_and_are_refused(format: str, bits: int, spoiled: str):
    model = layer(random_weight(format, (172, 5)))
    InlineLowbitFunctions()(model)
    if spoiled == "mean" and FORMATS[format].offset != "mean":
        return
    reason = "is not its"
    if spoiled == "scale":
        scale = model.graph.initializers["w.block_scale"]
        assert scale.const_value is not None
        scale.const_value = ir.tensor(np.full_like(scale.const_value.numpy(), np.nan))
        reason = "block_scale holds a number that is negative or not finite"
    elif spoiled == "mean":  # of other inputs than the scales
        numbers = find(model, "Div").inputs[1]
        numbers.producer().attributes.add(ir.AttrTensor("value", ir.tensor(np.array([64]))))
    else:
        find(model, "DequantizeLinear").attributes.add(ir.AttrInt64(spoiled, 64 if spoiled[0] == "b" else 1))
    before = [node.op_type for node in model.graph]
    recognize = RecognizeLowbit()
    assert not recognize(model).modified and [node.op_type for node in model.graph] == before
    (refusal,) = recognize.refusals
    assert f"{bits}-bit weights, but not as QLinear" in refusal.reason and reason in refusal.reason


def test_a_weight_that_a_caller_gives_stays():
    model = layer(random_weight("int4", (40, 3)))
    InlineLowbitFunctions()(model)
    codes = model.graph.initializers["w.codes"]
    model.graph.inputs.append(codes)
    assert not RecognizeLowbit()(model).modified


def test_parts_that_do_not_fit_are_refused_when_shapes_are_inferred():
    model = layer(random_weight("int4", (64, 3)))
    scale = model.graph.initializers["w.block_scale"]
    scale.const_value = ir.tensor(np.ones((3, 3), np.float16))
    scale.shape = ir.Shape((3, 3))
    with pytest.raises(InputError, match=r"block scales \[3, 3\] do not fit codes \[64, 3\] in blocks of 32"):
        prepare_model(model)
