"""The shared library as a file: symbols, dependencies, size; and how `build.py` comes by it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cmake_build import RUNTIME, run

import qgraph
from qgraph.errors import ResourceError
from qgraph.runtime import _native, build

ALLOWED = (
    "libc.so",
    "libm.so",
    "libstdc++.so",
    "libgcc_s.so",
    "libpthread.so",
    "libdl.so",
    "ld-linux",
    "linux-vdso",
)


@pytest.fixture(scope="module")
def library(cache: Path) -> Path:
    return build.library()


def declared() -> set[str]:
    """Functions of the public header."""
    text = re.sub(r"/\*.*?\*/", "", (RUNTIME / "include/qgraph/qgraph.h").read_text(), flags=re.S)
    return set(re.findall(r"QG_API[^;(]*?(qg_\w+)\(", text))


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_exports_are_the_header(library: Path) -> None:
    lines = run("nm", "-D", "--defined-only", library).splitlines()
    assert {line.split()[-1] for line in lines} == declared()


@pytest.mark.skipif(shutil.which("ldd") is None, reason="needs ldd")
def test_depends_on_the_c_and_cpp_libraries_only(library: Path) -> None:
    names = [line.split()[0].rsplit("/", 1)[-1] for line in run("ldd", library).splitlines()]
    assert names
    assert [name for name in names if not name.startswith(ALLOWED)] == []


def test_size(library: Path) -> None:
    assert library.stat().st_size < 2_000_000


def test_version_is_the_packages(cache: Path) -> None:
    assert _native.library().qg_version().decode() == qgraph.__version__


def test_bindings_match_the_header() -> None:
    assert set(_native._PROTOTYPES) <= declared()
    text = (RUNTIME / "include/qgraph/qgraph.h").read_text()
    dtypes = re.findall(r"QG_(\w+) = \d+", text[text.index("enum qg_dtype") : text.index("} qg_dtype")])
    assert [name.lower() for name in dtypes] == list(_native.DTYPES)
    statuses = re.findall(r"QG_\w+ = (\d+)", text[text.index("enum qg_status") : text.index("} qg_status")])
    assert {int(s) for s in statuses} == {0, 8} | set(_native._ERRORS)


def test_headers_are_clean(tmp_path: Path) -> None:
    """The C header under strict C99, the C++ header under C++17, each by itself."""
    include = RUNTIME / "include"
    strict = ["-pedantic", "-Wall", "-Wextra", "-Werror", f"-I{include}", "-fsyntax-only"]
    c, cpp = tmp_path / "c.c", tmp_path / "cpp.cc"
    c.write_text('#include "qgraph/qgraph.h"\nint use(void);\nint use(void) { return QG_OK; }\n')
    cpp.write_text('#include "qgraph/qgraph.hpp"\n#include "qgraph/qgraph.hpp"\n')
    run(os.environ.get("CC", "cc"), "-std=c99", *strict, c)
    run(*os.environ.get("CXX", "c++").split(), "-std=c++17", *strict, cpp)


def test_sources_are_formatted() -> None:
    clang_format = shutil.which("clang-format") or shutil.which(
        "clang-format", path=str(Path(sys.executable).parent)
    )
    if clang_format is None:
        pytest.skip("needs clang-format")
    folders = [RUNTIME, Path(__file__).parent]
    files = [
        path for folder in folders for kind in ("h", "hpp", "cc", "c") for path in folder.rglob(f"*.{kind}")
    ]
    run(clang_format, "--dry-run", "--Werror", *files)


def test_second_use_builds_nothing(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(build, "_compile", refuse)
    assert build.library() == library
    monkeypatch.setattr(build, "COMPILE_FLAGS", (*build.COMPILE_FLAGS, "-O3"))
    with pytest.raises(AssertionError, match="built again"):
        build.library()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QGRAPH_CACHE_DIR", str(tmp_path / "a"))
    assert build.cache_dir() == tmp_path / "a"
    monkeypatch.delenv("QGRAPH_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert build.cache_dir() == tmp_path / "b" / "qgraph"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert build.cache_dir() == tmp_path / "c" / ".cache" / "qgraph"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ResourceError, match=r"needs a C\+\+17 compiler.*install g\+\+.*QGRAPH_RUNTIME_LIBRARY"
    ):
        build.build(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(ResourceError, match="'no-such-compiler -m64', is not to be found"):
        build.build(tmp_path)


def test_failing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "c++ -fno-such-flag")
    folder = tmp_path / "cache"
    with pytest.raises(ResourceError, match=r"does not build.*no-such-flag"):
        build.build(folder)
    assert list(folder.iterdir()) == []  # nothing half-built stays


def test_unwritable_cache(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ResourceError, match="set QGRAPH_CACHE_DIR to a folder that can be written"):
        build.build(blocked / "cache")


def test_prebuilt_library(library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QGRAPH_RUNTIME_LIBRARY", str(library))
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler needed
    assert build.library() == library
    monkeypatch.setenv("QGRAPH_RUNTIME_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(ResourceError, match="no such file"):
        build.library()
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    script = "from qgraph.runtime import _native; _native.library()"
    environment = {**os.environ, "QGRAPH_RUNTIME_LIBRARY": str(broken)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert "ResourceError: cannot load the runtime library" in done.stderr


def test_processes_may_race(library: Path, tmp_path: Path) -> None:
    """Builders that start together all succeed and leave one library, and the one for ONNX Runtime. A fake
    compiler keeps it quick."""
    compiler = tmp_path / "cxx"
    compiler.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nsleep 0.1\ncp "{library}" "$2"\n')
    compiler.chmod(0o755)
    folder = tmp_path / "cache"
    script = f"import pathlib, qgraph.runtime.build as b; print(b.build(pathlib.Path({str(folder)!r})))"
    environment = {**os.environ, "CXX": str(compiler)}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(4)
    ]
    paths = {process.communicate()[0].strip() for process in processes}
    assert all(process.returncode == 0 for process in processes)
    (runtime,) = map(Path, paths)
    assert set(folder.iterdir()) == {runtime, runtime.with_name(runtime.name.replace("-", "_ort-", 1))}
