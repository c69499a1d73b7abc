"""An artifact as the compiler makes it: under the exhaustive damage of runtime/tests/test_corruption.cc, and
in a program without Python. The other tests here use toy artifacts, so that they need no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
from cmake_build import RUNTIME, cmake_build, run
from onnx import numpy_helper

import qgraph
from qgraph.runtime import build

IDS = np.array([4, 0, 2], np.int64)
OPTIONS = {"embeddings": "nvfp4", "include": ("*",), "strict": True}  # small as they are


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer and a table to quantize, a bias and an activation; the lookup checks its indices."""
    model = onnx.parser.parse_model(
        '<ir_version: 11, opset_import: ["" : 23]> tiny (int64[batch] ids) => (float[batch, 17] y) {'
        " [embed] x = Gather(table, ids) [up] h = MatMul(x, w) [bias] b = Add(h, c) [act] y = Gelu(b) }"
    )
    rng = np.random.default_rng(0)
    for name, shape in (("table", (5, 40)), ("w", (40, 17)), ("c", (17,))):
        model.graph.initializer.append(
            numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        )
    path = tmp_path_factory.mktemp("compiled") / "tiny.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def compiled(source: Path) -> Path:
    result = qgraph.compile(source, **OPTIONS)
    assert result.artifact is not None
    return result.artifact


@pytest.fixture(scope="module")
def expected(compiled: Path) -> np.ndarray:
    """What Python gets from the AVX2 code."""
    with qgraph.load(compiled, isa="x86-64-v3") as model:
        return model.run({"ids": IDS})["y"]


def static_example(folder: Path, compiler: str) -> Path:
    """The C++ example as one static program."""
    program = folder / "example"
    sources = [*sorted((RUNTIME / "src").glob("*.cc")), RUNTIME / "examples" / "run.cc"]
    options = ["-std=c++17", "-O1", "-static", "-pthread", f"-I{RUNTIME / 'include'}"]
    run(*compiler.split(), *options, *sources, "-o", program)
    return program


def run_example(folder: Path, *command: str | Path) -> np.ndarray:
    """Its output y for IDS."""
    IDS.tofile(folder / "ids.bin")
    run(*command, f"ids={folder / 'ids.bin'}:3", "--out", folder)
    return np.fromfile(folder / "y.bin", np.float32).reshape(3, 17)


def test_every_changed_byte_and_every_truncation_is_refused(compiled: Path, tmp_path: Path) -> None:
    program = tmp_path / "test_corruption"
    library = build.library()
    compiler = os.environ.get("CXX", "c++").split()
    run(
        *compiler,
        *("-std=c++17", "-O2", f"-I{RUNTIME / 'include'}", RUNTIME / "tests" / "test_corruption.cc"),
        *(library, f"-Wl,-rpath,{library.parent}", "-o", program),
    )
    run(program, compiled, tmp_path)


def test_runs_where_there_is_no_python(compiled: Path, tmp_path: Path) -> None:
    """The C++ example, its environment empty: same bits as from Python."""
    cmake_build(RUNTIME, tmp_path / "build", "-DQGRAPH_BUILD_EXAMPLES=ON")
    program = next(p for p in (tmp_path / "build").rglob("qgraph_run") if p.is_file())
    IDS.tofile(tmp_path / "ids.bin")
    run(program, compiled, f"ids={tmp_path / 'ids.bin'}:3", "--out", tmp_path, env={})
    got = np.fromfile(tmp_path / "y.bin", np.float32).reshape(3, 17)
    with qgraph.load(compiled) as model:
        np.testing.assert_array_equal(got, model.run({"ids": IDS})["y"])


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64 (Debian: qemu-user)")
def test_code_is_chosen_by_what_the_cpu_has(compiled: Path, tmp_path: Path, expected: np.ndarray) -> None:
    program = static_example(tmp_path, os.environ.get("CXX", "c++"))
    got = run_example(tmp_path, "qemu-x86_64", "-cpu", "Haswell", program, compiled)
    np.testing.assert_array_equal(got, expected)  # the same code, so the same bits
    done = subprocess.run(
        ["qemu-x86_64", "-cpu", "Nehalem", program, compiled], capture_output=True, text=True
    )
    assert done.returncode > 0 and "no code in the file fits this machine" in done.stderr
