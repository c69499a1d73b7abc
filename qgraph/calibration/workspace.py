"""Where calibration keeps what is on disk only while it runs, and how many threads it uses."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qgraph.cache import cache_dir
from qgraph.calibration.border import disk_errors


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder below the cache (/tmp is memory on many machines), removed at the end.

    Raises ResourceError when it cannot be made.
    """
    root = cache_dir() / "calibration"
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="scratch-", dir=root, ignore_cleanup_errors=True)
    with folder as path:
        yield Path(path)


def thread_count(threads: int | None) -> int:
    """`threads`, or one for every CPU that this process may use."""
    if threads:
        return threads
    if hasattr(os, "sched_getaffinity"):  # Linux: respects taskset and cpusets
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
