"""benchmarks/kernels.py on tiny layers: what it prints and writes. Times are not looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import large_pages  # noqa: E402
from ggml_engine import Ggml  # noqa: E402
from kernels import arguments, main  # noqa: E402
from machine import Neighbours, compute_limits, last_level_cache, memory_limit  # noqa: E402
from matmul_chain import bits_chain, chain, one_layer  # noqa: E402
from matmul_engines import AbsentError, OnnxRuntime, OpenVino, Problem, QGraph, Torch  # noqa: E402

import qgraph  # noqa: E402

K, N = 64, 96
TINY = Problem(K, N, threads=1, cold=3 * K * N)


def test_a_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "found.json"
    shape = f"--shapes {K}x{N} --rows 1,9 --threads 1 --schemes nvfp4 --peers ort-f32,ort-int4-a8"
    main(f"{shape} --cache 0.03 --passes 3 --repeats 2 --json {found} --work {tmp_path}".split())
    printed = capsys.readouterr().out
    assert f"### {K}x{N}" in printed
    assert "| 1 | 1 | qgraph nvfp4 | float32 |" in printed
    assert "times as fast as" in printed
    written = json.loads(found.read_text())
    cells = {(c["rows"], c["name"]): c for c in written["cells"]}
    assert {(1, "DRAM read"), (9, "float32 FMA"), (9, "ONNX Runtime int4, int8 x")} <= cells.keys()
    ours = cells[1, "qgraph nvfp4"]
    assert [len(times) for times in ours["repeats"]] == [3, 3]
    assert all(t > 0 for times in ours["repeats"] for t in times)
    assert ours["operations"] == 2 * K * N
    assert ours["nbytes"] == K * N // 2 + K // 16 * N + 4
    assert ours["layers"] * ours["nbytes"] >= 0.12 * 2**20  # four times the cache: from memory
    assert cells[9, "qgraph nvfp4"]["layers"] * ours["nbytes"] < 0.06 * 2**20


def test_pieces_of_two_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    large_pages.main(f"--shape {K}x{N} --schemes ternary/small --threads 1 --cache 0.005 --passes 1".split())
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "| ternary" in line]
    assert [row[2] for row in rows] == ["2 MiB", "4 KiB"] and all(float(row[3]) > 0 for row in rows)


@pytest.mark.parametrize("scheme", ["none", "nvfp4-w4a8", "ternary", "int4"])
def test_a_chain_computes_its_layers(scheme: str, tmp_path: Path) -> None:
    """The artifact of a chain of three is three artifacts of one layer, each with the weights of its turn."""
    layer = one_layer(K, N, tmp_path / "float.onnx")
    solver = {"solver": "rtn"} if scheme != "none" else {}
    one = qgraph.compile(layer, scheme=scheme, output=tmp_path / "one", verify=False, **solver).onnx
    assert one
    x = np.random.default_rng(1).standard_normal((2, K), np.float32)
    built = qgraph.build(chain(one, 3, tmp_path / "chain.onnx"), output=tmp_path / "chain", verify=False)
    assert built.artifact
    from onnx.reference import ReferenceEvaluator

    expected = ReferenceEvaluator(str(tmp_path / "chain.onnx")).run(None, {"x": x})[0]
    y = qgraph.load(built.artifact, threads=1).run({"x": x})["y"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    assert y.std() > 0.05  # neither vanished nor exploded


def test_layers_have_weights_of_their_own(tmp_path: Path) -> None:
    import onnx

    model = onnx.load(chain(one_layer(K, N, tmp_path / "one.onnx"), 5, tmp_path / "chain.onnx"))
    weights = [t.raw_data for t in model.graph.initializer if t.name.endswith("/W")]
    assert len(weights) == len(set(weights)) == 5
    assert len({bytes(sorted(data)) for data in weights}) == 1
    with pytest.raises(ValueError, match="too few"):
        chain(one_layer(4, 4, tmp_path / "one.onnx"), 9, tmp_path / "chain.onnx")


def test_a_chain_of_bits_is_what_onnx_runtime_takes() -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    model = bits_chain(K, N, 2, bits=4, block=32, accuracy=1)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    y = session.run(None, {"x": np.ones((3, K), np.float32)})[0]
    assert y.shape == (3, N)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("engine", [OnnxRuntime(2, 128, accuracy=4), Torch("bfloat16"), OpenVino("nvfp4")])
def test_peers_pass_over_their_chains(engine: OnnxRuntime | Torch | OpenVino) -> None:
    try:
        contender = engine(Problem(128, 128, threads=1, cold=128 * 128))
    except AbsentError as reason:
        pytest.skip(str(reason))
    assert contender.layers * contender.nbytes >= 128 * 128
    contender.bind(np.ones((2, 128), np.float32))()


@pytest.mark.parametrize(("kind", "error"), [("nvfp4", 0.25), ("q4_0", 0.25)])
@pytest.mark.parametrize("outputs", [256, 512])
def test_llama_cpp_computes_its_chain(kind: str, error: float, outputs: int) -> None:
    """Within what rounding the weights costs, in three layers or more."""
    if "QGRAPH_GGML" not in os.environ:
        pytest.skip(
            "QGRAPH_GGML=INCLUDE:LIBRARIES is not set: the folders of llama.cpp's headers and libraries"
        )
    engine = Ggml(kind, *map(Path, os.environ["QGRAPH_GGML"].split(":")))
    contender = engine(Problem(256, outputs, 1, 256 * outputs * 3 // 2))
    x = np.random.default_rng(1).standard_normal((3, 256), np.float32)
    run = contender.bind(x)
    run()
    weight = np.random.default_rng(0).standard_normal((outputs, 256), np.float32) / 16
    for i in range(contender.layers):
        x = x[:, :256] @ np.roll(weight, i, axis=0).T
    found = run.__self__.output()
    assert np.linalg.norm(found - x) < error * np.linalg.norm(x)


def test_folders_without_llama_cpp_are_named(tmp_path: Path) -> None:
    with pytest.raises(AbsentError, match="no ggml in"):
        Ggml("q4_0", tmp_path, tmp_path)(TINY)


def test_compiled_once_for_all_threads(tmp_path: Path) -> None:
    engine = QGraph("nvfp4", tmp_path)
    first = engine(TINY)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.qg")}
    assert len(times) == 2  # of a layer, and of the chain
    assert engine(Problem(K, N, 2, TINY.cold)).layers == first.layers
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.qg")}


def test_limits_count_what_they_do() -> None:
    """A turn of n multiply-adds counts two operations each; twice the threads do twice as much."""
    one, two = compute_limits(1), compute_limits(2)
    assert one[0].name == "float32 FMA"
    assert [limit.amount * 2 for limit in one] == [limit.amount for limit in two]
    memory = memory_limit(2, 1 << 20)
    assert memory.amount == 1 << 20
    for limit in (*one, memory):
        limit.run()
    assert last_level_cache() >= 1 << 15


def test_neighbours_are_shares() -> None:
    neighbours = Neighbours()
    subprocess.run([sys.executable, "-c", "sum(range(10**6))"], check=True)
    assert all(share >= 0 for share in neighbours.shares(0.5).values())


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (["--schemes", "nvfp5"], "unknown nvfp5; known: none, nvfp4"),
        (["--peers", "mkl"], "unknown mkl; known: ort-f32"),
        (["--shapes", "64x32"], "at least as many outputs"),
        (["--rows", "0"], "numbers above 0"),
    ],
)
def test_what_is_not_there_is_refused(
    option: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        arguments().parse_args(option)
    assert says in capsys.readouterr().err
