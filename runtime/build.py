"""Builds the runtime's shared library, and the one for ONNX Runtime, from their sources, once a machine, with
the C++17 compiler at hand.

The libraries lie in a cache folder under names that hash sources, compiler and flags: any change gives new
files, and processes that build at the same time give the same ones. For ELF systems, as is the runtime.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from qgraph.errors import ResourceError

ROOT = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
# The baseline of the architecture, never -march=native: the cache folder may be shared between machines.
COMPILE_FLAGS = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-DNDEBUG",
)
# Behind the objects. dlopen() is a library of its own before glibc 2.34.
LINK_FLAGS = ("-shared", "-pthread", "-Wl,-z,defs", "-Wl,-z,relro", "-Wl,-z,now", "-s", "-ldl")
HINT = "install g++ or clang, or set QGRAPH_RUNTIME_LIBRARY to a prebuilt libqgraph.so"


def cache_dir() -> Path:
    """Folder for built libraries: $QGRAPH_CACHE_DIR, else $XDG_CACHE_HOME/qgraph, else ~/.cache/qgraph."""
    if folder := os.environ.get("QGRAPH_CACHE_DIR"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "qgraph"
    return Path.home() / ".cache" / "qgraph"


def find_compiler() -> list[str]:
    """Command of the C++ compiler: $CXX (which may hold flags) or the first known name on the PATH.

    Raises:
        ResourceError: there is none, or $CXX is not a command.
    """
    if chosen := os.environ.get("CXX"):
        try:
            command = shlex.split(chosen)
        except ValueError as error:
            raise ResourceError(f"$CXX, {chosen!r}, is not a command: {str(error).lower()}") from None
        if command and shutil.which(command[0]):
            return command
        raise ResourceError(f"the C++ compiler of $CXX, {chosen!r}, is not to be found: {HINT}")
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise ResourceError(f"the runtime needs a C++17 compiler once, and there is none: {HINT}")


def library() -> Path:
    """Path of the shared library, built if the cache has it not.

    `$QGRAPH_RUNTIME_LIBRARY` names a library to use instead.

    Raises:
        ResourceError: no compiler, a failed build, or a cache folder that cannot be written.
    """
    if prebuilt := os.environ.get("QGRAPH_RUNTIME_LIBRARY"):
        path = Path(prebuilt)
        if not path.is_file():
            raise ResourceError(f"QGRAPH_RUNTIME_LIBRARY: no such file: {prebuilt}")
        return path
    return build(cache_dir())


def ort_library() -> Path:
    """Path of `libqgraph_ort.so`, for `onnxruntime.SessionOptions.register_custom_ops_library`: the operators
    of files that `--export ort` writes. Built if the cache has it not.

    With `$QGRAPH_RUNTIME_LIBRARY` it is the file `libqgraph_ort.so` beside that.

    Raises:
        ResourceError: as `library`.
    """
    if os.environ.get("QGRAPH_RUNTIME_LIBRARY"):
        path = library().with_name("libqgraph_ort.so")
        if not path.is_file():
            raise ResourceError(f"QGRAPH_RUNTIME_LIBRARY: there is no {path}")
        return path
    return _ort(build(cache_dir()))


def _ort(runtime: Path) -> Path:
    return runtime.with_name(runtime.name.replace("libqgraph-", "libqgraph_ort-"))


def build(folder: Path) -> Path:
    """Build the libraries into a folder, unless they are there, and return the runtime's path. Processes may
    race.

    Raises:
        ResourceError: as `library`.
    """
    compiler = find_compiler()
    target = folder / f"libqgraph-{_key(compiler)}.so"
    if target.is_file():  # and the other, which came first
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder), tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
            if target.is_file():  # somebody else was first
                return target
            runtime, ort = _compile(compiler, Path(scratch))
            # Atomic: nobody sees half a library; of two builders, the last wins.
            ort.replace(_ort(target))
            runtime.replace(target)
    except OSError as error:
        hint = "set QGRAPH_CACHE_DIR to a folder that can be written"
        raise ResourceError(f"cannot build the runtime in {folder}: {error}: {hint}") from error
    return target


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits for who builds in the folder. Where its file system has no locks builders work side by side."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@cache
def _sources() -> tuple[Path, ...]:
    """Everything that goes into the libraries, in a fixed order."""
    public = (ROOT / "include" / "qgraph").iterdir()
    return tuple(sorted([*(ROOT / "src").iterdir(), *(ROOT / "ort").iterdir(), *public]))


def _key(compiler: list[str]) -> str:
    """Hash of what the library depends on: sources, flags, and the compiler (command, size, time)."""
    state = hashlib.sha256()
    binary = Path(shutil.which(compiler[0]) or compiler[0]).resolve()
    stat = binary.stat()
    for part in (*compiler, str(binary), stat.st_size, stat.st_mtime_ns, *COMPILE_FLAGS, *LINK_FLAGS):
        state.update(f"{part}\0".encode())
    for path in _sources():
        data = path.read_bytes()
        state.update(f"{path.name}\0{len(data)}\0".encode() + data)
    return state.hexdigest()[:20]


def _compile(compiler: list[str], scratch: Path) -> tuple[Path, Path]:
    """Compile the translation units in parallel and link them: the runtime, and the one for ONNX Runtime."""
    units = [path for path in _sources() if path.suffix == ".cc"]
    objects = {unit: scratch / f"{unit.stem}.o" for unit in units}

    def compile_unit(unit: Path) -> None:
        include = f"-I{ROOT / 'include'}"
        _run([*compiler, *COMPILE_FLAGS, include, "-c", str(unit)], objects[unit])

    def link(name: str, folder: Path, units: list[Path]) -> Path:
        exports = f"-Wl,--version-script={folder / 'exports.map'}"
        _run([*compiler, exports, *(str(objects[unit]) for unit in units), *LINK_FLAGS], scratch / name)
        return scratch / name

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(compile_unit, units))
    runtime = [unit for unit in units if unit.parent.name == "src"]
    return link("libqgraph.so", ROOT / "src", runtime), link("libqgraph_ort.so", ROOT / "ort", units)


def _run(command: list[str], target: Path) -> None:
    """Run a compiler that writes `target`. Raises ResourceError, with its first error, when it does not."""
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True, check=False)
    if done.returncode == 0 and target.is_file():
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = next(
        (f": {line}" for line in lines if "error" in line), f": {lines[0]}" if lines else " without a message"
    )
    ended = f"ends with status {done.returncode}" if done.returncode else "succeeds but writes no file"
    raise ResourceError(f"the runtime does not build: {shlex.join(command)} {ended}{said}")
