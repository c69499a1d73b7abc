"""The SDK: what a C or C++ program is built against, from the sources that travel with the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qgraph.errors import ResourceError, UsageError
from qgraph.runtime.amalgamation import amalgamate
from qgraph.runtime.build import ROOT, find_compiler


def install(out: Path) -> list[Path]:
    """Build the runtime with CMake and install it to the folder `out`, which is new or empty.

    Headers, static and shared library, CMake package, pkg-config file and examples; nothing in there knows
    where it lies. Returns the files.

    Raises:
        UsageError: `out` is not a folder, or there is something in it.
        ResourceError: no CMake or compiler, a failed build, or a folder that cannot be written.
    """
    cmake, ninja = _tool("cmake"), _tool("ninja")
    if cmake is None:
        raise ResourceError("the SDK is built by CMake, and there is none: pip install cmake ninja")
    find_compiler()
    generator = [] if ninja is None else ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    with _appearing(out) as staging, tempfile.TemporaryDirectory(prefix="qgraph-sdk-") as build:
        options = ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_INSTALL_PREFIX={staging}"]
        options.append("-DCMAKE_INSTALL_LIBDIR=lib")
        _run(cmake, "-S", str(ROOT), "-B", build, *generator, *options)
        _run(cmake, "--build", build, "--parallel", str(os.cpu_count() or 1))
        _run(cmake, "--install", build, "--strip")
    return _files(out)


def write_amalgamation(out: Path) -> list[Path]:
    """Write `qgraph.h`, `qgraph.hpp` and `qgraph.cc` to the folder `out`, which is new or empty. Errors as of
    `install`."""
    with _appearing(out) as staging:
        for name, text in amalgamate().items():
            (staging / name).write_text(text)
    return _files(out)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def _tool(name: str) -> str | None:
    """A program on the PATH, or beside this Python, where wheels put theirs."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when the block succeeds; else nothing of it stays."""
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"{out} is there and not an empty folder: give another --out, or remove it")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp") as scratch:
            staging = Path(scratch) / "sdk"
            staging.mkdir()
            yield staging
            staging.replace(out)
    except OSError as error:
        where = f": {error.filename}" if error.filename not in (None, str(out)) else ""
        raise ResourceError(f"cannot write {out}: {error.strerror or error}{where}") from error


def _run(*command: str) -> None:
    """Raises ResourceError, with the first line that tells of an error, when the command fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    said = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")
    raise ResourceError(
        f"the SDK does not build: {' '.join(command[:2])} ends with status {done.returncode}: {said}"
    )
