"""What the CPU is tested with, on the fake driver."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fake_cuda import RUNTIME_TESTS, environment

from qgraph.runtime.build import cache_dir


def test_runtime_tests(driver: Path, tmp_path: Path) -> None:
    files = [str(RUNTIME_TESTS / name) for name in ("test_run.py", "test_state.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    env = environment(driver, report=tmp_path / "report")
    env |= {"QGRAPH_TEST_DEVICE": "cuda", "QGRAPH_TEST_CACHE": str(cache_dir())}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=RUNTIME_TESTS.parent.parent)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    report = (tmp_path / "report").read_text()
    launches = next(int(line.split()[2]) for line in report.splitlines() if "calls cuGraphLaunch " in line)
    assert launches > 200  # they did run on it
