"""An artifact as the compiler makes it: under the exhaustive damage of runtime/tests/test_corruption.cc, and
in a program without Python. The other tests here use toy artifacts, so that they need no compiler."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
from cmake_build import RUNTIME, cmake_build, run
from onnx import numpy_helper

import qgraph
from qgraph.runtime import build


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One quantized layer with a bias and an activation, and a lookup that checks its indices."""
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
    result = qgraph.compile(path, strict=True)
    assert result.artifact is not None
    return result.artifact


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
    ids = np.array([4, 0, 2], np.int64)
    ids.tofile(tmp_path / "ids.bin")
    run(program, compiled, f"ids={tmp_path / 'ids.bin'}:3", "--out", tmp_path, env={})
    got = np.fromfile(tmp_path / "y.bin", np.float32).reshape(3, 17)
    with qgraph.load(compiled) as model:
        np.testing.assert_array_equal(got, model.run({"ids": ids})["y"])
