"""Where calibration keeps what is on disk only while it runs, and how many threads it uses."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qgraph.cache import cache_dir
from qgraph.calibration.border import disk_errors


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder below the cache (/tmp is memory on many machines), removed at the end.

    Folders of processes that were killed before their end are removed too. Raises ResourceError when none can
    be made.
    """
    root = cache_dir() / "calibration"
    with contextlib.ExitStack() as stack:
        with disk_errors(root):
            root.mkdir(parents=True, exist_ok=True)
            # One process at a time: none takes a folder that is being made for one that was left.
            gate = stack.enter_context((root / _GATE).open("a"))
            fcntl.flock(gate, fcntl.LOCK_EX)
            for left in root.glob(f"{_PREFIX}*"):
                if _is_free(left):
                    shutil.rmtree(left, ignore_errors=True)
            name = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=root, ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(name))
            fcntl.flock(stack.enter_context((folder / _LOCK).open("w")), fcntl.LOCK_EX)
            gate.close()
        yield folder


_PREFIX, _LOCK, _GATE = "scratch-", "lock", ".gate"


def _is_free(folder: Path) -> bool:
    """Whether the process that made the folder is gone."""
    try:
        with (folder / _LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:
        return False
