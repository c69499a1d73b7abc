"""Fixtures of the CUDA tests: the fake driver, and the toys of tests/runtime compiled for it. The tests of
kernels use the operands and references of tests/codegen."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

for folder in (Path(__file__).parent, *(Path(__file__).parents[1] / name for name in ("runtime", "codegen"))):
    sys.path.insert(0, str(folder))  # under pytest's importlib mode

import artifact_builder  # noqa: E402
import fake_cuda  # noqa: E402
from artifact_builder import Parts  # noqa: E402


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the fake driver."""
    if missing := [tool for tool in ("g++", *artifact_builder.TOOLS) if shutil.which(tool) is None]:
        pytest.skip(f"needs {', '.join(missing)} to make test kernels")
    return fake_cuda.build(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="session")
def toy_parts(tmp_path_factory: pytest.TempPathFactory, driver: Path) -> Parts:
    return artifact_builder.toy(tmp_path_factory.mktemp("toy-kernels"), cuda=True)


@pytest.fixture(scope="session")
def decoder_parts(tmp_path_factory: pytest.TempPathFactory, driver: Path) -> Parts:
    return artifact_builder.toy_decoder(tmp_path_factory.mktemp("decoder-kernels"), cuda=True)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory, toy_parts: Parts) -> Path:
    path = tmp_path_factory.mktemp("toy") / "toy.qg"
    path.write_bytes(toy_parts.to_bytes())
    return path


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory, decoder_parts: Parts) -> Path:
    path = tmp_path_factory.mktemp("decoder") / "decoder.qg"
    path.write_bytes(decoder_parts.to_bytes())
    return path


@pytest.fixture
def run(driver: Path, tmp_path: Path) -> Callable[..., fake_cuda.Report]:
    """`fake_cuda.run_script` with the fake driver. Everything has to be freed, if not `leaks`."""

    def run(script: str, *, leaks: bool = False, **settings: object) -> fake_cuda.Report:
        report = fake_cuda.run_script(driver, tmp_path / "report", script, **settings)
        assert leaks or not any(report.live.values()), report.live
        return report

    return run
