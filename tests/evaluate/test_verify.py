"""The stage that compares an artifact with its low-bit ONNX file can fail, and says where."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

import qgraph
from qgraph.errors import BudgetError
from qgraph.evaluate.verify import verify

sys.path.insert(0, str(Path(__file__).parent.parent / "cli"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> qgraph.pipeline.CompileResult:
    from tiny_model import save_tiny

    folder = tmp_path_factory.mktemp("verify")
    return qgraph.compile(save_tiny(folder / "tiny.onnx", layers=1), output=folder / "out", verify=False)


def test_what_belongs_together_agrees(built: qgraph.pipeline.CompileResult) -> None:
    assert built.artifact is not None and built.onnx is not None
    found = verify(built.artifact, built.onnx)
    assert found.status == "passed"
    assert 0 < found.worst < found.limit


@pytest.mark.parametrize("weight", ["layer.0.up.weight.global_scale", "layer.0.out.bias", "norm.weight"])
def test_a_changed_weight_is_found(weight: str, built: qgraph.pipeline.CompileResult, tmp_path: Path) -> None:
    """One number off by one part in a hundred."""
    assert built.artifact is not None and built.onnx is not None
    model = onnx.load(built.onnx)
    tensor = next(t for t in model.graph.initializer if t.name == weight)
    values = numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[0] *= 1.01
    tensor.CopyFrom(numpy_helper.from_array(values, weight))
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(BudgetError, match="output 'hidden' at batch=2 sequence=7 has a relative error of"):
        verify(built.artifact, tmp_path / "changed.onnx")


def test_a_limit_that_float32_cannot_meet(built: qgraph.pipeline.CompileResult) -> None:
    assert built.artifact is not None and built.onnx is not None
    with pytest.raises(BudgetError):
        verify(built.artifact, built.onnx, limit=1e-12)
