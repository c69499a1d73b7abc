"""Kernels of other processors on any machine, by qemu: what takes an ISA level runs on each of them with

@emulated
def test(isa: Isa) -> None: ...
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qgraph.codegen.isa import ISAS, Isa
from qgraph.codegen.link import CodeImage
from qgraph.codegen.spec import KernelSpec

RUNTIME = Path(__file__).parents[2] / "runtime"

# Calls the kernel as the runtime does, on arrays that end flush with an inaccessible page, or begin with one.
_DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "address.h"
#include "float_environment.h"
#include "kernel_call.h"
constexpr size_t kPage = 4096;
struct Mapped { char* data; size_t size; };
Mapped whole(const char* path, bool guard) {
  FILE* f = fopen(path, "rb");
  fseek(f, 0, SEEK_END);
  size_t size = ftell(f), pages = (size + kPage - 1) / kPage * kPage;
  rewind(f);
  char* data = (char*)mmap(0, pages + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(data + pages, kPage, PROT_NONE);
  if (guard) data += pages - size;
  if (fread(data, 1, size, f) != size) abort();
  fclose(f);
  return {data, size};
}
int main(int argc, char** argv) {  // guard, entry, number of arguments, these (files or =integers), ranges
  const bool guard = atoi(argv[1]);
  const int count = atoi(argv[3]);
  char** given = argv + 4;
  Mapped code = whole("code", false), arrays[32];
  mprotect(code.data, code.size, PROT_READ | PROT_EXEC);
  __builtin___clear_cache(code.data, code.data + code.size);
  qg::DefaultFloatEnvironment environment;
  for (int i = 0; i < count; ++i) {
    if (given[i][0] != '=') arrays[i] = whole(given[i], guard);
  }
  for (int range = count; range < argc - 4; ++range) {
    qg::KernelArgs args;
    for (int i = 0; i < count; ++i) {
      if (given[i][0] == '=') args.integer(atoll(given[i] + 1));
      else args.pointer(qg::address_of(arrays[i].data));
    }
    args.integer(atoll(given[range]));
    args.integer(atoll(strchr(given[range], ':') + 1));
    args.call(code.data + atoll(argv[2]));
  }
  for (int i = 0; i < count; ++i) {
    if (given[i][0] == '=') continue;
    FILE* f = fopen(given[i], "wb");
    fwrite(arrays[i].data, 1, arrays[i].size, f);
    if (fclose(f) != 0) abort();
  }
}
"""


@dataclass(frozen=True)
class Machine:
    """A machine that qemu is, in a program: the target that is compiled for it, the command, and what Debian
    calls it in packages and compilers."""

    target: str
    qemu: str
    triple: str

    @property
    def compiler(self) -> str:
        return f"{self.triple}-g++"

    @property
    def missing(self) -> str:
        """Why its code cannot run here, empty if it can."""
        if shutil.which(self.qemu) and shutil.which(self.compiler):
            return ""
        return f"needs {self.qemu} and {self.compiler} (Debian: qemu-user, g++-{self.triple})"


# By ISA level.
MACHINES = {
    "aarch64": Machine("aarch64-linux", "qemu-aarch64", "aarch64-linux-gnu"),
    "armv7": Machine("armv7-linux", "qemu-arm", "arm-linux-gnueabihf"),
    "riscv64": Machine("riscv64-linux", "qemu-riscv64", "riscv64-linux-gnu"),
}


def _on(name: str, *values: object, id: str = "") -> Any:
    missing = MACHINES[name].missing
    skip = pytest.mark.skipif(bool(missing), reason=missing)
    return pytest.param(ISAS[name], *values, id="-".join(filter(None, (name, id))), marks=skip)


emulated = pytest.mark.parametrize("isa", [_on(name) for name in MACHINES])


def emulated_with(names: str, cases: Sequence[Any], few: Sequence[Any]) -> pytest.MarkDecorator:
    """`emulated`, for `names` in all `cases` on aarch64, in `few` of them on the others."""
    several = "," in names
    return pytest.mark.parametrize(
        f"isa,{names}",
        [
            _on(name, *(case if several else (case,)), id="-".join(case) if several else str(case))
            for name in MACHINES
            for case in (cases if name == "aarch64" else few)
        ],
    )


_folder: list[tempfile.TemporaryDirectory[str]] = []  # of the drivers, while the tests run


@cache
def _driver(name: str) -> Path:
    if not _folder:
        _folder.append(tempfile.TemporaryDirectory(prefix="qgraph-drivers-"))
    source, program = Path(_folder[0].name) / "driver.cc", Path(_folder[0].name) / name
    source.write_text(_DRIVER)
    compiler = [MACHINES[name].compiler, "-std=c++17", "-O1", "-static", f"-I{RUNTIME / 'src'}"]
    subprocess.run([*compiler, source, "-o", program], check=True)
    return program


class EmulatedKernel:
    """As `kernel_harness.Kernel`."""

    def __init__(self, spec: KernelSpec, isa: Isa, image: CodeImage) -> None:
        self.spec, self.isa, self.image = spec, isa, image

    def run(self, args: Sequence[np.ndarray | int], ranges: Sequence[tuple[int, int]], guard: bool) -> None:
        """Raises AssertionError where the kernel touches memory outside its buffers."""
        passed = [f"array{i}" if isinstance(arg, np.ndarray) else f"={arg}" for i, arg in enumerate(args)]
        command = [MACHINES[self.isa.name].qemu, str(_driver(self.isa.name)), str(int(guard))]
        command += [str(self.image.entries[self.spec.symbol]), str(len(args)), *passed]
        with tempfile.TemporaryDirectory(prefix="qgraph-emulated-") as name:
            folder = Path(name)
            (folder / "code").write_bytes(self.image.code)
            for arg, file in zip(args, passed, strict=True):
                if isinstance(arg, np.ndarray):
                    assert arg.flags.c_contiguous
                    arg.tofile(folder / file)
            done = subprocess.run([*command, *(f"{a}:{b}" for a, b in ranges)], cwd=folder)
            assert done.returncode == 0, f"{self.spec.op} on {self.isa.name}: {done.returncode}"
            for arg, file in zip(args, passed, strict=True):
                if isinstance(arg, np.ndarray) and arg.flags.writeable:
                    arg[...] = np.fromfile(folder / file, arg.dtype).reshape(arg.shape)
