"""Compile a small ONNX graph the way the pipeline does, and run it beside ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from onnx import numpy_helper

import qgraph.runtime
from qgraph.codegen import Artifact, build_artifact
from qgraph.passes import prepare_model

os.environ["ORT_DISABLE_TELEMETRY"] = "1"


def parse(text: str, weights: Mapping[str, np.ndarray], opset: int = 23) -> onnx.ModelProto:
    """A model in ONNX's text form, with initializers."""
    model = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : {opset}]> agraph {text}')
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def compile_model(model: onnx.ModelProto) -> Artifact:
    """Prepare and build, nothing quantized."""
    return build_artifact(prepare_model(ir.from_proto(model)))


def run_artifact(
    artifact: Artifact, folder: Path, feeds: Mapping[str, np.ndarray], **options: object
) -> dict[str, np.ndarray]:
    """Write, load, run."""
    path = folder / "model.qg"
    artifact.write(path)
    with qgraph.runtime.load(path, **options) as model:  # type: ignore[arg-type]
        return model.run(dict(feeds))


def run_onnx(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same by ONNX Runtime, its optimisations off."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def assert_close(
    got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray], tolerance: float = 2e-6
) -> None:
    """Same names, dtypes, shapes; integers equal, floats within `tolerance` of the largest finite value."""
    assert list(got) == list(want)
    for name, reference in want.items():
        value = got[name]
        assert value.dtype == reference.dtype and value.shape == reference.shape, name
        if reference.dtype.kind != "f":
            np.testing.assert_array_equal(value, reference, err_msg=name)
            continue
        finite = np.isfinite(reference)
        scale = np.abs(reference[finite]).max(initial=1e-30)
        np.testing.assert_array_equal(np.isnan(value), np.isnan(reference), err_msg=name)
        np.testing.assert_allclose(value, reference, rtol=0, atol=tolerance * scale, err_msg=name)
