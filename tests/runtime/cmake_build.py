"""CMake builds of the runtime for the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

RUNTIME = Path(__file__).parents[2] / "runtime"
# The C++ tests that know of threads, built a second time.
RACES = ("test_thread_pool", "test_session", "test_state", "test_hooks", "test_static")


def run(*command: str | Path, **options: Any) -> str:
    """Standard output of a command; a failure shows all that it printed."""
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command} gave {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


def tool(name: str) -> str:
    """Path of a tool, from the PATH or beside this Python (wheels bring cmake and ninja); else skips."""
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        pytest.skip(f"needs {name}")
    return path


def cmake_build(source: Path, folder: Path, *options: str, targets: Sequence[str] = ("all",)) -> None:
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    run(tool("cmake"), "-S", source, "-B", folder, *generator, *options)
    run(tool("cmake"), "--build", folder, "--parallel", str(os.cpu_count() or 1), "--target", *targets)


@cache
def sanitizer(names: str = "address,undefined") -> str:
    """`names` if the compiler builds with these sanitizers and the system runs the result, else nothing."""
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        command = f"{compiler} -fsanitize={names} -x c++ - -o {folder}/a"
        done = subprocess.run(command.split(), input="int main(){}", text=True, capture_output=True)
        works = done.returncode == 0 and subprocess.run([f"{folder}/a"], capture_output=True).returncode == 0
    return names if works else ""
