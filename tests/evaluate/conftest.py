"""Tiny decoders and their artifacts. (Modules of this folder are importable: pytest's importlib mode adds no
path by itself.)"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_decoder import save_decoder

import qgraph


@pytest.fixture(scope="session")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `cache0` and `cache1`, the same decoder without a cache and with one: the float model
    (.onnx) and its artifact (.qg)."""
    folder = tmp_path_factory.mktemp("decoders")
    for cache in (False, True):
        path = save_decoder(folder / f"cache{int(cache)}.onnx", cache=cache)
        qgraph.build(path, verify=False)
    return folder
