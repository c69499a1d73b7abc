"""Files that a user names for reading."""

from __future__ import annotations

import os
from pathlib import Path

from qgraph.errors import InputError


def existing_file(path: str | os.PathLike[str]) -> Path:
    """`path`, if it is a regular file (links are followed). A pipe or a device may have no end.

    Raises InputError when it is missing or something else.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{os.fspath(path)}: {'not a regular file' if file.exists() else 'no such file'}")
    return file
