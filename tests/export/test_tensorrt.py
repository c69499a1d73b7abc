"""`--export tensorrt` beside the low-bit model, both in ONNX's reference evaluator. TensorRT itself is not
here."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from lowbit_models import (
    ACT_SCALE,
    dense,
    export_to,
    linear_model,
    lookup_model,
    random_weight,
    relative_error,
)
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from qgraph.errors import UnsupportedError, UsageError
from qgraph.export import Context, export_model, tensorrt
from qgraph.formats.activations import dynamic_nvfp4
from qgraph.passes.save import save_lowbit


class TRT_FP4DynamicQuantize(OpRun):  # noqa: N801 - the operator's name
    """x [.., K] -> E2M1 [.., K], E4M3 [.., K / 16], as the documentation of Model Optimizer has it."""

    op_domain = "trt"

    def _run(self, x, scale, axis=None, block_size=None, scale_type=None):
        assert (axis, block_size, scale_type) == (-1, 16, TensorProto.FLOAT8E4M3FN)
        blocks = x.reshape(*x.shape[:-1], -1, 16)
        amax = np.abs(blocks).max(axis=-1)
        stored = np.clip(amax / (np.float32(6) * scale), 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn)
        s = stored.astype(np.float32) * scale
        codes = np.clip(blocks / s[..., None], -6, 6).astype(ml_dtypes.float4_e2m1fn)
        return codes.reshape(x.shape), stored


def run(path: Path, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    evaluator = ReferenceEvaluator(model, new_ops=[TRT_FP4DynamicQuantize])
    return dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))


@pytest.mark.parametrize("rounded", [None, "nvfp4"])
def test_it_computes_what_the_low_bit_model_does(rounded: str | None, tmp_path: Path) -> None:
    for K, N in ((64, 33), (16, 5)):
        weights = [random_weight("nvfp4", K, N, seed) for seed in (0, 1)]
        save_lowbit(linear_model(weights, rounded), tmp_path / "lowbit.onnx")
        context = export_to(tmp_path / "m.onnx", "tensorrt", linear_model(weights, rounded))
        assert context.done == ["layer0", "layer1"] and not context.notes
        x = np.random.default_rng(0).standard_normal((2, 5, K)).astype(np.float32)
        x[0, 0] = 0
        found, wanted = run(tmp_path / "m.onnx", x=x), run(tmp_path / "lowbit.onnx", x=x)
        source = x if rounded is None else dynamic_nvfp4(x, ACT_SCALE)
        for i, q in enumerate(weights):
            assert relative_error(found[f"y{i}"], wanted[f"y{i}"]) < 1e-6
            assert relative_error(found[f"y{i}"], source.astype(np.float64) @ dense(q)) < 1e-6


def test_the_pattern(tmp_path: Path) -> None:
    """That of Model Optimizer: operators, attributes, types and shapes."""
    K, N = 64, 8
    export_to(tmp_path / "m.onnx", "tensorrt", linear_model([random_weight("nvfp4", K, N)], "nvfp4"))
    model = onnx.load(tmp_path / "m.onnx")
    assert [(node.domain, node.op_type) for node in model.graph.node] == [
        ("trt", "TRT_FP4DynamicQuantize"),
        *[("", "DequantizeLinear")] * 4,
        ("", "Transpose"),
        ("", "MatMul"),
    ]
    attributes = [{a.name: a.i for a in node.attribute} for node in model.graph.node]
    blocked = {"axis": -1, "block_size": 16}
    assert attributes[0] == blocked | {"scale_type": 17}
    assert attributes[1:5] == [{}, blocked, {}, blocked]
    types = {t.name: (t.data_type, list(t.dims)) for t in model.graph.initializer}
    weight, scale = model.graph.node[4].input[0], model.graph.node[3]
    assert types[weight] == (TensorProto.FLOAT4E2M1, [N, K])
    assert types[scale.input[0]] == (TensorProto.FLOAT8E4M3FN, [N, K // 16])
    assert types[scale.input[1]] == (TensorProto.FLOAT, [])
    assert {o.domain: o.version for o in model.opset_import} == {"": 23, "trt": 1} and model.ir_version == 11


def test_what_has_no_form_there_is_float(tmp_path: Path) -> None:
    weights = [random_weight("nvfp4", 64, 8), random_weight("int4", 64, 8)]
    context = export_to(tmp_path / "m.onnx", "tensorrt", linear_model(weights))
    assert context.done == ["layer0"]
    assert [str(note) for note in context.notes] == ["layer1: TensorRT has no int4 with blocks of 32"]
    x = np.random.default_rng(0).standard_normal((2, 5, 64)).astype(np.float32)
    found = run(tmp_path / "m.onnx", x=x)
    assert relative_error(found["y1"], x.astype(np.float64) @ dense(weights[1])) < 1e-6


def test_blocks_are_whole(tmp_path: Path) -> None:
    """The rounding goes with the layer: nothing of 16 is left over."""
    q = random_weight("nvfp4", 40, 8)
    context = export_to(tmp_path / "m.onnx", "tensorrt", linear_model([q], "nvfp4"))
    assert not context.done
    reason = "TensorRT takes FP4 in whole blocks of 16, and 40 inputs are not"
    assert [str(note) for note in context.notes] == [f"x/nvfp4: {reason}", f"layer0: {reason}"]
    assert [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node] == ["MatMul"]


@pytest.mark.parametrize("columns", [True, False])
def test_lookups_are_float(columns: bool, tmp_path: Path) -> None:
    q = random_weight("nvfp4", 64, 33)
    context = export_to(tmp_path / "m.onnx", "tensorrt", lookup_model(q, columns))
    assert [note.reason for note in context.notes] == ["TensorRT has FP4 in products alone, not in lookups"]
    ids = np.array([[0, 32]])
    found = run(tmp_path / "m.onnx", ids=ids)["rows"]
    wanted = q.dequantize()
    assert np.array_equal(found, wanted[:, ids] if columns else wanted.T[ids])


def test_a_file_without_any_form_is_refused(tmp_path: Path) -> None:
    save_lowbit(linear_model([random_weight("int4", 64, 8)]), tmp_path / "lowbit.onnx")
    with pytest.raises(UsageError, match="no low-bit form of any layer: TensorRT has no int4 with blocks"):
        export_model("tensorrt", tmp_path / "lowbit.onnx", Context())


def test_an_opset_that_it_does_not_read() -> None:
    model = linear_model([random_weight("nvfp4", 64, 8)])
    model.graph.opset_imports[""] = 26
    with pytest.raises(UnsupportedError, match="opset 26, TensorRT 11 reads 25"):
        tensorrt.export(model, Context())


def test_a_cache_is_refused(tmp_path: Path) -> None:
    from tiny_decoder import save_decoder

    from qgraph.passes import load_model, prepare_model

    model: ir.Model = prepare_model(load_model(save_decoder(tmp_path / "m.onnx", cache=True)))
    with pytest.raises(UnsupportedError, match="cache of keys and values"):
        tensorrt.export(model, Context())


def test_the_bytes_are_the_weight(tmp_path: Path) -> None:
    q = random_weight("nvfp4", 48, 7)
    export_to(tmp_path / "m.onnx", "tensorrt", linear_model([q]))
    held = {t.name: t for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    codes = numpy_helper.to_array(held["W0.fp4"]).astype(np.float32)
    block_scale = numpy_helper.to_array(held["W0.fp4_scale"]).astype(np.float32)
    s = block_scale * numpy_helper.to_array(held["W0.global_scale"])
    assert np.array_equal((codes * np.repeat(s, 16, axis=1)).T, q.dequantize())
