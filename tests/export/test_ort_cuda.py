"""`--export ort-cuda`, as far as a CPU goes: what ONNX Runtime says of the file, and what the bytes stand
for."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from lowbit_models import dense, export_to, linear_model, lookup_model, random_weight, relative_error
from onnx import TensorProto, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidGraph, NotImplemented

from qgraph.evaluate.runners import OnnxRuntimeRunner
from qgraph.formats.activations import dynamic_int8, dynamic_nvfp4
from qgraph.passes.lowbit_weights import FORMS

FP4 = "MatMulBlockQuantizedFp4Weight"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
SHAPES = [(256, 34), (200, 33), (40, 5)]


def load_on_cpu(model: onnx.ModelProto) -> None:
    """Checks all nodes against their schemas, infers all types, then looks for kernels."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def in_bfloat16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The other type of the operator. Around nodes in float16 without a kernel ONNX Runtime puts Casts of
    its own, which end in an error about these."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.BFLOAT16
    return model


def tensors(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def only(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    (node,) = [node for node in model.graph.node if node.op_type == op_type]
    return node


@pytest.mark.parametrize(("K", "N"), SHAPES)
def test_only_the_kernel_is_missing(K: int, N: int, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    context = export_to(path, "ort-cuda", linear_model([random_weight("nvfp4", K, N)]))
    assert context.done == ["layer0"] and not context.notes
    onnx.checker.check_model(onnx.load(path), full_check=True)
    with pytest.raises(NotImplemented, match=rf"Could not find an implementation for {FP4}\(1\)"):
        load_on_cpu(in_bfloat16(onnx.load(path)))


def test_a_wrong_type_is_another_error(tmp_path: Path) -> None:
    """What the test before expects is not what ONNX Runtime says of anything."""
    export_to(tmp_path / "m.onnx", "ort-cuda", linear_model([random_weight("nvfp4", 64, 8)]))
    model = in_bfloat16(onnx.load(tmp_path / "m.onnx"))
    names = list(only(model, FP4).input)
    for tensor in model.graph.initializer:
        if tensor.name == names[2]:
            tensor.data_type = TensorProto.INT8
    with pytest.raises(InvalidGraph, match="Type Error"):
        load_on_cpu(model)


@pytest.mark.parametrize(("K", "N"), SHAPES)
def test_the_bytes_are_the_weight(K: int, N: int, tmp_path: Path) -> None:
    """By the operator's documentation: low nibble first, E4M3 bits for 16 inputs each, a float."""
    q = random_weight("nvfp4", K, N)
    export_to(tmp_path / "m.onnx", "ort-cuda", linear_model([q]))
    model = onnx.load(tmp_path / "m.onnx")
    node, arrays = only(model, FP4), tensors(model)
    B, scale, scale_2 = (arrays[name] for name in list(node.input)[1:])
    assert (B.dtype, B.shape) == (np.uint8, (N, K // 2))
    assert (scale.dtype, scale.shape) == (np.uint8, (N, -(-K // 16)))
    assert (scale_2.dtype, scale_2.shape) == (np.float32, ())
    codes = np.empty((N, K), int)
    codes[:, 0::2], codes[:, 1::2] = B & 15, B >> 4
    s = scale.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale_2
    W = E2M1[codes].astype(np.float32) * np.repeat(s, 16, axis=1)[:, :K]
    assert np.array_equal(W.T, q.dequantize())


def test_its_input_and_output_are_cast(tmp_path: Path) -> None:
    export_to(tmp_path / "m.onnx", "ort-cuda", linear_model([random_weight("nvfp4", 64, 8)]))
    model = onnx.load(tmp_path / "m.onnx")
    kinds = [(n.op_type, [a.i for a in n.attribute if a.name == "to"]) for n in model.graph.node]
    assert kinds == [("Cast", [TensorProto.FLOAT16]), (FP4, []), ("Cast", [TensorProto.FLOAT])]


def test_an_odd_number_of_inputs_stays_float(tmp_path: Path) -> None:
    weights = [random_weight("nvfp4", 33, 8), random_weight("int4", 33, 8)]
    context = export_to(tmp_path / "m.onnx", "ort-cuda", linear_model(weights))
    assert context.done == ["layer1"]
    assert [str(note) for note in context.notes] == [
        "layer0: ONNX Runtime's NVFP4 MatMul takes an even number of inputs, not 33"
    ]
    x = np.random.default_rng(0).standard_normal((1, 3, 33)).astype(np.float32)
    found = OnnxRuntimeRunner(tmp_path / "m.onnx").run({"x": x})
    assert relative_error(found["y0"], x.astype(np.float64) @ dense(weights[0])) < 1e-6


@pytest.mark.parametrize("format", [name for name in FORMS if name != "nvfp4"])
def test_other_formats_run_on_cpus_too(format: str, tmp_path: Path) -> None:
    """One MatMulNBits each, of as many bits as it needs."""
    for K, N in SHAPES:
        q = random_weight(format, K, N)
        export_to(tmp_path / "m.onnx", "ort-cuda", linear_model([q], "int8"))
        only(onnx.load(tmp_path / "m.onnx"), "MatMulNBits")
        x = np.random.default_rng(0).standard_normal((2, 5, K)).astype(np.float32)
        found = OnnxRuntimeRunner(tmp_path / "m.onnx").run({"x": x})["y0"]
        assert relative_error(found, dynamic_int8(x).astype(np.float64) @ dense(q)) < 2e-6


def test_nvfp4_activations(tmp_path: Path) -> None:
    """Standard operators, on float32."""
    model = linear_model([random_weight("int4", 40, 5)], "nvfp4")
    model.graph.outputs.append(model.graph[0].outputs[0])
    export_to(tmp_path / "m.onnx", "ort-cuda", model)
    x = np.random.default_rng(0).standard_normal((2, 5, 40)).astype(np.float32)
    found = OnnxRuntimeRunner(tmp_path / "m.onnx").run({"x": x})["x/nvfp4"]
    assert np.array_equal(found, dynamic_nvfp4(x, 2.0**-8))


@pytest.mark.parametrize("format", FORMS)
def test_columns_and_tables(format: str, tmp_path: Path) -> None:
    q = random_weight(format, 40, 33)
    ids = np.array([[0, 32, 2]])
    export_to(tmp_path / "m.onnx", "ort-cuda", lookup_model(q, columns=True))
    found = OnnxRuntimeRunner(tmp_path / "m.onnx").run({"ids": ids})["rows"]
    assert relative_error(found, dense(q)[:, ids]) < 2e-7
    if format == "nvfp4":
        export_to(tmp_path / "m.onnx", "ort-cuda", lookup_model(q, columns=False))
        found = OnnxRuntimeRunner(tmp_path / "m.onnx").run({"ids": ids})["rows"]
        assert np.array_equal(found, q.dequantize().T[ids])
