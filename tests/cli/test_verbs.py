"""What every verb does when all is well."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_harness import ROOT, Compiled, default_signals, qgraph
from tiny_model import HIDDEN, INNER, VOCABULARY, save_tiny

from qgraph.config import CompileConfig

LAYERS = 12  # linear layers of the tiny transformer


def load_json(text: str) -> dict:
    """Strict JSON: no NaN, no Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def report(compiled: Compiled) -> dict:
    return load_json(compiled.report.read_text())


# ---- compile -----------------------------------------------------------------------------------------------


def test_compile_writes_three_files_and_a_table(compiled: Compiled) -> None:
    assert sorted(p.name for p in compiled.artifact.parent.iterdir()) == [
        "tiny.onnx",
        "tiny.qg",
        "tiny.report.json",
    ]
    out = compiled.result.out
    assert f"{LAYERS} of {LAYERS} linear layers quantized to nvfp4" in out
    assert f"{LAYERS} x matmul_nvfp4" in out
    assert "agrees with ONNX's reference evaluator" in out
    for path in (compiled.onnx, compiled.artifact, compiled.report):
        assert f"wrote  {path}" in out


def test_compile_shows_plain_progress_without_a_terminal(compiled: Compiled) -> None:
    """A line a phase, and more for one that takes long."""
    lines = [line.split()[0] for line in compiled.result.err.splitlines()]
    assert list(dict.fromkeys(lines)) == [
        "load",
        "prepare",
        "select",
        "quantize",
        "write",
        "import",
        "kernels",
        "package",
        "runtime",
        "verify",
    ]


def test_low_bit_file_is_standard(compiled: Compiled) -> None:
    model = onnx.load(compiled.onnx)
    onnx.checker.check_model(model, full_check=True)
    assert sum(node.domain == "ai.qgraph" for node in model.graph.node) == LAYERS
    assert {f.domain for f in model.functions} == {"ai.qgraph"}


def test_report_document(report: dict, compiled: Compiled) -> None:
    """The fields that docs/cli.md promises, with values that can be checked another way."""
    assert report["report_version"] == 1
    model = compiled.model.read_bytes()
    assert report["model"] == {"name": "tiny.onnx", "sha256": hashlib.sha256(model).hexdigest()}
    assert report["config"]["scheme"] == "nvfp4" and report["config"]["solver"] == "sweep"
    assert report["summary"]["linear_layers"] == report["summary"]["quantized_layers"] == LAYERS
    weights = 2 * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER)
    stored = weights * 9 // 16 + LAYERS * 4  # 4 bits a weight, 8 bits for 16 of them, a float32 a layer
    assert report["sizes"]["linear_float"] == 4 * weights
    assert report["sizes"]["linear_stored"] == stored
    assert report["summary"]["bits_per_weight"] == pytest.approx(8 * stored / weights, abs=1e-4)
    assert report["sizes"]["original"] == len(model)
    assert report["sizes"]["lowbit_onnx"] == compiled.onnx.stat().st_size
    assert report["sizes"]["artifact"] == compiled.artifact.stat().st_size
    assert report["isas"] == ["x86-64-v4-amx", "x86-64-v4", "x86-64-v3"]
    table, *layers = report["layers"]
    assert table["kind"] == "embedding" and table["shape"] == [VOCABULARY, HIDDEN] and not table["scheme"]
    assert table["kept"] == "embedding: --embeddings nvfp4 quantizes it" and table["kernel"] == "gather"
    assert (
        report["sizes"]["embedding_float"] == report["sizes"]["embedding_stored"] == 4 * VOCABULARY * HIDDEN
    )
    for layer in layers:
        assert layer["kind"] == "linear"
        assert layer["scheme"] == "nvfp4" and layer["kernel"] == "matmul_nvfp4" and not layer["kept"]
        assert 15 < layer["sqnr_db"] < 30
    assert report["verification"]["status"] == "passed"
    assert 0 < report["verification"]["worst_rel_error"] <= report["verification"]["limit"] == 1e-4
    assert [c["dims"] for c in report["verification"]["comparisons"]] == [
        {"batch": 2, "sequence": 7},
        {"batch": 1, "sequence": 1},
        {"batch": 3, "sequence": 17},
    ]
    assert report["files"] == {
        "onnx": str(compiled.onnx),
        "artifact": str(compiled.artifact),
        "report": str(compiled.report),
    }


def test_compile_is_reproducible_and_build_gives_the_same_artifact(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are compiled anew for it, in a process with another hash seed; the solver uses one thread."""
    monkeypatch.setenv("QGRAPH_CACHE_DIR", str(tmp_path / "cache"))
    options = ("--threads", "1", "--no-verify")
    again = qgraph("compile", "-q", compiled.model, "-o", tmp_path / "again", *options)
    monkeypatch.undo()
    assert again.code == 0 and again.err == ""
    assert (tmp_path / "again.qg").read_bytes() == compiled.artifact.read_bytes()
    assert (tmp_path / "again.onnx").read_bytes() == compiled.onnx.read_bytes()
    built = qgraph("build", "-q", compiled.onnx, "-o", tmp_path / "built")
    assert built.code == 0, built.err
    assert (tmp_path / "built.qg").read_bytes() == compiled.artifact.read_bytes()


def test_quantize_gives_the_same_onnx(compiled: Compiled, tmp_path: Path) -> None:
    done = qgraph("quantize", "-q", compiled.model, "-o", tmp_path / "q")
    assert done.code == 0, done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.onnx", "q.report.json"]
    assert (tmp_path / "q.onnx").read_bytes() == compiled.onnx.read_bytes()


def test_default_names_are_beside_the_model(tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny.onnx", layers=1)
    assert qgraph("compile", "-q", "tiny.onnx", "--no-verify", "--no-onnx", cwd=tmp_path).code == 0
    names = ["tiny.nvfp4.qg", "tiny.nvfp4.report.json", "tiny.onnx"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    report = load_json((tmp_path / "tiny.nvfp4.report.json").read_text())
    assert report["verification"]["status"] == "skipped"
    assert report["verification"]["reason"] == "--no-verify"
    assert "lowbit_onnx" not in report["sizes"]


def test_dry_run_writes_nothing_and_knows_the_sizes(compiled: Compiled, tmp_path: Path, report: dict) -> None:
    done = qgraph("compile", "-q", compiled.model, "-o", tmp_path / "x", "--dry-run", "--json")
    assert done.code == 0, done.err
    assert list(tmp_path.iterdir()) == []
    found = load_json(done.out)
    assert found["files"] == {}
    assert found["sizes"]["lowbit_onnx"] == report["sizes"]["lowbit_onnx"]
    assert 0 < found["sizes"]["artifact_weights"] < report["sizes"]["artifact"]
    unknown = {"kernel": "", "compute": "", "artifact_bits": 0.0}
    without_kernel = [{**layer, **unknown} for layer in report["layers"]]
    assert found["layers"] == without_kernel


def test_qdq_style_runs_alike(compiled: Compiled, tmp_path: Path) -> None:
    done = qgraph("compile", "-q", compiled.model, "-o", tmp_path / "qdq", "--onnx-style", "qdq")
    assert done.code == 0, done.err
    model = onnx.load(tmp_path / "qdq.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert not model.functions
    assert sum(node.op_type == "DequantizeLinear" for node in model.graph.node) == 2 * LAYERS
    assert (tmp_path / "qdq.qg").read_bytes() == compiled.artifact.read_bytes()
    built = qgraph("build", "-q", tmp_path / "qdq.onnx", "-o", tmp_path / "built")
    assert built.code == 0, built.err
    assert f"{LAYERS} x matmul_nvfp4" in built.out
    assert (tmp_path / "built.qg").read_bytes() == compiled.artifact.read_bytes()


@pytest.mark.parametrize("style", ["function", "qdq"])
def test_embeddings(style: str, tiny: Path, tmp_path: Path) -> None:
    """The table in 4 bits: the artifact is verified, and `build` of either style gives the same one."""
    options = ("--embeddings", "nvfp4", "--strict", "--onnx-style", style)
    done = qgraph("compile", "-q", tiny, "-o", tmp_path / "e", *options, "--json")
    assert done.code == 0, done.err
    report = load_json(done.out)
    assert report["summary"]["embeddings"] == report["summary"]["quantized_embeddings"] == 1
    table = report["layers"][0]
    stored = VOCABULARY * HIDDEN * 9 // 16 + 4
    assert (table["name"], table["scheme"], table["kernel"]) == ("embedding", "nvfp4", "gather_nvfp4")
    assert table["bits_per_weight"] == pytest.approx(8 * stored / (VOCABULARY * HIDDEN), abs=1e-4)
    assert 15 < table["sqnr_db"] < 30
    assert report["sizes"]["embedding_stored"] == stored
    assert report["verification"]["status"] == "passed"
    model = onnx.load(tmp_path / "e.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert ("QGatherNVFP4" in {node.op_type for node in model.graph.node}) == (style == "function")
    assert not any(t.name == "embedding.weight" for t in model.graph.initializer)
    built = qgraph("build", "-q", tmp_path / "e.onnx", "-o", tmp_path / "built", "--no-verify")
    assert built.code == 0, built.err
    assert (tmp_path / "built.qg").read_bytes() == (tmp_path / "e.qg").read_bytes()
    ids = np.full((1, 3), VOCABULARY, np.int64)
    np.savez(tmp_path / "in.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    ran = qgraph("run", tmp_path / "e.qg", "--input", tmp_path / "in.npz")
    assert ran.code == 3 and "embedding" in ran.err and "out of range" in ran.err
    inspected = load_json(qgraph("inspect", tmp_path / "e.qg", "--json").out)
    assert json.loads(inspected["qgraph.input_ranges"])["input_ids"] == [0, VOCABULARY - 1]
    assert json.loads(inspected["qgraph.config"])["embeddings"] == "nvfp4"


def test_include_and_exclude(tiny: Path, tmp_path: Path) -> None:
    options = ("--include", "layer.1.*", "--exclude", "*.down", "--no-verify", "--no-onnx", "--json")
    done = qgraph("compile", "-q", tiny, "-o", tmp_path / "some", *options)
    assert done.code == 0, done.err
    layers = {layer["name"]: layer for layer in load_json(done.out)["layers"]}
    quantized = {name for name, layer in layers.items() if layer["scheme"]}
    assert quantized == {f"layer.1.{part}" for part in ("query", "key", "value", "out", "up")}
    assert "exclude" in layers["layer.1.down"]["kept"]
    assert "include" in layers["layer.0.up"]["kept"]
    assert layers["layer.0.up"]["kernel"] == "matmul_f32"


def test_scheme_none_compiles_the_float_model(tiny: Path, tmp_path: Path) -> None:
    done = qgraph("compile", "-q", tiny, "-o", tmp_path / "float", "--scheme", "none")
    assert done.code == 0, done.err
    checked = qgraph("check", tmp_path / "float.qg", "--original", tiny, "--min-cosine", "0.999999", "--json")
    assert checked.code == 0, checked.err


def test_config_file_and_precedence(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('solver = "rtn"\nexclude = ["*.down"]\nseed = 5\n')
    options = ("--config", "a.toml", "--seed", "7", "--save-config", "b.toml", "--no-verify", "--json")
    done = qgraph("compile", "-q", tiny, "-o", "x", *options, cwd=tmp_path)
    assert done.code == 0, done.err
    config = load_json(done.out)["config"]
    assert (config["solver"], config["exclude"], config["seed"]) == ("rtn", ["*.down"], 7)
    saved = tomllib.loads((tmp_path / "b.toml").read_text())
    # The file has what was asked for, the report what came of it: defaults of the scheme in their place.
    assert saved["solver"] == "rtn" and saved["dual_scale"] == ""
    assert json.loads(json.dumps(CompileConfig.from_options(saved).resolved())) == config


def test_dump_and_explain(tiny: Path, tmp_path: Path) -> None:
    done = qgraph(
        "compile", "-q", tiny, "-o", tmp_path / "x", "--dry-run", "--dump", tmp_path / "dump", "--explain"
    )
    assert done.code == 0, done.err
    dumps = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert dumps[0] == "00-import.onnx" and dumps[-1] == "30-prepared.onnx"


def test_cross_compile_says_that_it_is_not_verified(tiny: Path, tmp_path: Path) -> None:
    done = qgraph("compile", "-q", tiny, "-o", tmp_path / "arm", "--target", "aarch64-linux")
    assert done.code == 0, done.err
    assert "verify" in done.out and "does not run aarch64-linux" in done.out
    assert "aarch64" in qgraph("inspect", tmp_path / "arm.qg").out


# ---- the other verbs ---------------------------------------------------------------------------------------


def test_run_on_files_equals_python(compiled: Compiled, tmp_path: Path) -> None:
    feeds = {
        "input_ids": np.random.default_rng(1).integers(0, VOCABULARY, (2, 5)),
        "attention_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    }
    for name, array in feeds.items():
        np.save(tmp_path / f"{name}.npy", array)
    inputs = [f"--input={name}={tmp_path / name}.npy" for name in feeds]
    done = qgraph("run", compiled.artifact, *inputs, "-o", tmp_path / "out.npz", "--threads", "1")
    assert done.code == 0, done.err
    from qgraph.runtime import load

    with load(compiled.artifact, threads=2) as model:
        wanted = model.run(feeds)
    with np.load(tmp_path / "out.npz") as found:
        assert set(found) == {"hidden"}
        np.testing.assert_array_equal(found["hidden"], wanted["hidden"])


def test_run_on_seeded_inputs(compiled: Compiled) -> None:
    run = [load_json(qgraph("run", compiled.artifact, "--dim", "batch=3", "--json").out) for _ in range(2)]
    assert run[0] == run[1]
    shapes = {tensor["name"]: tensor["shape"] for tensor in run[0]["tensors"]}
    assert shapes == {"input_ids": [3, 16], "attention_mask": [3, 16], "hidden": [3, 16, HIDDEN]}


def test_check(compiled: Compiled) -> None:
    references = ("--lowbit", compiled.onnx, "--original", compiled.model)
    done = qgraph(
        "check", compiled.artifact, *references, "--dim", "batch=2", "--dim", "sequence=9", "--json"
    )
    assert done.code == 0, done.err
    lowbit, original = load_json(done.out)["comparisons"]
    assert lowbit["against"] == "lowbit" and 0 < lowbit["rel_error"] < 1e-4
    assert original["against"] == "original" and 0.9 < original["cosine"] < 0.99999


def test_bench(compiled: Compiled) -> None:
    options = ("--onnx", compiled.model, "--repeat", "5", "--threads", "1", "--json")
    done = qgraph("bench", compiled.artifact, *options)
    assert done.code == 0, done.err
    found = load_json(done.out)
    assert found["threads"] == 1
    ours, theirs = found["latency"]
    assert ours["name"].startswith("qgraph") and theirs["name"] == "ONNX Runtime, float"
    for row in (ours, theirs):
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["p90_ms"] and row["runs"] == 5


def test_profile(compiled: Compiled) -> None:
    done = qgraph("profile", compiled.artifact, "--repeat", "3", "--threads", "1", "--json")
    assert done.code == 0, done.err
    found = load_json(done.out)
    assert (found["threads"], found["past"], found["runs"]) == (1, 0, 2)
    assert found["between_us"] > 0
    total = found["between_us"] + sum(step["us"] for step in found["steps"])
    assert total == pytest.approx(found["wall_us"])
    text = qgraph("profile", compiled.artifact, "--repeat", "3", "--threads", "1").out
    assert "matmul_nvfp4\n" in text and "between steps" in text and "layer.0/" in text


def test_inspect_artifact(compiled: Compiled, report: dict) -> None:
    found = load_json(qgraph("inspect", compiled.artifact, "--json").out)
    assert found["nbytes"] == compiled.artifact.stat().st_size
    assert found["qgraph.scheme"] == "nvfp4"
    assert found["qgraph.model_sha256"] == report["model"]["sha256"]
    assert json.loads(found["qgraph.input_ranges"]) == {
        "input_ids": [0, VOCABULARY - 1],
        "attention_mask": [1, 1],
    }
    assert found["outputs"] == [{"name": "hidden", "dtype": "f32", "shape": ["batch", "sequence", HIDDEN]}]
    assert qgraph("inspect", compiled.artifact).code == 0


def test_inspect_onnx(compiled: Compiled) -> None:
    found = load_json(qgraph("inspect", compiled.onnx, "--json").out)
    assert found["opset ai.onnx"] >= 23
    assert {"operator": "ai.qgraph::QLinearNVFP4", "nodes": LAYERS} in found["operators"]
    assert [layer["kind"] for layer in found["layers"]] == ["embedding", *["linear"] * LAYERS]
    original = qgraph("inspect", compiled.model)
    assert original.code == 0 and "MatMul" in original.out


def test_schemes_is_the_table() -> None:
    from qgraph.schemes import SCHEMES

    assert [row["name"] for row in load_json(qgraph("schemes", "--json").out)] == list(SCHEMES)
    out = qgraph("schemes").out
    for scheme in SCHEMES.values():
        assert scheme.summary in out


def test_doctor() -> None:
    done = qgraph("doctor", "--json")
    assert done.code == 0, done.out + done.err
    names = {check["name"] for check in load_json(done.out)}
    assert {"python", "CPU", "C++ compiler", "cache folder", "runtime library", "kernel compiler"} <= names


def test_doctor_fails_where_something_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("QGRAPH_CACHE_DIR", str(tmp_path / "cache"))
    done = qgraph("doctor")
    assert done.code == 6
    assert "BROKEN  C++ compiler" in done.out and "BROKEN  runtime library" in done.out
    assert done.out.count("BROKEN") == 2
    assert re.fullmatch(r"error: 2 of \d+ checks failed: C\+\+ compiler, runtime library\n", done.err)


@pytest.mark.parametrize(
    "verb", ["compile", "quantize", "build", "run", "bench", "inspect", "check", "eval", "view"]
)
def test_every_verb_has_help(verb: str) -> None:
    done = qgraph(verb, "--help")
    assert done.code == 0 and done.err == ""
    assert done.out.startswith(f"Usage: qgraph {verb}")


def test_version() -> None:
    import qgraph as package

    assert qgraph("--version").out == f"qgraph, version {package.__version__}\n"


def test_eval_sts(compiled: Compiled, tmp_path: Path) -> None:
    """With a tokenizer of single words. The float model against itself is a cosine of 1."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    words = [f"w{i}" for i in range(VOCABULARY)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    rng = np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(rng.choice(words, rng.integers(2, 9)))

    rows = [f"{sentence()},{sentence()},{rng.integers(0, 6)}" for _ in range(20)]
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    task = (
        "--data",
        tmp_path / "pairs.csv",
        "--tokenizer",
        tmp_path / "tokenizer.json",
        "--output",
        "hidden",
    )
    done = qgraph("eval", "sts", compiled.artifact, *task, "--against", compiled.model, "-q", "--json")
    assert done.code == 0, done.err
    found = load_json(done.out)
    assert found["pairs"] == 20
    ours, theirs = (row["spearman"] for row in found["models"])
    assert found["spearman_difference"] == pytest.approx(ours - theirs)
    assert 0.9 < found["mean_cosine"] < 0.99999
    itself = qgraph("eval", "sts", compiled.model, *task, "--against", compiled.model, "-q", "--json")
    assert load_json(itself.out)["mean_cosine"] == pytest.approx(1)


def test_view_serves_on_loopback(compiled: Compiled) -> None:
    pytest.importorskip("netron", reason="needs the package netron")
    args = [sys.executable, "-u", "-m", "qgraph", "view", str(compiled.onnx), "--no-browser"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        args,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=default_signals,
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[0]
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address, timeout=10) as page:
            assert b"Netron" in page.read()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


def test_live_progress_on_a_terminal(tiny: Path, tmp_path: Path) -> None:
    """On a terminal there are bars; names in them are escaped by the same function as everywhere."""
    reader, writer = pty.openpty()
    args = [sys.executable, "-m", "qgraph", "quantize", str(tiny), "-o", str(tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    process = subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal is an I/O error
        while block := os.read(reader, 4096):
            shown += block
    os.close(reader)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert "\u2713".encode() in shown and b"quantize" in shown
    assert b"\x1b" not in out
