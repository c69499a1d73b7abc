"""`--format static-lib` on the command line: what is written, and what it is called."""

from __future__ import annotations

import json
import re
from pathlib import Path

from cli_harness import Compiled, qgraph


def test_compile(compiled: Compiled, tmp_path: Path) -> None:
    result = qgraph("compile", compiled.model, "--format", "static-lib", "-o", tmp_path / "my.model")
    assert result.code == 0, result.err
    names = {"libmy_model.a", "my_model.h", "my.model.onnx", "my.model.report.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert re.search(r"^library .*smaller", result.out, re.MULTILINE)
    report = json.loads((tmp_path / "my.model.report.json").read_text())
    assert report["verification"]["status"] == "passed"
    assert report["files"] == {
        "onnx": str(tmp_path / "my.model.onnx"),
        "header": str(tmp_path / "my_model.h"),
        "library": str(tmp_path / "libmy_model.a"),
        "report": str(tmp_path / "my.model.report.json"),
    }
    assert report["sizes"]["library"] == (tmp_path / "libmy_model.a").stat().st_size
    assert "artifact" not in report["sizes"]


def test_build_gives_the_same(compiled: Compiled, tmp_path: Path) -> None:
    for verb, source in (("compile", compiled.model), ("build", compiled.onnx)):
        (tmp_path / verb).mkdir()
        options = ["--format", "static-lib", "--no-verify", "-o", tmp_path / verb / "model"]
        result = qgraph(verb, source, *options)
        assert result.code == 0, result.err
    assert not (tmp_path / "build" / "model.onnx").exists()
    for name in ("libmodel.a", "model.h"):
        assert (tmp_path / "build" / name).read_bytes() == (tmp_path / "compile" / name).read_bytes()


def test_dry_run_writes_nothing(compiled: Compiled, tmp_path: Path) -> None:
    result = qgraph("compile", compiled.model, "--format", "static-lib", "--dry-run", "-o", tmp_path / "m")
    assert result.code == 0, result.err
    assert list(tmp_path.iterdir()) == []


def test_unknown_format(compiled: Compiled, tmp_path: Path) -> None:
    result = qgraph("build", compiled.onnx, "--format", "static-library", "-o", tmp_path / "m")
    assert result.code == 2
    assert "unknown format 'static-library': did you mean 'static-lib'?" in result.err


def test_the_config_does_not_replace_the_library(compiled: Compiled, tmp_path: Path) -> None:
    target = tmp_path / "libm.a"
    options = ["--format", "static-lib", "--save-config", target, "-o", tmp_path / "m"]
    result = qgraph("build", compiled.onnx, *options)
    assert result.code == 2 and "would overwrite" in result.err
    assert list(tmp_path.iterdir()) == []


def test_gpus_alone(compiled: Compiled, tmp_path: Path) -> None:
    options = ["--format", "static-lib", "--target", "cuda", "-o", tmp_path / "m"]
    result = qgraph("build", compiled.onnx, *options)
    assert result.code == 2
    assert "linked into a program, which runs on a CPU: give --target cpu,cuda" in result.err
    assert list(tmp_path.iterdir()) == []
