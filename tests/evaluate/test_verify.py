"""The stage that compares an artifact with its low-bit ONNX file can fail, and says where."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

import qgraph
from qgraph.errors import BudgetError
from qgraph.evaluate.verify import verify
from qgraph.pipeline import build_exposed

sys.path.insert(0, str(Path(__file__).parent.parent / "cli"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> qgraph.pipeline.CompileResult:
    from tiny_model import save_tiny

    folder = tmp_path_factory.mktemp("verify")
    return qgraph.compile(save_tiny(folder / "tiny.onnx", layers=1), output=folder / "out", verify=False)


def one_number_off(lowbit: Path, weight: str, folder: Path) -> Path:
    """A copy of the file in which the first number of `weight` is off by one part in a hundred."""
    model = onnx.load(lowbit)
    tensor = next(t for t in model.graph.initializer if t.name == weight)
    values = numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[0] *= 1.01
    tensor.CopyFrom(numpy_helper.from_array(values, weight))
    onnx.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


def test_what_belongs_together_agrees(built: qgraph.pipeline.CompileResult) -> None:
    assert built.artifact is not None and built.onnx is not None
    found = verify(built.artifact, built.onnx)
    assert found.status == "passed"
    assert 0 < found.worst < found.limit


@pytest.mark.parametrize("weight", ["layer.0.up.weight.global_scale", "layer.0.out.bias", "norm.weight"])
def test_a_changed_weight_is_found(weight: str, built: qgraph.pipeline.CompileResult, tmp_path: Path) -> None:
    assert built.artifact is not None and built.onnx is not None
    changed = one_number_off(built.onnx, weight, tmp_path)
    with pytest.raises(BudgetError, match="output 'hidden' at batch=2 sequence=7 has a relative error of"):
        verify(built.artifact, changed)


def test_a_limit_that_float32_cannot_meet(built: qgraph.pipeline.CompileResult) -> None:
    assert built.artifact is not None and built.onnx is not None
    with pytest.raises(BudgetError):
        verify(built.artifact, built.onnx, limit=1e-12)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> qgraph.pipeline.CompileResult:
    from tiny_model import save_tiny

    folder = tmp_path_factory.mktemp("rounded")
    model = save_tiny(folder / "tiny.onnx", layers=1)
    return qgraph.compile(model, output=folder / "out", scheme="nvfp4-w4a8", verify=False)


def test_rounded_activations_are_checked_between_the_roundings(
    rounded: qgraph.pipeline.CompileResult, tmp_path: Path
) -> None:
    assert rounded.artifact is not None and rounded.onnx is not None
    shown, roundings = build_exposed(rounded.onnx, "x86_64-linux", tmp_path)
    assert len(roundings) == 4  # query, key and value share one; output; up; down
    found = verify(rounded.artifact, rounded.onnx, exposed=shown, roundings=roundings)
    assert found.worst < 1e-5
    assert {r.input for r in roundings} < set(found.comparisons[0].rel_error)


@pytest.mark.parametrize("weight", ["layer.0.up.weight.global_scale", "norm.weight"])
def test_a_changed_weight_is_found_between_roundings(
    weight: str, rounded: qgraph.pipeline.CompileResult, tmp_path: Path
) -> None:
    assert rounded.artifact is not None and rounded.onnx is not None
    shown, roundings = build_exposed(rounded.onnx, "x86_64-linux", tmp_path)
    changed = one_number_off(rounded.onnx, weight, tmp_path)
    with pytest.raises(BudgetError, match="has a relative error of"):
        verify(rounded.artifact, changed, exposed=shown, roundings=roundings)


def test_a_rounding_that_is_not_exact_is_found(
    rounded: qgraph.pipeline.CompileResult, tmp_path: Path
) -> None:
    assert rounded.artifact is not None and rounded.onnx is not None
    shown, roundings = build_exposed(rounded.onnx, "x86_64-linux", tmp_path)
    roundings[1] = replace(roundings[1], format="nvfp4", global_scale=1.0)
    with pytest.raises(BudgetError, match=r"rounds '.*' to nvfp4 wrongly at batch=2 sequence=7"):
        verify(rounded.artifact, rounded.onnx, exposed=shown, roundings=roundings)
