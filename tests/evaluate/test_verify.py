"""The stage that compares an artifact with its low-bit ONNX file can fail, and says where."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

import qgraph
from qgraph.codegen import build_artifact
from qgraph.errors import BudgetError
from qgraph.evaluate.verify import Rounding, verify
from qgraph.passes import load_model, prepare_model
from qgraph.passes.expose_roundings import expose_roundings

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


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> qgraph.pipeline.CompileResult:
    from tiny_model import save_tiny

    folder = tmp_path_factory.mktemp("rounded")
    model = save_tiny(folder / "tiny.onnx", layers=1)
    return qgraph.compile(model, output=folder / "out", scheme="nvfp4-w4a8", verify=False)


def exposed(lowbit: Path, folder: Path) -> tuple[Path, list[Rounding]]:
    """The artifact of `lowbit` that shows its roundings, and these."""
    model = prepare_model(load_model(lowbit))
    roundings = [Rounding(r.input, r.output, r.format, r.global_scale) for r in expose_roundings(model)]
    build_artifact(model, target="x86_64-linux", metadata={}).write(folder / "exposed.qg")
    return folder / "exposed.qg", roundings


def test_rounded_activations_are_checked_between_the_roundings(
    rounded: qgraph.pipeline.CompileResult, tmp_path: Path
) -> None:
    assert rounded.artifact is not None and rounded.onnx is not None
    shown, roundings = exposed(rounded.onnx, tmp_path)
    assert len(roundings) == 4  # query, key and value share one; output; up; down
    found = verify(rounded.artifact, rounded.onnx, exposed=shown, roundings=roundings)
    assert found.worst < 1e-5
    assert {r.input for r in roundings} < set(found.comparisons[0].rel_error)


@pytest.mark.parametrize("weight", ["layer.0.up.weight.global_scale", "norm.weight"])
def test_a_changed_weight_is_found_between_roundings(
    weight: str, rounded: qgraph.pipeline.CompileResult, tmp_path: Path
) -> None:
    assert rounded.artifact is not None and rounded.onnx is not None
    shown, roundings = exposed(rounded.onnx, tmp_path)
    model = onnx.load(rounded.onnx)
    tensor = next(t for t in model.graph.initializer if t.name == weight)
    values = numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[0] *= 1.01
    tensor.CopyFrom(numpy_helper.from_array(values, weight))
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(BudgetError, match="has a relative error of"):
        verify(rounded.artifact, tmp_path / "changed.onnx", exposed=shown, roundings=roundings)


def test_a_rounding_that_is_not_exact_is_found(
    rounded: qgraph.pipeline.CompileResult, tmp_path: Path
) -> None:
    assert rounded.artifact is not None and rounded.onnx is not None
    shown, roundings = exposed(rounded.onnx, tmp_path)
    roundings[1] = replace(roundings[1], format="nvfp4", global_scale=1.0)
    with pytest.raises(BudgetError, match=r"rounds '.*' to nvfp4 wrongly at batch=2 sequence=7"):
        verify(rounded.artifact, rounded.onnx, exposed=shown, roundings=roundings)
