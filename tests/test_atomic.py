"""Files appear whole or not at all, and what goes wrong is said in one line."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from qgraph.atomic import atomic_directory, atomic_write, write_in_large_pages
from qgraph.errors import ResourceError


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_writes(tmp_path: Path):
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a.txt").exists()
    assert (tmp_path / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


def test_replaces(tmp_path: Path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with atomic_write(str(target)) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"


@pytest.mark.parametrize(
    "error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")]
)
def test_a_failure_leaves_everything_as_it_was(tmp_path: Path, error: BaseException):
    target = tmp_path / "a.txt"
    target.write_text("old")
    expected = ResourceError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_full_disk(small_disk: Path):
    target = small_disk / "a.bin"
    target.write_bytes(b"old")
    with (
        pytest.raises(ResourceError, match=r"cannot write .*a\.bin: the disk is full$"),
        atomic_write(target) as temporary,
    ):
        temporary.write_bytes(bytes(1 << 20))
    assert target.read_bytes() == b"old"
    assert names(small_disk) == ["a.bin"]


def test_full_disk_as_numpy_reports_it(small_disk: Path):
    """`tofile`, by which onnx-ir writes external data, raises an OSError without an errno."""
    with (
        pytest.raises(ResourceError, match=r"cannot write .*a\.bin: the disk is full$"),
        atomic_write(small_disk / "a.bin") as temporary,
        temporary.open("wb") as file,
    ):
        np.zeros(1 << 20, np.uint8).tofile(file)
    assert names(small_disk) == []


def test_full_disk_at_the_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Network file systems report a full disk only at fsync."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="the disk is full"), atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EACCES, "permission denied"),
        (errno.EROFS, "read-only"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "error"),
    ],
)
def test_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str):
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ResourceError, match=f"cannot write .*a: .*{words}"), atomic_write(tmp_path / "a"):
        pytest.fail("the block must not run")


def test_paths_that_cannot_be(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    cases = {
        tmp_path / "missing" / "a": "the directory does not exist",
        tmp_path / "file" / "a": "a part of the path is not a directory",
        tmp_path / "folder": "it is a directory",
    }
    for path, words in cases.items():
        with pytest.raises(ResourceError, match=words), atomic_write(path):
            pytest.fail("the block must not run")
    assert names(tmp_path) == ["file", "folder"]


def test_a_name_too_long_for_the_file_system(tmp_path: Path):
    with pytest.raises(ResourceError, match="too long"), atomic_write(tmp_path / ("a" * 300)) as temporary:
        temporary.write_text("x")
    assert names(tmp_path) == []


def test_a_long_name_that_fits(tmp_path: Path):
    with atomic_write(tmp_path / ("a" * 255)) as temporary:
        temporary.write_text("x")
    assert names(tmp_path) == ["a" * 255]


def test_an_error_about_another_file_names_it(tmp_path: Path):
    with pytest.raises(ResourceError, match="elsewhere"), atomic_write(tmp_path / "a"):
        (tmp_path.parent / "elsewhere" / "b").read_bytes()


def test_a_link_is_followed(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "b").write_text("old")
    (tmp_path / "a").symlink_to(tmp_path / "real" / "b")
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a").is_symlink() and (tmp_path / "real" / "b").read_text() == "new"


def test_a_block_that_writes_nothing_is_a_defect(tmp_path: Path):
    with pytest.raises(RuntimeError, match="did not"), atomic_write(tmp_path / "a"):
        pass
    assert names(tmp_path) == []


def test_companions_move_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    moved = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: (moved.append(b.name), replace(a, b)))
    with atomic_directory(tmp_path / "b") as directory:
        for name in ("a", "b", "c"):
            (directory / name).write_text(name)
    assert moved == ["a", "c", "b"]
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "a", "b": "b", "c": "c"}


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_failing_move_undoes_those_before(
    links: bool, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The last of three moves fails: an old companion is back, and a new one is gone."""
    (tmp_path / "a").write_text("old a")
    (tmp_path / "z").write_text("old z")
    replace = Path.replace

    def fail_at_z(source: Path, target: Path) -> Path:
        if target.name == "z" and (tmp_path / "b").exists():
            raise error
        return replace(source, target)

    def no_links(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "replace", fail_at_z)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    expected = ResourceError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), atomic_directory(tmp_path / "z") as directory:
        for name in ("a", "b", "z"):
            (directory / name).write_text("new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old a", "z": "old z"}


def test_a_companion_that_cannot_be_replaced(tmp_path: Path):
    """All are looked at before the first moves."""
    (tmp_path / "b").mkdir()
    with (
        pytest.raises(ResourceError, match=r"cannot write .*/b: it is a directory$"),
        atomic_directory(tmp_path / "z") as directory,
    ):
        for name in ("a", "b", "z"):
            (directory / name).write_text("new")
    assert names(tmp_path) == ["b"]


def test_a_device_is_not_replaced(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ResourceError, match="it is not a regular file"), atomic_write(tmp_path / "pipe"):
        pytest.fail("the block must not run")


def test_writers_at_the_same_time(tmp_path: Path):
    """The last rename wins; no reader ever sees a mixture."""

    def write(text: str) -> None:
        for _ in range(20):
            with atomic_write(tmp_path / "a") as temporary:
                temporary.write_text(text * 1000)

    threads = [threading.Thread(target=write, args=(c,)) for c in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_text() in {c * 1000 for c in "xyz"}
    assert names(tmp_path) == ["a"]


def test_whole_large_pages_are_written_at_once():
    page = 2 << 20
    data = np.random.default_rng(0).integers(0, 256, 5 * page + 77, np.uint8).tobytes()
    ends = [0, 64, 64, 100_000, 3 * page, 4 * page, 4 * page + 5, len(data)]
    written: list[bytes] = []

    class Recorder(io.BytesIO):
        def write(self, piece: bytes) -> int:  # type: ignore[override]
            written.append(bytes(piece))
            return super().write(piece)

    file = Recorder()
    write_in_large_pages(file, (memoryview(data)[a:b] for a, b in pairwise(ends)))
    assert file.getvalue() == data
    assert [len(piece) for piece in written] == [page] * 5 + [77]
