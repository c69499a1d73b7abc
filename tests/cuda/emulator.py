"""CUDA kernels run on the CPU: their CUDA C++ compiled by g++ with emulation.h.

kernels = emulate([spec, ..])
kernels[spec.symbol](y, x, 17, blocks=6)
"""

from __future__ import annotations

import atexit
import ctypes
import math
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from qgraph.codegen.cuda.kernels import CudaKernel, build_kernel
from qgraph.codegen.cuda.text import cuda_text
from qgraph.codegen.spec import CUDA_ELEMENTWISE_BLOCK, KernelSpec

_HEADER = Path(__file__).parent / "emulation.h"
# Without strict aliasing, as CUDA compilers have it; nothing is contracted that is not written so.
FLAGS = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-w"]


@cache
def _header() -> Path:
    """The header, compiled once a process."""
    folder = Path(tempfile.mkdtemp(prefix="qgraph-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = Path(shutil.copy(_HEADER, folder))
    subprocess.run(["g++", *FLAGS, "-x", "c++-header", str(copy), "-o", f"{copy}.gch"], check=True)
    return copy


def emulated_module(text: str, symbols: Sequence[str], flags: Sequence[str] = ()) -> bytes:
    """CUDA C++ as a shared object that exports `<symbol>__launch` and `<symbol>__params` for each kernel."""
    with tempfile.TemporaryDirectory(prefix="qgraph-") as folder:
        source, out = Path(folder) / "kernels.cc", Path(folder) / "kernels.so"
        exports = "\n".join(f"QG_EMULATE({symbol})" for symbol in symbols)
        source.write_text(f'#include "{_header()}"\n{text}\n{exports}\n')
        done = subprocess.run(
            ["g++", *FLAGS, *flags, str(source), "-o", str(out)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[:4000]
        return out.read_bytes()


class Kernel:
    """A kernel of an emulated module. Arrays are passed as pointers, ints as int64."""

    def __init__(self, library: ctypes.CDLL, symbol: str, built: CudaKernel) -> None:
        self._launch = library[f"{symbol}__launch"]
        self._params = ctypes.c_int32.in_dll(library, f"{symbol}__params").value
        self.built = built

    def __call__(self, *args: np.ndarray | int, blocks: int) -> None:
        assert len(args) == self._params, f"{len(args)} arguments for {self._params} parameters"
        for i, a in enumerate(args):
            assert not isinstance(a, np.ndarray) or a.flags.c_contiguous, f"argument {i} is not contiguous"
        values = [ctypes.c_int64(a.ctypes.data if isinstance(a, np.ndarray) else int(a)) for a in args]
        params = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        self._launch(
            params,
            ctypes.c_uint32(blocks),
            ctypes.c_uint32(self.built.threads),
            ctypes.c_uint32(self.built.shared),
        )


class AsOnCpu:
    """A kernel that is called as those of the CPU's tests are: with the blocks of their grid, and how these
    are split or their buffers guarded, which mean nothing here."""

    def __init__(self, spec: KernelSpec) -> None:
        self._spec, self._kernel = spec, emulate([spec])[spec.symbol]

    def __call__(
        self, *args: np.ndarray | int, blocks: int, split: object = None, guard: bool = False
    ) -> None:
        spec = self._spec
        if spec.op == "elementwise":
            first = 1 + len(spec["inputs"])
            dims = [int(d) for d in args[first : first + spec["rank"]]]  # type: ignore[arg-type]
            blocks = -(-math.prod(dims) // CUDA_ELEMENTWISE_BLOCK)
        if spec.op == "attention" and ("cache", "i8") in spec.params:
            args = (*args[:6], *args[7:])  # without scratch memory
        self._kernel(*args, blocks=blocks)


def emulate(specs: Sequence[KernelSpec]) -> dict[str, Kernel]:
    """The kernels of `specs` by symbol, compiled in one go."""
    built = {spec.symbol: build_kernel(spec) for spec in specs}
    module = emulated_module(
        cuda_text({symbol: kernel.function for symbol, kernel in built.items()}), list(built)
    )
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(module)
        file.flush()
        library = ctypes.CDLL(file.name)
    return {symbol: Kernel(library, symbol, kernel) for symbol, kernel in built.items()}
