"""The C++ side by its own means: CMake and ctest, with every sanitizer that the compiler has."""

from __future__ import annotations

from pathlib import Path

import pytest
from cmake_build import RACES, run, tool

TESTS = [
    "test_units",
    "test_thread_pool",
    "header_is_c99",
    "test_session",
    "test_corruption",
    "test_state",
    "test_hooks",
    "test_signature",
    "test_static",
]


def ctest(folder: Path, name: str) -> str:
    return run(tool("ctest"), "--test-dir", folder, "-R", f"^{name}$", "-V", "--no-tests=error")


@pytest.mark.parametrize("name", TESTS)
def test_ctest(cpp_tests: Path, name: str) -> None:
    output = ctest(cpp_tests, name)
    if name == "test_corruption":
        assert "changed bytes" in output
        assert "all refused" in output


def test_no_test_is_forgotten(cpp_tests: Path) -> None:
    listing = run(tool("ctest"), "--test-dir", cpp_tests, "-N")
    assert [line.split()[-1] for line in listing.splitlines() if "Test #" in line] == TESTS


@pytest.mark.parametrize("name", RACES)
def test_there_are_no_races(race_tests: Path, name: str) -> None:
    ctest(race_tests, name)


def test_sessions_of_one_model_have_no_races(race_tests: Path, toy_path: Path) -> None:
    program = race_tests / "examples" / "qgraph_threads"
    assert "16 threads, 200 runs each: 0 differ" in run(program, toy_path, "16", "200")
