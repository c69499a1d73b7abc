"""The tiny model, and what compiling it gives. (Modules of this folder are importable, and those of others
that it uses: pytest's importlib mode adds no path by itself.)"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parent.parent / "generation"))
sys.path.insert(1, str(Path(__file__).parent.parent / "evaluate"))

from cli_harness import Compiled, qgraph
from tiny_model import save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny transformer as a file."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny.onnx")


@pytest.fixture(scope="session")
def compiled(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """`qgraph compile` of the tiny transformer, once for the whole session."""
    out = tmp_path_factory.mktemp("compiled")
    result = qgraph("compile", tiny, "-o", f"{out}/tiny")
    assert result.code == 0, result.err
    return Compiled(tiny, out / "tiny.onnx", out / "tiny.qg", out / "tiny.report.json", result)
