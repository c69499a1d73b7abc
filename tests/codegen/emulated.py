"""Kernels of aarch64 on any machine, by qemu."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
from kernel_harness import link_kernel

from qgraph.codegen.isa import ISAS
from qgraph.codegen.spec import KernelSpec

# Reads the code and one file an array, calls the kernel, writes the first array back. Pointers and int64 are
# passed alike, and a function does not mind arguments that it does not have.
_DRIVER = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
static void* whole(const char* path, size_t* size) {
  FILE* f = fopen(path, "rb");
  fseek(f, 0, SEEK_END);
  *size = ftell(f);
  rewind(f);
  void* data = mmap(0, *size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (fread(data, 1, *size, f) != *size) abort();
  fclose(f);
  return data;
}
typedef void (*Kernel)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                       int64_t, int64_t, int64_t);
int main(int argc, char** argv) {  // entry, then the arguments: files, or =integers
  size_t size, result = 0;
  int64_t a[12] = {0};
  char* code = whole("code", &size);
  mprotect(code, size, PROT_READ | PROT_EXEC);
  for (int i = 2; i < argc; ++i) {
    if (argv[i][0] == '=') {
      a[i - 2] = atoll(argv[i] + 1);
    } else {
      a[i - 2] = (int64_t)whole(argv[i], &size);
      if (i == 2) result = size;
    }
  }
  ((Kernel)(code + atoll(argv[1])))(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]);
  FILE* f = fopen("result", "wb");
  fwrite((void*)a[0], 1, result, f);
  return fclose(f);
}
"""

MISSING = (
    "needs qemu-aarch64 and aarch64-linux-gnu-gcc (Debian: qemu-user, gcc-aarch64-linux-gnu)"
    if shutil.which("qemu-aarch64") is None or shutil.which("aarch64-linux-gnu-gcc") is None
    else ""
)


def run_on_aarch64(spec: KernelSpec, args: list[np.ndarray | int], blocks: int, folder: Path) -> np.ndarray:
    """Run the kernel over blocks [0, blocks); returns its first array. `folder` keeps the driver."""
    image = link_kernel(spec, ISAS["aarch64"])
    if not (folder / "driver").exists():
        (folder / "driver.c").write_text(_DRIVER)
        compiler = ["aarch64-linux-gnu-gcc", "-O1", "-static", "driver.c", "-o", "driver"]
        subprocess.run(compiler, cwd=folder, check=True)
    (folder / "code").write_bytes(image.code)
    passed = [str(image.entries[spec.symbol])]
    for i, arg in enumerate([*args, 0, blocks]):
        if isinstance(arg, np.ndarray):
            arg.tofile(folder / f"array{i}")
        passed.append(f"array{i}" if isinstance(arg, np.ndarray) else f"={arg}")
    subprocess.run(["qemu-aarch64", "./driver", *passed], cwd=folder, check=True)
    first = args[0]
    assert isinstance(first, np.ndarray)
    return np.fromfile(folder / "result", first.dtype).reshape(first.shape)
