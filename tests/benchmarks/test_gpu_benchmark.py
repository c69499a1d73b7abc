"""benchmarks/gpu_prepare.py and gpu.py on tiny models, compiled for the emulation and run on the fake driver,
by a process without torch. Times are not looked at."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

TESTS = Path(__file__).parents[1]
BENCHMARKS = TESTS.parent / "benchmarks"
for folder in (BENCHMARKS, TESTS / "cuda"):
    sys.path.insert(0, str(folder))

import fake_cuda  # noqa: E402
import gpu  # noqa: E402
import gpu_peers  # noqa: E402
import gpu_prepare  # noqa: E402
import gpu_skeleton  # noqa: E402
import onnx  # noqa: E402
from emulated_artifact import emulated  # noqa: E402
from gpu_weights import matrix  # noqa: E402
from llama_shapes import LlamaShape, export  # noqa: E402
from matmul_chain import one_layer  # noqa: E402

import qgraph  # noqa: E402
from qgraph.codegen import package  # noqa: E402

K, N = 128, 160
TINY = LlamaShape(layers=1, width=64, inner=96, heads=4, kv_heads=2, vocabulary=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What gpu_prepare.py makes of tiny models. The Llama is a skeleton of the decoder's artifact: one model
    less to compile."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ for the emulation")
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch, emulated():
        patch.setattr(gpu_prepare, "get_model", lambda name: SimpleNamespace(export=partial(export, TINY)))
        patch.setattr(gpu_prepare, "DECODERS", (("nvfp4", "float"),))
        patch.setattr(gpu_skeleton, "LARGE", 1000)
        isas = "x86-64-v4,x86-64-v3,cuda-emulated"
        given = (
            f"{path} --only models,layers --shapes {K}x{N} --schemes nvfp4,ternary --isas {isas} --limit 2"
        )
        gpu_prepare.main(given.split())
        package.write_path(path / "all.qg", *gpu_skeleton.fill(path / "tinystories-nvfp4.gz"))
        gpu_skeleton.strip(path / "all.qg", path / "llama-nvfp4.gz")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.append({"kind": "llama", "file": "llama-nvfp4.gz", "scheme": "nvfp4", "shape": vars(TINY)})
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert (path / "llama-nvfp4.gz").stat().st_size < (path / "tinystories-nvfp4.gz").stat().st_size
    return path


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process with the fake driver, and without torch."""
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "torch.py").write_text("raise ImportError('hidden')\n")
    found = fake_cuda.environment(fake_cuda.build(tmp_path_factory.mktemp("driver")))
    found["PYTHONPATH"] = os.pathsep.join([str(hidden), str(TESTS.parent), found.get("PYTHONPATH", "")])
    return found


def run(folder: Path, driver: dict[str, str], options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), str(folder), *options.split()]
    return subprocess.run(command, env=driver, capture_output=True, text=True, timeout=120)


def test_layers_and_a_llama(folder: Path, driver: dict[str, str], tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    sizes = "--rows 1,9 --cold 0.012 --passes 2 --turns 3 --repeats 2 --prompt 6 --steps 2"
    done = run(folder, driver, f"--only limits,layers,llama {sizes} --json {found}")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "limits and peers are not measured: no torch: hidden" in done.stdout
    assert f"### Layers, {K}x{N}" in done.stdout
    rows = json.loads(found.read_text())["rows"]
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in {row["kind"] for row in rows}}
    assert "failure" not in of
    names = {f"qgraph {scheme}{compute}" for scheme in ("nvfp4", "ternary") for compute in ("", "/bf16")}
    assert {row["name"] for row in of["error"]} == names
    assert all(0 < row["error"] < gpu.LAYER_ERROR for row in of["error"])
    assert {(row["name"], row["rows"]) for row in of["time"]} == {
        (name, count) for name in names for count in (1, 9)
    }
    nvfp4 = next(row for row in of["time"] if row["scheme"] == "nvfp4")
    assert nvfp4["nbytes"] == K * N // 2 + K // 16 * N + 4
    assert nvfp4["layers"] == 2 * -(-12000 // nvfp4["nbytes"])
    assert [row["what"] for row in of["llama"]] == ["prompt", "step"]
    assert {row["steps"] for row in of["profile"] if "attention" in row["kernel"]} == {TINY.layers}


def test_small_for_sanitizers(folder: Path, driver: dict[str, str]) -> None:
    done = run(folder, driver, "--sanitize")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| tinystories-nvfp4 | 2 | " in done.stdout
    assert "3 equal |" in done.stdout
    assert "qgraph ternary, 128x160 16 rows: error" in done.stdout
    assert "### Layers" not in done.stdout


def test_what_fails_is_named_and_the_rest_goes_on(
    folder: Path, driver: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "tinystories-nvfp4.gz").write_bytes(b"nothing")
    done = run(tmp_path / "copy", driver, "--sanitize")
    assert done.returncode == 1
    assert "FAILED models tinystories-nvfp4.gz: BadGzipFile: Not a gzipped file" in done.stdout
    assert "qgraph ternary, 128x160 16 rows: error" in done.stdout


@pytest.mark.parametrize("scheme", ["nvfp4", "ternary", "int4", "int8"])
def test_side_by_side_is_what_is_compiled(scheme: str, tmp_path: Path) -> None:
    """Of one layer's artifact `side_by_side` makes that of the ONNX model which has the layers."""
    source = one_layer(K, N, tmp_path / "one.onnx")
    one = qgraph.compile(source, scheme=scheme, output=tmp_path / "low", solver="rtn", verify=False)
    assert one.onnx and one.artifact
    tensors, metadata = gpu_skeleton.read_artifact(one.artifact)
    made = tmp_path / "made.qg"
    package.write_path(made, gpu_skeleton.side_by_side(tensors, layers=3, passes=2), metadata)
    built = qgraph.build(_side_by_side(one.onnx, tmp_path / "all.onnx", 3, 2), verify=False).artifact
    assert built
    x = np.random.default_rng(0).standard_normal((2, K), np.float32)
    expected, found = (qgraph.load(path, threads=1).run({"x": x}) for path in (built, made))
    assert list(expected) == list(found) == [f"{turn}/{i}/y" for turn in range(2) for i in range(3)]
    np.testing.assert_array_equal(found["0/0/y"], expected["0/0/y"])  # the others have other weights
    np.testing.assert_array_equal(found["0/1/y"], found["1/1/y"])
    names, made_names = (
        [(t.name, t.data.shape) for t in gpu_skeleton.read_artifact(path)[0] if t.name.startswith("w/")]
        for path in (built, made)
    )
    assert sorted(names) == sorted(made_names)
    weights = {t.name: t.data for t in tensors if t.name.startswith("w/")}
    y = x.astype(np.float64) @ matrix(weights, (K, N), scheme)
    np.testing.assert_allclose(found["0/0/y"], y, rtol=1e-4, atol=1e-4)


def _side_by_side(layer: Path, path: Path, layers: int, passes: int) -> Path:
    model = onnx.load(layer)
    graph = model.graph
    nodes, weights, y = list(graph.node), list(graph.initializer), graph.output[0]
    for field in (graph.node, graph.initializer, graph.output):
        del field[:]
    for i in range(layers):
        for tensor in weights:
            copy = graph.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = f"{i}/{tensor.name}"
            if len(tensor.raw_data) > 8:  # else all layers would share the weights of one
                copy.raw_data = tensor.raw_data[8 * i :] + tensor.raw_data[: 8 * i]
    for turn in range(passes):
        for i in range(layers):
            for node in nodes:
                copy = graph.node.add()
                copy.CopyFrom(node)
                copy.name = f"{turn}/{i}/{node.name}"
                copy.input[:] = [name if name == "x" else f"{i}/{name}" for name in node.input]
                copy.output[:] = [f"{turn}/{i}/{name}" for name in node.output]
            output = graph.output.add()
            output.CopyFrom(y)
            output.name = f"{turn}/{i}/{y.name}"
    onnx.save(model, path)
    return path


def test_a_skeleton_is_filled(folder: Path, tmp_path: Path) -> None:
    """Everything small is as it was; what was left out comes back as large as it was, the same every time."""
    with emulated():
        source = one_layer(K, N, tmp_path / "one.onnx")
        made = qgraph.compile(source, scheme="ternary", target="cuda", output=tmp_path / "low", verify=False)
    assert made.artifact
    real, metadata = gpu_skeleton.read_artifact(made.artifact)
    filled, again = (gpu_skeleton.fill(folder / f"layer-{K}x{N}-ternary.gz") for _ in range(2))
    assert filled[1]["qgraph.scheme"] == metadata["qgraph.scheme"]
    assert [(t.name, t.data.shape, t.data.dtype) for t in filled[0]] == [
        (t.name, t.data.shape, t.data.dtype) for t in real
    ]
    for one, other in zip(filled[0], again[0], strict=True):
        assert bytes(one.raw) == bytes(other.raw)
    codes = next(t.data for t in filled[0] if "codes" in t.name)
    assert not (codes >> 1 & ~codes & 0x55555555).any()  # -1, 0, 1
    W = matrix({t.name: t.data for t in filled[0] if t.name.startswith("w/")}, (K, N), "ternary")
    assert 0.3 < W.std() * K**0.5 < 3


def test_the_torch_llama_reads_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt and a step behind it are the same as the whole text; on the CPU, where there are no graphs."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(gpu_peers, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_peers, "torch_on_gpu", lambda: torch)
    monkeypatch.setattr(gpu_peers, "captured", lambda run: run)
    torch.manual_seed(0)
    llama = gpu_peers.TorchLlama(vars(TINY), 16)
    ids = torch.arange(9)[None]
    whole = llama.forward(ids, torch.arange(9))
    llama.forward(ids[:, :8], torch.arange(8))
    step = llama.forward(ids[:, 8:], torch.arange(8, 9))
    assert (whole - step).norm() < 0.02 * whole.norm()
    other = llama.forward(ids[:, :1], torch.arange(8, 9))
    assert (whole - other).norm() > 0.1 * whole.norm()
    for run in (llama.prompt(5), llama.step(5)):
        assert run().shape == (1, 1, TINY.vocabulary)
    peer = gpu_peers.cublas(K, N, cold=5 * K * N, passes=2)
    run, count = peer.bind(3)
    run()
    assert (peer.nbytes, count) == (2 * K * N, 2 * 3)


def test_a_folder_is_prepared_in_several_runs(tmp_path: Path) -> None:
    for files in (["a", "b"], ["b", "c"]):
        folder = gpu_prepare.Folder(tmp_path, tmp_path, ())
        folder.entries = [{"file": file, "in": files} for file in files]
        folder.close(1)
    found = json.loads((tmp_path / "manifest.json").read_text())
    assert {entry["file"]: entry["in"] for entry in found} == {
        "b": ["b", "c"],
        "c": ["b", "c"],
        "a": ["a", "b"],
    }


def test_too_much_is_refused(folder: Path) -> None:
    with pytest.raises(gpu_prepare.UsageError, match=r"is more than 0.001 MiB"):
        gpu_prepare.Folder(folder, folder, ()).close(0.001)


def test_order() -> None:
    """What targets are set for comes before the rest of its kind, correctness before speed."""
    entries = [{"kind": "layer", "K": K, "N": N, "file": f"{K}"} for K, N in ((14336, 4096), (4096, 14336))]
    entries += [{"kind": kind, "file": kind} for kind in ("llama", "decoder")]
    jobs = gpu.jobs_of(entries, gpu.PARTS)
    assert jobs == ["limits", "models decoder", "layers 4096", "llama llama", "layers 14336"]
    assert gpu.jobs_of(entries, ["llama"]) == ["llama llama"]


def test_what_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A worker that says nothing more is killed; another does the next job, as one after a crash does."""
    script = tmp_path / "gpu_worker.py"
    script.write_text(
        "import json, os, sys, time\n"
        "job = json.loads(sys.argv[1])['jobs'][0]\n"
        "def emit(**row): print('\\x1e' + json.dumps({**row, 'job': job}), flush=True)\n"
        "emit(kind='job')\n"
        "if job == 'hangs': time.sleep(60)\n"
        "if job == 'crashes': os._exit(7)\n"
        "emit(kind='done')\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "gpu.py"))
    monkeypatch.setattr(gpu, "JOB_SECONDS", 1.0)
    supervisor = gpu.Supervisor({}, time.monotonic() + 60)
    supervisor.run(["works", "hangs", "crashes", "ends"])
    assert [
        (row["kind"], row["job"], row.get("text")) for row in supervisor.rows if row["kind"] != "job"
    ] == [
        ("done", "works", None),
        ("failure", "hangs", "took too long, and was ended"),
        ("failure", "crashes", "the process ended with 7"),
        ("done", "ends", None),
    ]
    late = gpu.Supervisor({}, time.monotonic())
    late.run(["works"])
    assert [row["text"] for row in late.rows] == ["no time left"]
