"""A CUDA driver without a GPU (fake_driver.cc), and processes that run with it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
RUNTIME_TESTS = HERE.parent / "runtime"


def build(folder: Path) -> Path:
    """Compile the driver into a folder for LD_LIBRARY_PATH."""
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    library = folder / "libcuda.so.1"
    link = [f"-Wl,-soname,{library.name}", "-o", str(library), "-ldl"]
    command = ["g++", *flags, str(HERE / "fake_driver.cc"), *link]
    subprocess.run(command, check=True)
    return folder


@dataclass(frozen=True)
class Report:
    """What the driver says of a process that has ended: things never freed by kind, calls by function."""

    live: dict[str, int]
    calls: dict[str, int]
    output: str


def environment(driver: Path | None, **settings: object) -> dict[str, str]:
    """Environment of a process with this driver, None for none at all; settings such as devices=2 are the
    driver's (FAKE_CUDA_DEVICES)."""
    paths = [str(driver)] if driver else []
    search = [*paths, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    fake = {f"FAKE_CUDA_{name.upper()}": str(value) for name, value in settings.items()}
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(search), **fake}


def run_script(driver: Path | None, report: Path, script: str, **settings: object) -> Report:
    """Run Python with qgraph, the modules of tests/runtime and this folder, and `libcuda`, if there is one.
    Fails if the script does, or writes to stderr."""
    prelude = f"""
import sys
sys.path[:0] = {[str(HERE), str(RUNTIME_TESTS), *sys.path]!r}
import numpy as np
from qgraph import runtime
from qgraph.errors import InputError, ResourceError, UnsupportedError
"""
    if driver:
        prelude += "from libcuda import GpuMemory, libcuda, live\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", prelude + script],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(driver, report=report, **settings),
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    lines = [line.split() for line in report.read_text().splitlines()] if report.exists() else []
    counts = {
        kind: {name: int(count) for what, name, count in lines if what == kind} for kind in ("live", "calls")
    }
    return Report(counts["live"], counts["calls"], done.stdout)
