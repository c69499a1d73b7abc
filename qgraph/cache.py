"""Where qgraph keeps what it can make again: compiled kernels, journals of calibrations, the runtime
library."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """`$QGRAPH_CACHE_DIR`, else `$XDG_CACHE_HOME/qgraph`, else `~/.cache/qgraph`; an empty variable is an
    unset one. Not created here. The same rule as in runtime/build.py."""
    if folder := os.environ.get("QGRAPH_CACHE_DIR"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qgraph"


def read(name: str) -> bytes | None:
    """The cached bytes under `name` (a relative path), or None. An unreadable cache is an empty one."""
    try:
        return (cache_dir() / name).read_bytes()
    except OSError:
        return None


def store(name: str, data: bytes) -> None:
    """Keep `data` under `name`: readers see the whole entry or none. A cache that cannot be written is no
    error."""
    path = cache_dir() / name
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
        temporary.replace(path)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
