"""Fixtures of the runtime's tests: the toy artifact, and a cache folder where the library is built once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

# For helpers of here, of kernels and of golden artifacts, under pytest's importlib mode.
sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
sys.path.insert(0, str(Path(__file__).parents[1] / "codegen"))
sys.path.insert(0, str(Path(__file__).parent))

import artifact_builder
import encoder_model
from artifact_builder import CUDA, Parts
from cmake_build import RACES, RUNTIME, cmake_build, sanitizer, tool

import qgraph
from qgraph import signing
from qgraph.codegen.static_library import write_library
from qgraph.runtime import sdk


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
def static_models(tmp_path_factory: pytest.TempPathFactory, toy_path: Path, decoder_path: Path) -> Path:
    """Folder with both as static libraries."""
    folder = tmp_path_factory.mktemp("static")
    for name, path in (("toy", toy_path), ("decoder", decoder_path)):
        write_library(path, name, folder / f"lib{name}.a", folder / f"{name}.h")
    return folder


def build_tests(folder: Path, sanitize: str, *options: str, targets: Sequence[str] = ("all",)) -> None:
    """The C++ tests. With sanitizers they are not optimised: that would take several times what it gains."""
    flags = ["-DQGRAPH_BUILD_TESTS=ON", *options]
    if sanitize:
        flags += [
            f"-DQGRAPH_SANITIZE={sanitize}",
            "-DCMAKE_BUILD_TYPE=Sanitize",
            "-DCMAKE_CXX_FLAGS=-O0 -g1",
        ]
    cmake_build(RUNTIME, folder, *flags, targets=targets)


@pytest.fixture(scope="session")
def signed_toy(tmp_path_factory: pytest.TempPathFactory, toy_path: Path) -> Path:
    """Folder with the toy signed, `signed.qg`, and whom by: `key`, 32 bytes, `key.pem` and `key.pub`."""
    folder = tmp_path_factory.mktemp("signed")
    private, public = signing.generate_key(folder / "key")
    signing.sign(toy_path, private, folder / "signed.qg")
    (folder / "key").write_bytes(signing.read_public_key(public))
    return folder


@pytest.fixture(scope="session")
def test_models(toy_path: Path, decoder_path: Path, static_models: Path, signed_toy: Path) -> tuple[str, ...]:
    """What tells CMake where the models are."""
    return (
        f"-DQGRAPH_TEST_ARTIFACT={toy_path}",
        f"-DQGRAPH_TEST_DECODER={decoder_path}",
        f"-DQGRAPH_TEST_STATIC={static_models}",
        f"-DQGRAPH_TEST_SIGNED={signed_toy}",
    )


@pytest.fixture(scope="session")
def cpp_tests(tmp_path_factory: pytest.TempPathFactory, test_models: tuple[str, ...]) -> Path:
    """Build folder of the C++ tests, with the address and undefined behaviour sanitizers where there are."""
    folder = tmp_path_factory.mktemp("tests-build")
    build_tests(folder, sanitizer(), *test_models)
    return folder


@pytest.fixture(scope="session")
def race_tests(tmp_path_factory: pytest.TempPathFactory, test_models: tuple[str, ...]) -> Path:
    """Build folder of RACES and the example `threads` with ThreadSanitizer; skips where there is none."""
    if not sanitizer("thread"):
        pytest.skip("ThreadSanitizer is not there, or does not run on this kernel")
    folder = tmp_path_factory.mktemp("races-build")
    targets = [*RACES, "qgraph_threads"]
    build_tests(folder, "thread", "-DQGRAPH_BUILD_EXAMPLES=ON", *test_models, targets=targets)
    return folder


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SDK, moved after it was made."""
    for name in ("cmake", "ninja"):
        tool(name)
    folder = tmp_path_factory.mktemp("prefix")
    sdk.install(folder / "made")
    return (folder / "made").rename(folder / "sdk")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> qgraph.pipeline.CompileResult:
    """A sentence encoder with MiniLM's inputs and outputs, compiled to `model.qg`; beside it are `libmodel.a`
    and `model.h`."""
    folder = tmp_path_factory.mktemp("encoder")
    path = encoder_model.save(folder / "encoder.onnx")
    options = {"include": ("*",), "strict": True, "onnx": False, "output": folder / "model"}
    library = qgraph.compile(path, format="static-lib", **options)
    assert library.artifact is None and library.library == folder / "libmodel.a"
    return qgraph.compile(path, **options)


@pytest.fixture(scope="session")
def examples(
    tmp_path_factory: pytest.TempPathFactory, prefix: Path, encoder: qgraph.pipeline.CompileResult
) -> Path:
    """The examples that are part of the SDK, as a project of its own that finds it."""
    folder = tmp_path_factory.mktemp("examples")
    source = prefix / "share" / "qgraph" / "examples"
    assert encoder.artifact is not None
    model = f"-DQGRAPH_EXAMPLE_MODEL={encoder.artifact.parent}"
    cmake_build(source, folder, f"-DCMAKE_PREFIX_PATH={prefix}", model)
    return folder
