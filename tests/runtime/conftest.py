"""Fixtures of the runtime's tests: the toy artifact, and a cache folder where the library is built once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for artifact_builder, under pytest's importlib mode

import artifact_builder
from artifact_builder import CUDA, Parts
from cmake_build import RUNTIME, cmake_build, sanitizers


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty cache folder that qgraph uses during the tests."""
    shared = os.environ.get("QGRAPH_TEST_CACHE")  # of tests that run these ones
    folder = Path(shared) if shared else tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QGRAPH_CACHE_DIR", str(folder))
        patch.delenv("QGRAPH_RUNTIME_LIBRARY", raising=False)
        yield folder


@pytest.fixture(scope="session")
def toy_parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    if artifact_builder.MISSING:
        pytest.skip(f"needs {', '.join(artifact_builder.MISSING)} to make test kernels")
    return artifact_builder.toy(tmp_path_factory.mktemp("kernels"), CUDA)


@pytest.fixture(scope="session")
def toy_path(tmp_path_factory: pytest.TempPathFactory, toy_parts: Parts) -> Path:
    path = tmp_path_factory.mktemp("artifacts") / "toy.qg"
    path.write_bytes(toy_parts.to_bytes())
    return path


@pytest.fixture(scope="session")
def decoder_parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    if artifact_builder.MISSING:
        pytest.skip(f"needs {', '.join(artifact_builder.MISSING)} to make test kernels")
    return artifact_builder.toy_decoder(tmp_path_factory.mktemp("decoder-kernels"), CUDA)


@pytest.fixture(scope="session")
def decoder_path(tmp_path_factory: pytest.TempPathFactory, decoder_parts: Parts) -> Path:
    path = tmp_path_factory.mktemp("decoders") / "decoder.qg"
    path.write_bytes(decoder_parts.to_bytes())
    return path


@pytest.fixture(scope="session")
def cpp_tests(tmp_path_factory: pytest.TempPathFactory, toy_path: Path, decoder_path: Path) -> Path:
    """Build folder of the C++ tests, with sanitizers where the compiler has them.

    Unoptimised then: checking for undefined behaviour makes optimising several times slower than it gains.
    """
    folder = tmp_path_factory.mktemp("tests-build")
    options = ["-DQGRAPH_BUILD_TESTS=ON", f"-DQGRAPH_TEST_ARTIFACT={toy_path}"]
    options.append(f"-DQGRAPH_TEST_DECODER={decoder_path}")
    if sanitizers():
        options += [
            f"-DQGRAPH_SANITIZE={sanitizers()}",
            "-DCMAKE_BUILD_TYPE=Sanitize",
            "-DCMAKE_CXX_FLAGS=-O0 -g1",
        ]
    cmake_build(RUNTIME, folder, *options)
    return folder
