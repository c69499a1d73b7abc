"""Targets that have nothing but this to run on here: artifacts, static libraries and the runtime, by Debian's
cross compilers and qemu."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import encoder_model
import numpy as np
import pytest
from cmake_build import RUNTIME, run
from emulated import MACHINES, Machine
from golden_models import load_runs

import qgraph
from qgraph.pipeline import CompileResult
from qgraph.runtime import sdk

TESTS = Path(__file__).parents[1]
IDS = np.array([[3, 14, 15, 9, 26]], np.int64)
INPUTS = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "token_type_ids": np.zeros_like(IDS)}


@dataclass(frozen=True)
class Toolchain:
    """A machine and the runtime compiled for it."""

    machine: Machine
    folder: Path

    def build(self, program: Path, *sources: Path, include: tuple[Path, ...]) -> list[str | Path]:
        """Compile and link a program with the runtime; the command that runs it."""
        options = ["-std=c++17", "-O0", "-Wno-psabi", "-static", "-pthread", *(f"-I{i}" for i in include)]
        sources = (*sources, self.folder / "qgraph.o")
        run(self.machine.compiler, *options, *sources, "-o", program)
        return [self.machine.qemu, program]


@pytest.fixture(scope="module", params=MACHINES.values(), ids=lambda machine: machine.target)
def toolchain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Toolchain:
    machine = request.param
    if machine.missing:
        pytest.skip(machine.missing)
    folder = tmp_path_factory.mktemp("runtime") / "single"
    sdk.write_amalgamation(folder)
    strict = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    run(machine.compiler, *strict, "-c", folder / "qgraph.cc", "-o", folder / "qgraph.o")
    return Toolchain(machine, folder)


@pytest.fixture(scope="module")
def example(toolchain: Toolchain) -> list[str | Path]:
    """The command that runs examples/run.cc."""
    include = (RUNTIME / "include",)
    return toolchain.build(toolchain.folder / "run", RUNTIME / "examples" / "run.cc", include=include)


def given(inputs: Mapping[str, np.ndarray], folder: Path) -> list[str]:
    """Its arguments for these inputs."""
    for name, array in inputs.items():
        array.tofile(folder / f"{name}.in")
    return [f"{name}={folder / name}.in:{'x'.join(map(str, array.shape))}" for name, array in inputs.items()]


def options_of(toolchain: Toolchain) -> dict[str, object]:
    return {"include": ("*",), "onnx": False, "target": toolchain.machine.target}


@pytest.fixture(scope="module")
def want(encoder: CompileResult) -> np.ndarray:
    with encoder.load() as model:
        return model.run(INPUTS)["last_hidden_state"]


@pytest.mark.slow
def test_artifact(toolchain: Toolchain, example: list[str | Path], want: np.ndarray, tmp_path: Path) -> None:
    source = encoder_model.save(tmp_path / "encoder.onnx")
    result = qgraph.compile(source, output=tmp_path / "model", **options_of(toolchain))
    assert result.report.verification is not None and result.report.verification.status == "skipped"
    run(*example, tmp_path / "model.qg", *given(INPUTS, tmp_path), "--out", tmp_path)
    got = np.fromfile(tmp_path / "last_hidden_state.bin", np.float32).reshape(want.shape)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.slow
def test_refusals(toolchain: Toolchain, example: list[str | Path], tmp_path: Path) -> None:

    def said(file: Path) -> str:
        return subprocess.run([*example, file], capture_output=True, text=True).stderr

    foreign = TESTS / "golden" / "0.1.0" / "encoder-ternary.qg"
    assert f"compile the model with --target {toolchain.machine.target}\n" in said(foreign)
    if toolchain.machine.target == "armv7-linux":
        with (tmp_path / "large.qg").open("wb") as file:
            file.truncate(3 << 30)
        message = "large.qg: is larger than this process, of 32 bits, can map"
        assert message in said(tmp_path / "large.qg")


@pytest.mark.slow
@pytest.mark.parametrize("toolchain", [MACHINES["aarch64"]], indirect=True, ids=["aarch64-linux"])
def test_golden_artifacts(toolchain: Toolchain, example: list[str | Path], tmp_path: Path) -> None:
    """As tests/golden/test_golden.py, which runs what this machine can."""
    files = sorted((TESTS / "golden").glob("*/*-aarch64.qg"))
    assert files
    for file in files:
        for inputs, outputs in zip(*load_runs(file.with_suffix(".npz")), strict=True):
            run(*example, file, *given(inputs, tmp_path), "--out", tmp_path)
            for name, array in outputs.items():
                got = np.fromfile(tmp_path / f"{name}.bin", array.dtype).reshape(array.shape)
                np.testing.assert_allclose(got, array, rtol=0, atol=1e-5 * np.abs(array).max())


_EMBED = """
#include <cstdio>
#include "qgraph.hpp"
#include "model.h"
int main() {
  const std::int64_t ids[] = {%s}, ones[] = {%s}, zeros[%d] = {};
  const std::vector<std::int64_t> shape{1, %d};
  const qgraph::Model model(model_artifact);
  qgraph::Session session(model);
  session.bind_input(model.input("input_ids"), ids, shape);
  session.bind_input(model.input("attention_mask"), ones, shape);
  session.bind_input(model.input("token_type_ids"), zeros, shape);
  const std::vector<float> hidden = session.make_output<float>(0), pooled = session.make_output<float>(1);
  session.run();
  for (float value : hidden) std::printf("%%.9g\\n", value);
}
"""


@pytest.mark.slow
def test_static_library(toolchain: Toolchain, want: np.ndarray, tmp_path: Path) -> None:
    source = encoder_model.save(tmp_path / "encoder.onnx")
    qgraph.compile(source, output=tmp_path / "model", format="static-lib", **options_of(toolchain))
    ids = ", ".join(map(str, IDS[0]))
    ones = ", ".join("1" * IDS.size)
    (tmp_path / "embed.cc").write_text(_EMBED % (ids, ones, IDS.size, IDS.size))
    sources = tmp_path / "embed.cc", tmp_path / "libmodel.a"
    command = toolchain.build(tmp_path / "embed", *sources, include=(toolchain.folder, tmp_path))
    got = np.array(run(*command).split(), np.float32).reshape(want.shape)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.slow
def test_units(toolchain: Toolchain, tmp_path: Path) -> None:
    """How kernels are called, and arithmetic that a processor's width has a part in."""
    include = (RUNTIME / "src", RUNTIME / "include")
    run(*toolchain.build(tmp_path / "units", RUNTIME / "tests" / "test_units.cc", include=include))
