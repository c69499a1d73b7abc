"""What the command line's tests share: the tiny model, and a way to run `qgraph` as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Result:
    """What a run of the command line gave."""

    code: int
    out: str
    err: str


def qgraph(*args: object, cwd: Path | None = None, timeout: float = 300) -> Result:
    """`qgraph ARGS` in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        [sys.executable, "-m", "qgraph", *map(str, args)],
        cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


@dataclass(frozen=True)
class Compiled:
    """The tiny model and the three files that compiling it wrote."""

    model: Path
    onnx: Path
    artifact: Path
    report: Path
    result: Result


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny transformer as a file."""
    from tiny_model import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny.onnx")


@pytest.fixture(scope="session")
def compiled(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """`qgraph compile` of the tiny transformer, once for the whole session."""
    out = tmp_path_factory.mktemp("compiled")
    result = qgraph("compile", tiny, "-o", f"{out}/tiny")
    assert result.code == 0, result.err
    return Compiled(tiny, out / "tiny.onnx", out / "tiny.qg", out / "tiny.report.json", result)
