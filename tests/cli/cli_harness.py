"""Runs `qgraph` as a user does: in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Result:
    """What a run of the command line gave."""

    code: int
    out: str
    err: str


def command(*args: str, cwd: Path | None = None, timeout: float = 300) -> Result:
    """Any command, with the checkout importable."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        args,
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def default_signals() -> None:
    """For `preexec_fn`: a shell's background job, as CI may be, ignores SIGINT, and so would its children."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def qgraph(*args: object, cwd: Path | None = None, timeout: float = 300) -> Result:
    """`qgraph ARGS`."""
    return command(sys.executable, "-m", "qgraph", *map(str, args), cwd=cwd, timeout=timeout)


@dataclass(frozen=True)
class Compiled:
    """The tiny model and the three files that compiling it wrote."""

    model: Path
    onnx: Path
    artifact: Path
    report: Path
    result: Result
