"""`--export` from end to end: files, report, verification, and what happens when something is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_decoder import save_decoder
from tiny_model import save_tiny

import qgraph
from qgraph.cli import run
from qgraph.errors import BudgetError, UsageError
from qgraph.evaluate.compare import compare
from qgraph.evaluate.runners import OnnxRuntimeRunner, ReferenceRunner
from qgraph.export import EXPORTS, nbits, verify
from qgraph.schemes import SCHEMES

FEEDS = {"input_ids": np.arange(14).reshape(2, 7), "attention_mask": np.ones((2, 7), np.int64)}
LAYERS = 6  # of the tiny transformer with one layer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny.onnx", layers=1)


def worst(verification: dict, limit: float) -> float:
    found = [c["rel_error"].values() for c in verification["comparisons"] if c["limit"] == limit]
    return max(error for errors in found for error in errors)


def test_every_engine(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--export={name}" for name in EXPORTS]
    assert run(["quantize", str(tiny), "--include=*", "-q", "-o", str(tmp_path / "out"), *options]) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "out.report.json").read_text())
    for name, found in zip(EXPORTS, report["exports"], strict=True):
        path = tmp_path / f"out.{name}.onnx"
        onnx.checker.check_model(onnx.load(path), full_check=True)
        assert report["files"][name] == str(path) and f"wrote  {path}" in shown
        assert (found["name"], found["nbytes"]) == (name, path.stat().st_size)
        assert found["layers"] == LAYERS and found["notes"] == []
        assert (found["verification"] is None) == (not EXPORTS[name].runs)
        assert f"{name}: {path.stat().st_size / 1e3:.1f} kB, {LAYERS} low-bit layers" in shown
    assert "ort-cpu: agrees with ONNX's reference evaluator on 3 inputs" in shown
    assert len(list(tmp_path.iterdir())) == len(EXPORTS) + 2


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "none"])
def test_ort_cpu_computes_what_the_low_bit_file_does(scheme: str, tiny: Path, tmp_path: Path) -> None:
    data = [{name: array[:1] for name, array in FEEDS.items()}] if SCHEMES[scheme].needs_calibration else None
    result = qgraph.quantize(
        tiny,
        scheme=scheme,
        embeddings="nvfp4",
        include=("*",),
        solver="rtn",
        calibration=data,
        export=("ort-cpu",),
        output=tmp_path / "out",
    )
    (found,) = result.report.to_json()["exports"]
    assert worst(found["verification"], 1e-4) < 2e-6
    rounds = SCHEMES[scheme].activation_format
    assert result.onnx is not None
    got = OnnxRuntimeRunner(result.exports["ort-cpu"]).run(FEEDS)
    (difference,) = compare(got, ReferenceRunner(result.onnx).run(FEEDS)).values()
    assert difference.rel_error < (2e-6 if rounds is None else 0.05)
    limits = {c["limit"] for c in found["verification"]["comparisons"]}
    seen = {None: set(), "nvfp4": {verify.WHOLE_LIMIT}, "int8": {verify.ROUNDED_LIMIT, verify.WHOLE_LIMIT}}
    assert limits == {1e-4} | (seen[rounds] - ({verify.ROUNDED_LIMIT} if scheme == "ternary-w2a8" else set()))


@pytest.mark.parametrize("cache", [True, False])
def test_a_decoder(cache: bool, tmp_path: Path) -> None:
    """With a tied embedding, whose cache is rounded to int8."""
    model = save_decoder(tmp_path / "m.onnx", cache=cache)
    held = onnx.load(model)
    tied = next(t for t in held.graph.initializer if t.name == "embed.weight")
    head = next(t for t in held.graph.initializer if t.name == "lm_head.weight")
    head.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tied).T.copy(), head.name))
    onnx.save(held, model)
    result = qgraph.quantize(
        model,
        scheme="int4-w4a8",
        kv_cache="int8" if cache else "float",
        include=("*",),
        solver="rtn",
        export=("ort-cpu",),
        output=tmp_path / "out",
    )
    (found,) = result.report.exports
    assert "embed" in {x.name for x in result.report.of_kind("embedding") if x.scheme == "int8"}
    assert found.layers == 14 and found.verification is not None
    assert len(found.verification.comparisons) == 3 * (8 if cache else 3)
    assert found.verification.worst_by_limit()[1e-4] < 2e-6


def test_build_gives_the_same_file(tiny: Path, tmp_path: Path) -> None:
    """From either style of the low-bit file."""
    first = qgraph.quantize(tiny, include=("*",), export=("ort-cpu",), output=tmp_path / "one", verify=False)
    other = qgraph.quantize(tiny, include=("*",), onnx_style="qdq", output=tmp_path / "two")
    assert first.onnx is not None and other.onnx is not None
    for source in (first.onnx, other.onnx):
        options = {"export": ("ort-cpu", "ort-cpu"), "verify": False, "output": tmp_path / "built"}
        built = qgraph.build(source, **options)
        assert built.exports["ort-cpu"].read_bytes() == first.exports["ort-cpu"].read_bytes()
        assert built.report.exports[0].verification.reason == "--no-verify"  # type: ignore[union-attr]


def test_large_weights_lie_beside(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qgraph.passes import save

    monkeypatch.setattr(save, "EXTERNAL_DATA_FROM", 1000)
    result = qgraph.quantize(tiny, include=("*",), export=("ort-cpu",), output=tmp_path / "out")
    assert (tmp_path / "out.ort-cpu.onnx.data").exists()
    assert result.report.exports[0].nbytes == sum(
        (tmp_path / f"out.ort-cpu.onnx{end}").stat().st_size for end in ("", ".data")
    )
    got = OnnxRuntimeRunner(result.exports["ort-cpu"]).run(FEEDS)
    (difference,) = compare(got, ReferenceRunner(tmp_path / "out.onnx").run(FEEDS)).values()
    assert difference.rel_error < 2e-6


@pytest.mark.parametrize("scheme", ["nvfp4", "int8-w8a8"])
def test_a_wrong_weight_is_found(
    scheme: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One scale of one block, off by a hundredth: nothing is written."""

    def wrong(q, wide):
        found = planes(q, wide)
        found[0].scale[0, 0] *= np.float32(1.01)
        return found

    planes = nbits.planes
    monkeypatch.setattr("qgraph.export.matmul_nbits.planes", wrong)
    with pytest.raises(BudgetError, match="export 'ort-cpu' disagrees with the low-bit ONNX model: '"):
        qgraph.quantize(
            tiny, scheme=scheme, include=("*",), export=("ort-cpu",), solver="rtn", output=tmp_path / "out"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_rounding_is_found(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations that the file rounds by blocks of another size."""
    note = "qgraph.export.ort_cpu._note_rounding"
    monkeypatch.setattr(note, lambda node, context: context.rounds.update({node.inputs[0].name: 64}))
    options = {"scheme": "int4-w4a8", "include": ("*",), "solver": "rtn", "export": ("ort-cpu",)}
    with pytest.raises(BudgetError, match=r"export 'ort-cpu' disagrees .* allowed is 0.005"):
        qgraph.quantize(tiny, output=tmp_path / "out", **options)


def test_strict_takes_no_float(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [str(tiny), "--layer=*up*=int4", "--include=*", "--solver=rtn", "--export=tensorrt", "-q"]
    args = ["quantize", *options, "-o", str(tmp_path / "out")]
    assert run(args) == 0
    shown = capsys.readouterr().out
    assert "1 layer in float: TensorRT has no int4 with blocks of 32" in shown
    (tmp_path / "out.tensorrt.onnx").unlink()
    assert run([*args, "--strict"]) == 5
    assert "export 'tensorrt' leaves a layer in float: layer.0.up: TensorRT has" in capsys.readouterr().err
    assert not (tmp_path / "out.tensorrt.onnx").exists()


def test_dry_run_knows_the_size(tiny: Path, tmp_path: Path) -> None:
    options = {"include": ("*",), "export": ("ort-cpu",), "output": tmp_path / "out"}
    dry = qgraph.quantize(tiny, dry_run=True, **options)
    assert list(tmp_path.iterdir()) == [] and dry.exports == {}
    real = qgraph.quantize(tiny, **options)
    assert dry.report.exports[0].nbytes == real.report.exports[0].nbytes
    assert dry.report.exports[0].verification is None


def test_wrong_usage(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", str(tiny), "--export=ort-cup"]) == 2
    assert "unknown export 'ort-cup': did you mean 'ort-cpu'?" in capsys.readouterr().err
    with pytest.raises(UsageError, match="export 'ort-cpu' has no low-bit form of any layer: it has none"):
        qgraph.build(tiny, export=("ort-cpu",), output=tmp_path / "out", verify=False)
    with pytest.raises(UsageError, match="export 'ort-cpu': nothing is quantized"):
        qgraph.quantize(tiny, scheme="none", export=("ort-cpu",), output=tmp_path / "out")
    with pytest.raises(UsageError, match="export 'tensorrt' has low-bit forms of nvfp4 alone, not of int4"):
        qgraph.quantize(tiny, scheme="int4", export=("tensorrt",), output=tmp_path / "out")
    copy = tmp_path / "m.ort-cpu.onnx"
    copy.write_bytes(tiny.read_bytes())
    with pytest.raises(UsageError, match="is an input"):
        qgraph.quantize(copy, export=("ort-cpu",), output=tmp_path / "m")


def test_the_page_lists_every_engine() -> None:
    page = (Path(__file__).parents[2] / "docs" / "exports.md").read_text()
    table = page.split("| engine |", 1)[1].split("\n\n", 1)[0]
    assert re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE) == list(EXPORTS)
