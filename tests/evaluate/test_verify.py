"""The stage that compares an artifact with its low-bit ONNX file can fail, and says where."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny_decoder import save_decoder

import qgraph
from qgraph.errors import BudgetError, InputError
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


def test_an_artifact_with_state_is_checked_step_by_step(decoders: Path) -> None:
    steps: list[str] = []
    found = verify(
        decoders / "cache1.qg",
        decoders / "cache1.onnx",
        on_case=lambda i, n, what: steps.append(f"{i}/{n} {what}"),
    )
    assert 0 < found.worst < 1e-5
    assert steps[:4] == [
        "0/8 batch=2 sequence=5 total_sequence=5",
        "1/8 batch=2 sequence=1 total_sequence=6",
        "2/8 batch=2 sequence=3 total_sequence=9",
        "3/8 batch=1 sequence=9 total_sequence=9",
    ]
    assert all(set(c.rel_error) == {"logits", "logits (logits=1)"} for c in found.comparisons)


@pytest.mark.parametrize("part", ["key", "value"])
def test_a_cache_that_is_read_wrongly_is_found_in_the_second_step(
    part: str, decoders: Path, tmp_path: Path
) -> None:
    """Here it is the ONNX file that changes what was."""
    model = onnx.load(decoders / "cache1.onnx")
    past = f"past_key_values.1.{part}"
    for i, node in enumerate(model.graph.node):
        if past in node.input:
            node.input[list(node.input).index(past)] = "shrunk"
            model.graph.node.insert(i, onnx.helper.make_node("Mul", [past, "almost"], ["shrunk"]))
            break
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.99), "almost"))
    onnx.save(model, tmp_path / "changed.onnx")
    where = "output 'logits' at batch=2 sequence=1 total_sequence=6 has a relative error of"
    with pytest.raises(BudgetError, match=where):
        verify(decoders / "cache1.qg", tmp_path / "changed.onnx")


def test_roundings_and_state(tmp_path: Path) -> None:
    """Rounded activations and a rounded cache: in lockstep, the caches too."""
    path = save_decoder(tmp_path / "decoder.onnx", cache=True, layers=1)
    built = qgraph.compile(path, scheme="nvfp4-w4a8", kv_cache="int8", output=tmp_path / "out", verify=False)
    assert built.artifact is not None and built.onnx is not None
    shown, roundings = build_exposed(built.onnx, "x86_64-linux", tmp_path)
    assert len(roundings) == 4 + 1 + 2  # of layers' inputs, the lm_head's, keys and values
    found = verify(built.artifact, built.onnx, exposed=shown, roundings=roundings)
    assert found.worst < 1e-5
    roundings[-1] = replace(roundings[-1], format="nvfp4", global_scale=1.0)
    with pytest.raises(BudgetError, match=r"rounds '.*' to nvfp4 wrongly at batch=2 sequence=5"):
        verify(built.artifact, built.onnx, exposed=shown, roundings=roundings)


def test_an_artifact_and_a_file_with_another_cache(decoders: Path) -> None:
    with pytest.raises(InputError, match=r"no output 'present\.0\.key'"):
        verify(decoders / "cache1.qg", decoders / "cache0.onnx")


def test_short_states_and_fixed_sizes() -> None:
    """Steps stay inside the bounds of the dims."""
    from types import SimpleNamespace

    from qgraph.evaluate.verify import _texts
    from qgraph.runtime import Dim

    def model(sequence: int | str, most: int) -> SimpleNamespace:
        ids = SimpleNamespace(name="input_ids", dtype=np.dtype(np.int64), shape=("batch", sequence))
        dims = (Dim("batch", 1, 2), Dim("sequence", 1, most), Dim("total", 1, most, "total"))
        return SimpleNamespace(
            inputs=[ids], dims=dims, path="m.qg", session=lambda: SimpleNamespace(capacity=most)
        )

    def shapes(text: list[dict[str, int]]) -> list[tuple[int, int]]:
        return [(dims["batch"], dims["total"]) for dims in text]

    assert [shapes(text) for text in _texts(model("sequence", 6))] == [
        [(2, 5), (2, 6)],
        [(1, 6)],
        [(2, 1), (2, 5)],
    ]
    assert [shapes(text) for text in _texts(model(1, 100))] == [
        [(2, 1), (2, 2), (2, 3)],
        [(1, 1), (1, 2), (1, 3)],
        [(2, 1), (2, 2)],
    ]
