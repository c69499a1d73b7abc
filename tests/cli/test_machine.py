"""What a machine may be set to: the cache folder and the C++ compiler."""

from __future__ import annotations

from pathlib import Path

import pytest

from qgraph import cache
from qgraph.errors import ResourceError
from qgraph.runtime import build


@pytest.mark.parametrize("own", [None, "", "/own"])
@pytest.mark.parametrize("xdg", [None, "", "/xdg"])
def test_one_cache_folder(own: str | None, xdg: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime, which may import nothing of ours, has a copy of the rule. Empty is unset."""
    for name, value in (("QGRAPH_CACHE_DIR", own), ("XDG_CACHE_HOME", xdg)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", "/home/me")
    expected = own or f"{xdg or '/home/me/.cache'}/qgraph"
    assert cache.cache_dir() == build.cache_dir() == Path(expected)


def test_a_compiler_that_is_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ \"'")
    with pytest.raises(ResourceError, match=r"\$CXX, .* is not a command: no closing quotation"):
        build.find_compiler()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("exit 3", "ends with status 3 without a message"),
        ("exit 0", "succeeds but writes no file"),
        ("echo hm >&2; echo 'x.cc: error: no' >&2; exit 1", "ends with status 1: x.cc: error: no"),
    ],
)
def test_a_compiler_that_fails(
    script: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(ResourceError, match=f"the runtime does not build: .*{words}"):
        build.build(tmp_path / "cache")
