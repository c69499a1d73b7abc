"""The C++ side by its own means: CMake, ctest, the installed package, the example without Python."""

from __future__ import annotations

import copy
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from artifact_builder import Parts, toy_decoder_reference, toy_inputs, toy_reference
from cmake_build import RUNTIME, cmake_build, run, tool

TESTS = ["test_units", "test_thread_pool", "header_is_c99", "test_session", "test_corruption", "test_state"]


@pytest.mark.parametrize("name", TESTS)
def test_ctest(cpp_tests: Path, name: str) -> None:
    output = run(tool("ctest"), "--test-dir", cpp_tests, "-R", f"^{name}$", "-V", "--no-tests=error")
    if name == "test_corruption":
        assert "changed bytes" in output
        assert "all refused" in output


def test_no_test_is_forgotten(cpp_tests: Path) -> None:
    listing = run(tool("ctest"), "--test-dir", cpp_tests, "-N")
    assert [line.split()[-1] for line in listing.splitlines() if "Test #" in line] == TESTS


def test_thread_pool_has_no_races(tmp_path: Path) -> None:
    program = tmp_path / "races"
    sources = [RUNTIME / "src" / "thread_pool.cc", RUNTIME / "tests" / "test_thread_pool.cc"]
    include = [f"-I{RUNTIME / 'include'}", f"-I{RUNTIME / 'src'}"]
    compiler = os.environ.get("CXX", "c++").split()
    command = [
        *compiler,
        "-std=c++17",
        "-O1",
        "-g",
        "-fsanitize=thread",
        "-pthread",
        *include,
        *sources,
        "-o",
        program,
    ]
    built = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if built.returncode != 0 and "error:" not in built.stderr.replace("collect2: error:", ""):
        pytest.skip("the compiler has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runtime, built with its example and installed."""
    folder, prefix = tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("prefix")
    cmake_build(RUNTIME, folder, f"-DCMAKE_INSTALL_PREFIX={prefix}", "-DCMAKE_INSTALL_LIBDIR=lib")
    run(tool("cmake"), "--install", folder)
    return prefix


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Path:
    """The example, built as a project of its own against the installed package."""
    folder = tmp_path_factory.mktemp("example")
    cmake_build(RUNTIME / "examples", folder, f"-DCMAKE_PREFIX_PATH={prefix}")
    return folder / "qgraph_run"


def test_installed_tree(prefix: Path) -> None:
    names = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if not path.is_dir()}
    assert {
        "include/qgraph/qgraph.h",
        "include/qgraph/qgraph.hpp",
        "lib/libqgraph.a",
        "lib/libqgraph.so",
        "lib/pkgconfig/qgraph.pc",
        "lib/cmake/qgraph/qgraph-config.cmake",
        "lib/cmake/qgraph/qgraph-config-version.cmake",
    } <= names


def test_static_library_links_from_c(prefix: Path, tmp_path: Path) -> None:
    source, program = RUNTIME / "tests" / "header_is_c99.c", tmp_path / "program"
    options = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", f"-I{prefix / 'include'}"]
    libraries = [prefix / "lib" / "libqgraph.a", "-lstdc++", "-lm", "-pthread"]
    run(os.environ.get("CC", "cc"), *options, source, *libraries, "-o", program)
    run(program)


def test_example_agrees_with_numpy(example: Path, toy_path: Path, toy_parts: Parts, tmp_path: Path) -> None:
    """Run in an empty environment and folder: no Python, no other file of qgraph's."""
    inputs = toy_inputs(3, 5)
    arguments = []
    for name, array in inputs.items():
        (tmp_path / f"{name}.in").write_bytes(array.tobytes())
        arguments.append(f"{name}={name}.in:3x5")
    expected = toy_reference(toy_parts, **inputs, isa_id=2)
    for threads in ("1", "2"):
        options = ["--threads", threads, "--isa", "base"]
        output = run(example, toy_path, *arguments, *options, cwd=tmp_path, env={})
        for name, array in expected.items():
            data = (tmp_path / f"{name}.bin").read_bytes()
            np.testing.assert_array_equal(np.frombuffer(data, array.dtype).reshape(array.shape), array)
            shape = ", ".join(map(str, array.shape))
            assert f"{name} [{shape}] {checksum(data):016x} ->" in output
            (tmp_path / f"{name}.bin").unlink()


def checksum(data: bytes) -> int:
    """64-bit FNV-1a."""
    result = 0xCBF29CE484222325
    for byte in data:
        result = (result ^ byte) * 0x100000001B3 % 2**64
    return result


@pytest.fixture
def generating(example: Path, decoder_parts: Parts, tmp_path: Path) -> tuple[Path, Path]:
    """The program, and the toy decoder as it expects one: logits alone, positions among the inputs."""
    parts = copy.deepcopy(decoder_parts)
    plan = parts.plan
    plan["outputs"].pop()
    plan["values"].pop()
    plan["steps"] = [step for step in plan["steps"] if step["name"] not in ("recall", "refuse")]
    plan["inputs"].append({"name": "position_ids", "value": len(plan["values"])})
    plan["values"].append({"kind": "input", "dtype": "i64", "shape": ["batch", "sequence"]})
    path = tmp_path / "decoder.qg"
    path.write_bytes(parts.to_bytes())
    return example.with_name("qgraph_generate"), path


def test_generate_example_is_greedy(generating: tuple[Path, Path], decoder_parts: Parts) -> None:
    program, path = generating
    text = [3, 1, 14]
    expected: list[int] = []
    for _ in range(20):
        ids = np.array([text + expected])
        expected.append(int(toy_decoder_reference(decoder_parts, ids)["logits"][0, -1].argmax()))
    assert len(set(expected)) > 2
    output = run(program, "--capacity", "23", path, "20", *map(str, text), env={})
    assert [int(token) for token in output.split()] == expected
    eos = expected[4]
    output = run(
        program, "--eos", str(eos), "--capacity", "30", "--threads", "1", path, "20", *map(str, text)
    )
    assert [int(token) for token in output.split()] == expected[: expected.index(eos) + 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: qgraph_generate"),
        (["--eos", "x", "PATH", "1", "1"], "x: not a number"),
        (["--top-k", "1", "PATH", "1", "1"], "--top-k: an option that this program does not know"),
        (["nothing.qg", "1", "1"], "not found: nothing.qg: cannot open"),
        (["PATH", "14", "1", "2", "3"], "exceed the room for tokens: give a larger --capacity"),
        (["PATH", "1", "99"], "bad data: step 'embed': an index is out of range"),
        (["TOY", "1", "1"], "has no state: compile a decoder that was exported with its cache"),
    ],
)
def test_generate_example_errors(
    generating: tuple[Path, Path], toy_path: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    program, path = generating
    names = {"PATH": str(path), "TOY": str(toy_path)}
    command = [str(program), *(names.get(a, a) for a in arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_example_describes_a_model(example: Path, toy_path: Path) -> None:
    output = run(example, toy_path)
    assert "input ids: i64 [batch, sequence]" in output
    assert "output twice: f32 [(2 * batch), sequence]" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.qg"], "nothing.qg: cannot open"),
        ([], "usage:"),
        (["TOY", "ids=ids.in:3x5"], "input 'mask' is not given"),
        (["TOY", "ids=ids.in:3xy"], "is not a shape"),
        (["TOY", "ids=ids.in"], "is not file:shape"),
        (["TOY", "ids=ids.in:3x6", "mask=ids.in:3x6"], "ids.in has 120 bytes, its shape needs 144"),
        (["TOY", "ids=ids.in:3x5", "mask=none:3x5"], "cannot read none"),
        (["TOY", "ids=ids.in:3x5", "mask=ids.in:3x10", "x=ids.in:1"], "'mask' axis|no input 'x'"),
    ],
)
def test_example_errors(
    example: Path, toy_path: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "ids.in").write_bytes(bytes(120))
    command = [str(example), *(str(toy_path) if a == "TOY" else a for a in arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert any(part in done.stderr for part in message.split("|")), done.stderr
    assert len(done.stderr.splitlines()) == 1
