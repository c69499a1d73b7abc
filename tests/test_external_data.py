"""A float model whose weights lie in a file beside it: what is made of it stands alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qgraph


@pytest.mark.parametrize("scheme", ["none", "nvfp4"])
@pytest.mark.parametrize("external_from", [0, 1 << 30])  # bytes from which the low-bit file has its own
def test_it_is_compiled(
    scheme: str, external_from: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantized weights, and a bias that stays as it is, without the files they came from."""
    monkeypatch.setattr("qgraph.passes.save.EXTERNAL_DATA_FROM", external_from)
    rng = np.random.default_rng(0)
    weights = {"W": rng.standard_normal((64, 512), np.float32), "b": rng.standard_normal(512, np.float32)}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "W"], ["h"], name="layer"),
            helper.make_node("Add", ["h", "b"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 512])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    source, target = tmp_path / "from" / "float.onnx", tmp_path / "to"
    source.parent.mkdir()
    target.mkdir()
    onnx.save(model, source, save_as_external_data=True, location="float.data", size_threshold=0)
    assert (source.parent / "float.data").stat().st_size >= 4 * 512 * 65

    made = qgraph.compile(source, scheme=scheme, output=target / "low", threads=1)
    assert made.onnx
    (source.parent / "float.data").unlink()
    x = rng.standard_normal((3, 64), np.float32)
    found = made.load(threads=1).run({"x": x})["y"]
    expected = x @ weights["W"] + weights["b"]
    assert np.linalg.norm(found - expected) < (0.15 if scheme == "nvfp4" else 1e-5) * np.linalg.norm(expected)
    again = qgraph.build(made.onnx, output=target / "again", threads=1)
    assert again.artifact
    np.testing.assert_array_equal(again.load(threads=1).run({"x": x})["y"], found)
