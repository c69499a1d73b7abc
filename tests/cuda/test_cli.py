"""The verbs that run artifacts, and the C++ example, on the fake driver."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from artifact_builder import Parts, toy_inputs, toy_reference
from cmake_build import RUNTIME
from fake_cuda import environment

from qgraph.runtime import build

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(driver: Path) -> Cli:
    def cli(*arguments: object, code: int = 0, **settings: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", "-m", "qgraph", *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment(driver, **settings), cwd=RUNTIME.parent
        )
        assert done.returncode == code, done.stderr
        return done

    return cli


def test_run(cli: Cli, toy: Path) -> None:
    for options, device in ((), "cuda:0"), (("--device", "cuda:1"), "cuda:1"):
        found = json.loads(cli("run", toy, *options, "--json", devices=2).stdout)
        assert (found["device"], found["isa"]) == (device, "wide")
    done = cli("run", toy, "--device", "cuda:1", code=4)
    assert done.stderr == f"error: {toy}: there is no device 'cuda:1': the last one is cuda:0\n"
    for wrong in ("tpu", "cuda:", "cuda:-1", "CUDA", ""):
        done = cli("run", toy, "--device", wrong, code=2)
        assert done.stderr == f"error: unknown device '{wrong}': give cpu, cuda, or cuda:1 and so on\n"
    assert json.loads(cli("run", toy, "--device", "cuda", "--json").stdout)["isa"] == "wide"
    done = cli("run", toy, "--isa", "cuda-sm_80", code=4)  # a variant that there is, though not in this file
    assert done.stderr.startswith(f"error: {toy}: ")
    done = cli("run", toy, code=4, devices=0)
    assert "CUDA is not available: the NVIDIA driver is for CUDA 12.4, but sees no GPU" in done.stderr


def test_bench_and_profile(cli: Cli, toy: Path, decoder: Path) -> None:
    for artifact, options in ((toy, ("--repeat", 2)), (decoder, ("--decode", 3, "--repeat", 1))):
        assert cli("bench", artifact, *options).stdout.startswith("cuda:0; ")
        assert json.loads(cli("bench", artifact, *options, "--json").stdout)["device"] == "cuda:0"
    found = json.loads(cli("profile", toy, "--device", "cuda", "--repeat", 2, "--json").stdout)
    assert found["device"] == "cuda:0"
    assert sum(step["us"] for step in found["steps"]) > 0


def test_generate(cli: Cli, decoder: Path, tmp_path: Path) -> None:
    options = ("--prompt-ids", "1 2", "--ids", "-n", 5)
    assert len(cli("generate", decoder, *options, "--device", "cuda").stdout.split()) == 5
    (tmp_path / "model.onnx").write_bytes(b"")
    done = cli("generate", tmp_path / "model.onnx", *options, "--device", "cuda", code=2)
    assert "onnxruntime runs on the CPU, and the device 'cuda' is for artifacts" in done.stderr


def test_doctor_and_inspect(cli: Cli, toy: Path) -> None:
    for devices, words in (
        (2, "cuda:0: Fake GPU, compute capability 1.0, 1 GiB; cuda:1: Fake GPU"),
        (0, "none: CUDA is not available: the NVIDIA driver is for CUDA 12.4, but sees no GPU"),
    ):
        checks = json.loads(cli("doctor", "--json", devices=devices).stdout)
        found = next(check for check in checks if check["name"] == "GPU")
        assert found["ok"]  # none is needed
        assert found["found"].startswith(words)
    held = json.loads(cli("inspect", toy, "--json").stdout)
    assert [(v["isa"], v["arch"]) for v in held["code"]] == [(i, "cuda") for i in ("future", "wide", "base")]
    assert sum(kernel["steps"] for kernel in held["kernels"]) == 8


def test_example(driver: Path, toy: Path, toy_parts: Parts, tmp_path: Path) -> None:
    """The C++ example with the library and the driver alone."""
    program, library = tmp_path / "qgraph_run", build.library()
    sources = [RUNTIME / "examples" / "run.cc", f"-I{RUNTIME / 'include'}", library]
    link = ["-pthread", f"-Wl,-rpath,{library.parent}", "-o", program]
    subprocess.run(["g++", "-std=c++17", *map(str, (*sources, *link))], check=True)
    inputs = toy_inputs(3, 5)
    given = []
    for name, array in inputs.items():
        (tmp_path / f"{name}.bin").write_bytes(array.tobytes())
        given.append(f"{name}={tmp_path / name}.bin:3x5")
    command = [program, toy, *given, "--device", "cuda", "--out", tmp_path]
    report = tmp_path / "report"
    done = subprocess.run(command, capture_output=True, text=True, env=environment(driver, report=report))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{toy}: wide on cuda:0" in done.stdout
    for name, array in toy_reference(toy_parts, **inputs, isa_id=1).items():
        got = np.frombuffer((tmp_path / f"{name}.bin").read_bytes(), array.dtype)
        np.testing.assert_array_equal(got.reshape(array.shape), array)
    lines = [line for line in report.read_text().splitlines() if line.startswith("live")]
    assert len(lines) == 8
    assert all(line.endswith(" 0") for line in lines), lines
    done = subprocess.run(
        [program, toy, *given], capture_output=True, text=True, env=environment(driver, devices=0)
    )
    assert done.returncode == 1
    assert "CUDA is not available" in done.stderr
