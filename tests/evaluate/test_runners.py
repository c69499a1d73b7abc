"""Runners: the same interface and the same results, clear errors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from qgraph.errors import InputError, UnsupportedError, UsageError
from qgraph.evaluate import runners
from qgraph.evaluate.runners import OnnxRuntimeRunner, ReferenceRunner, open_runner

TEXT = """
<ir_version: 10, opset_import: ["" : 23]> net (float[B, 4] x, float[B, 4] y) => (float[B, 4] sum, float[B, 3]
product) <float[4, 3] w = {1,2,3,4,5,6,7,8,9,10,11,12}> {
    sum = Add(x, y)
    product = MatMul(sum, w)
}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(TEXT), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.fixture
def fp4_model(tmp_path: Path) -> Path:
    proto = onnx.parser.parse_model(
        '<ir_version: 11, opset_import: ["" : 23]> net (float[2] x) => (float[2] y) { c = Cast <to = 23> (x) '
        "y = Cast <to = 1> (c) }"
    )
    onnx.save(proto, tmp_path / "fp4.onnx")
    return tmp_path / "fp4.onnx"


@pytest.mark.parametrize("engine", ["onnxruntime", "reference"])
def test_engines_agree(model: Path, engine: str):
    runner = open_runner(model, engine=engine, threads=1)
    assert (runner.name, runner.inputs, runner.outputs) == (engine, ("x", "y"), ("sum", "product"))
    x, y = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
    outputs = runner.run({"y": y, "x": x})
    w = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
    np.testing.assert_allclose(outputs["product"], (x + y) @ w, rtol=1e-5, atol=1e-5)
    assert np.array_equal(outputs["sum"], x + y)


@pytest.mark.parametrize("engine", ["onnxruntime", "reference"])
def test_wrong_inputs(model: Path, engine: str):
    runner = open_runner(model, engine=engine)
    x = np.ones((1, 4), np.float32)
    with pytest.raises(InputError, match=r"inputs missing y; unknown z: the model's are x, y"):
        runner.run({"x": x, "z": x})
    with pytest.raises(InputError, match=r"m\.onnx"):
        runner.run({"x": x, "y": np.ones((1, 5), np.float32)})


@pytest.mark.parametrize("engine", ["onnxruntime", "reference", "qgraph", ""])
def test_missing_file(tmp_path: Path, engine: str):
    with pytest.raises(InputError):
        open_runner(tmp_path / "none.onnx", engine=engine)


@pytest.mark.parametrize("runner", [OnnxRuntimeRunner, ReferenceRunner])
def test_damaged_file(tmp_path: Path, runner: type):
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x0a\x12not a model")
    with pytest.raises(InputError, match=r"bad\.onnx"):
        runner(tmp_path / "bad.onnx")


def test_what_onnx_runtime_lacks_is_unsupported_and_the_reference_runs_it(fp4_model: Path):
    with pytest.raises(UnsupportedError, match=r"fp4\.onnx: ONNX Runtime has no kernel"):
        OnnxRuntimeRunner(fp4_model)
    y = ReferenceRunner(fp4_model).run({"x": np.array([0.7, 5.1], np.float32)})["y"]
    assert np.array_equal(y, np.array([0.5, 6], np.float32))


def test_the_suffix_chooses_the_engine(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from qgraph import runtime

    loaded = []

    def load(path: Path, *, threads: int, device: str | None, public_key: bytes | None) -> SimpleNamespace:
        loaded.append((path, threads, device, public_key))
        tensor = SimpleNamespace(name="x", dtype=np.dtype(np.float32), shape=("n",))
        session = SimpleNamespace(run=lambda feeds: dict(feeds))
        return SimpleNamespace(
            inputs=[tensor], outputs=[tensor], has_state=False, session=lambda **options: session
        )

    monkeypatch.setattr(runtime, "load", load)
    assert open_runner(model).name == "onnxruntime"
    runner = open_runner(tmp_path / "m.qg", threads=3, device="cuda:1", public_key=b"key")
    assert runner.name == "qgraph" and runner.inputs == ("x",)
    assert loaded == [(tmp_path / "m.qg", 3, "cuda:1", b"key")]
    assert runner.run({"x": np.ones(1)})["x"] == 1


def test_only_artifacts_have_a_device(model: Path):
    assert open_runner(model, device="cpu").name == "onnxruntime"
    with pytest.raises(UsageError, match="reference runs on the CPU, and the device 'cuda' is for artifacts"):
        open_runner(model, engine="reference", device="cuda")


def test_only_artifacts_have_a_signature(model: Path):
    with pytest.raises(UsageError, match="onnxruntime knows no signatures"):
        open_runner(model, public_key=bytes(32))


def test_unknown_engine(model: Path):
    with pytest.raises(UsageError, match="unknown engine 'tensorrt'; known: qgraph, onnxruntime, ort, ref"):
        open_runner(model, engine="tensorrt")


def test_telemetry_is_off(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    OnnxRuntimeRunner(model)
    assert runners.os.environ["ORT_DISABLE_TELEMETRY"] == "1"
