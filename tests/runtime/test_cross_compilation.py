"""Targets that have nothing but this to run on here: artifacts, static libraries and the runtime, by Debian's
cross compilers and qemu."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import encoder_model
import numpy as np
import pytest
from cmake_build import RUNTIME, run

import qgraph
from qgraph.pipeline import CompileResult
from qgraph.runtime import sdk

IDS = np.array([[3, 14, 15, 9, 26]], np.int64)
INPUTS = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "token_type_ids": np.zeros_like(IDS)}


@dataclass(frozen=True)
class Machine:
    """A target, its qemu, and what Debian calls it."""

    target: str
    qemu: str
    triple: str


MACHINES = [
    Machine("armv7-linux", "qemu-arm", "arm-linux-gnueabihf"),
    Machine("riscv64-linux", "qemu-riscv64", "riscv64-linux-gnu"),
]


@dataclass(frozen=True)
class Toolchain:
    """A machine and the runtime compiled for it."""

    machine: Machine
    folder: Path

    def build(self, program: Path, *sources: Path, include: tuple[Path, ...]) -> list[str | Path]:
        """Compile and link a program with the runtime; the command that runs it."""
        options = ["-std=c++17", "-O0", "-Wno-psabi", "-static", "-pthread", *(f"-I{i}" for i in include)]
        sources = (*sources, self.folder / "qgraph.o")
        run(f"{self.machine.triple}-g++", *options, *sources, "-o", program)
        return [self.machine.qemu, program]


@pytest.fixture(scope="module", params=MACHINES, ids=lambda machine: machine.target)
def toolchain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Toolchain:
    machine = request.param
    if not (shutil.which(machine.qemu) and shutil.which(f"{machine.triple}-g++")):
        pytest.skip(
            f"needs {machine.qemu} and {machine.triple}-g++ (Debian: qemu-user, g++-{machine.triple})"
        )
    folder = tmp_path_factory.mktemp("runtime") / "single"
    sdk.write_amalgamation(folder)
    strict = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    run(f"{machine.triple}-g++", *strict, "-c", folder / "qgraph.cc", "-o", folder / "qgraph.o")
    return Toolchain(machine, folder)


def options_of(toolchain: Toolchain) -> dict[str, object]:
    return {"include": ("*",), "onnx": False, "target": toolchain.machine.target}


@pytest.fixture(scope="module")
def want(encoder: CompileResult) -> np.ndarray:
    with encoder.load() as model:
        return model.run(INPUTS)["last_hidden_state"]


@pytest.mark.slow
def test_artifact(toolchain: Toolchain, want: np.ndarray, tmp_path: Path) -> None:
    source = encoder_model.save(tmp_path / "encoder.onnx")
    result = qgraph.compile(source, output=tmp_path / "model", **options_of(toolchain))
    assert result.report.verification is not None and result.report.verification.status == "skipped"
    include = (RUNTIME / "include",)
    command = toolchain.build(tmp_path / "run", RUNTIME / "examples" / "run.cc", include=include)
    feeds = []
    for name, value in INPUTS.items():
        value.tofile(tmp_path / name)
        feeds.append(f"{name}={tmp_path / name}:1x{IDS.size}")
    run(*command, tmp_path / "model.qg", *feeds, "--out", tmp_path)
    if toolchain.machine.target == "armv7-linux":
        with (tmp_path / "large.qg").open("wb") as file:
            file.truncate(3 << 30)
        done = subprocess.run([*command, tmp_path / "large.qg"], capture_output=True, text=True)
        assert "large.qg: is larger than this process, of 32 bits, can map" in done.stderr
    got = np.fromfile(tmp_path / "last_hidden_state.bin", np.float32).reshape(want.shape)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


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
