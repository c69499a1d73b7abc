"""C compiled when a benchmark needs it, for the machine it runs on."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from qgraph.errors import ResourceError


@cache
def compile_c(source: str, *flags: str) -> ctypes.CDLL:
    """The library that the compiler (CC, else cc) makes of `source`.

    Raises ResourceError where there is none, or it refuses.
    """
    command = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(command[0]) is None:
        raise ResourceError(f"this benchmark needs a C compiler, and there is no {command[0]}: set CC")
    with tempfile.TemporaryDirectory() as folder:
        path, library = Path(folder) / "source.c", Path(folder) / "compiled.so"
        path.write_text(source, encoding="utf-8")
        line = [*command, "-shared", "-fPIC", str(path), "-o", str(library), *flags]
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            reason = next((line for line in said if "error" in line), "without a message")
            raise ResourceError(f"{command[0]} does not compile it: {reason}")
        return ctypes.CDLL(str(library))
