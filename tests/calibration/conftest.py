"""Calibration tests import `calibration_harness` from this folder and `tiny_decoder` from its neighbour
(pytest's importlib mode adds no path by itself), and keep their journals to themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parent.parent / "evaluate"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that no other test sees."""
    monkeypatch.setenv("QGRAPH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"
