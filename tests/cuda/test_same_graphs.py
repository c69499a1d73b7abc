"""Graphs that the CPU's code generation is tested with, compiled for the emulated GPU and run on the fake
driver."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cuda import HERE, environment

CODEGEN = HERE.parent / "codegen"
# What of each; the others need no more operators, but minutes.
FILES = {
    "test_random_graphs.py": "",
    "test_rotary.py": "",
    "test_state.py": "padded or truncated or last_positions or int8_cache",
}


@pytest.mark.parametrize("name", FILES)
def test_graphs(name: str, driver: Path, tmp_path: Path) -> None:
    plain = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "on_emulated_gpu"]
    command = [sys.executable, "-m", "pytest", *plain, str(CODEGEN / name), "-k", FILES[name]]
    env = environment(driver, report=tmp_path / "report")
    env["PYTHONPATH"] = os.pathsep.join(map(str, [HERE, CODEGEN, *filter(None, sys.path)]))
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=HERE.parent.parent)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    report = (tmp_path / "report").read_text()
    assert any("calls cuGraphLaunch " in line for line in report.splitlines())  # they did run on it
