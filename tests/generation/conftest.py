"""Tiny decoders and their artifacts. (Modules of this folder and of its neighbour are importable.)"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parent.parent / "evaluate"))

from tiny_decoder import build_decoders


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `build_decoders`."""
    return build_decoders(tmp_path_factory.mktemp("decoders"))
