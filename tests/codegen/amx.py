"""Kernels for tiles (AMX) on any CPU that has what they need besides: natively, or by an emulator of the
instructions (amx_emulator.cc), which is installed on import where the CPU has none.

    pytestmark = amx.required
    compile_kernel(spec, amx.ISA)(...)
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
from kernel_harness import cpu_features

from qgraph.codegen.isa import ISAS

ISA = ISAS["x86-64-v4-amx"]
BASE = ISAS[ISA.base]
NATIVE = cpu_features().issuperset(ISA.features)
_SOURCE = Path(__file__).with_name("amx_emulator.cc")
_ARCH_REQ_XCOMP_PERM, _XTILEDATA, _ARCH_PRCTL = 0x1023, 18, 158


def _missing() -> str:
    if not cpu_features().issuperset(BASE.features):
        return "needs a CPU with AVX-512, VBMI and VNNI"
    return "" if NATIVE or shutil.which("g++") else "needs AMX, or g++ to emulate it"


required = pytest.mark.skipif(bool(_missing()), reason=_missing())


@cache
def emulator() -> ctypes.CDLL:
    """The library, compiled; `amx_install` is not called yet."""
    digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"qgraph-amx-{digest}.so"
    if not library.exists():
        made = library.with_suffix(f".{id(library)}")
        flags = ["-std=c++17", "-O2", "-mfma", "-fno-fast-math", "-Wall", "-Wextra", "-shared", "-fPIC"]
        subprocess.run(["g++", *flags, str(_SOURCE), "-o", str(made)], check=True)
        made.rename(library)
    found = ctypes.CDLL(str(library))
    found.amx_steps.restype = ctypes.c_int64
    return found


def steps() -> int:
    """How many instructions were emulated; of a CPU with AMX 1 more at every call."""
    if NATIVE:
        steps.calls += 1  # type: ignore[attr-defined]
        return int(steps.calls)  # type: ignore[attr-defined]
    return int(emulator().amx_steps())


steps.calls = 0  # type: ignore[attr-defined]


def install() -> None:
    """Makes tiles usable in this process; again after something that takes over SIGILL, as libraries do."""
    if not NATIVE:
        emulator().amx_install()
    elif ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) != 0:
        raise OSError("Linux does not let this process use tiles")


if not _missing():
    install()
