"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from qgraph.errors import ResourceError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this file system or a limit of this process allows",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOENT: "the directory does not exist: create it first",
    errno.ENOTDIR: "a part of the path is not a directory",
    errno.EISDIR: "it is a directory",
    errno.ENOTEMPTY: "it is a directory",
    errno.ENAMETOOLONG: "the name is too long",
}

_LARGE_PAGE = 2 << 20  # bytes of one on x86-64, and of most on ARM
_FULL = 1 << 16  # free bytes below which a write that stopped half-way is put down to the disk


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path; what the block writes there becomes `path` when the block ends well.

    The data reaches the disk before the rename, so that a crash leaves the old file or the new one. When the
    block raises, the temporary file is removed and an existing `path` is untouched. An OSError, from the
    block or from here, becomes a ResourceError that says in one line what could not be written and why. A
    link is followed: the file it leads to is replaced, not the link.
    """
    with atomic_directory(path) as directory:
        yield directory / Path(path).name


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`atomic_write` for a file with companions: yields an empty directory in which to write `path`'s name.

    Every file written there moves beside `path`, the one named like `path` last: it never refers to a
    companion that is not there yet. When one cannot move, those before it are undone.
    """
    target = Path(path)
    try:
        real = target.resolve()
    except RuntimeError as error:  # pathlib's, up to Python 3.12
        raise ResourceError(f"cannot write {target}: {os.strerror(errno.ELOOP).lower()}") from error
    temporary = real.parent / f".{real.name[:80]}.{secrets.token_hex(4)}.tmp"
    try:
        _require_replaceable(real, target)
        temporary.mkdir()
        yield temporary
        if not (temporary / target.name).exists():
            raise RuntimeError(f"the block that was to write {target} did not")
        written = sorted(temporary.iterdir(), key=lambda file: (file.name == target.name, file.name))
        finals = [real if file.name == target.name else real.parent / file.name for file in written]
        for file, final in zip(written, finals, strict=True):
            _flush(file)
            _require_replaceable(final, target.with_name(file.name))
        with contextlib.ExitStack() as undo:
            old = temporary / secrets.token_hex(8)
            old.mkdir()
            for file, final in zip(written, finals, strict=True):
                undo.callback(_restore, _keep(final, old / file.name), final)
                file.replace(final)
            _flush(real.parent)
            undo.pop_all()
    except OSError as error:
        raise ResourceError(f"cannot write {target}: {_reason(error, temporary)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_in_large_pages(file: IO[bytes], pieces: Iterable[bytes | memoryview]) -> None:
    """Writes pieces of a file, from its start, end to end.

    What a file system is given in whole large pages, aligned as they are, it may keep as such in its cache:
    who maps the file then has less to look up (runtime/src/mapped_file.cc).
    """
    page = bytearray()
    for piece in pieces:
        rest = memoryview(piece)
        while len(rest):
            taken = rest[: _LARGE_PAGE - len(page)]
            page += taken
            rest = rest[len(taken) :]
            if len(page) == _LARGE_PAGE:
                file.write(page)
                page.clear()
    file.write(page)


def _require_replaceable(path: Path, shown: Path) -> None:
    """ResourceError when a file, device or folder stands at `path` that a new file must not replace."""
    mode = path.lstat().st_mode if os.path.lexists(path) else stat.S_IFREG
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        what = _REASONS[errno.EISDIR] if stat.S_ISDIR(mode) else "it is not a regular file"
        raise ResourceError(f"cannot write {shown}: {what}")


def _keep(path: Path, copy: Path) -> Path | None:
    """A second name for the file at `path`, if there is one: from it the file can be restored."""
    if not os.path.lexists(path):
        return None
    try:
        os.link(path, copy, follow_symlinks=False)
    except OSError:  # a file system without links
        shutil.copy2(path, copy, follow_symlinks=False)
    return copy


def _restore(kept: Path | None, path: Path) -> None:
    with contextlib.suppress(OSError):  # what stopped the first file is what the user hears of
        path.unlink(missing_ok=True) if kept is None else kept.replace(path)


def _flush(path: Path) -> None:
    """Waits until the file's bytes, or the directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError, temporary: Path) -> str:
    # numpy reports a short write without an errno.
    if error.errno is None and temporary.exists() and shutil.disk_usage(temporary).free < _FULL:
        return _REASONS[errno.ENOSPC]
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    file = None if error.filename is None else Path(os.fsdecode(error.filename))
    ours = file is None or file == temporary or temporary in file.parents or file == temporary.parent
    return reason if ours else f"{reason} ({file})"
