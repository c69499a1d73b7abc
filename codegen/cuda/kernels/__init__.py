"""The kernel library for CUDA: KernelSpec -> TIR device function.

The operations, their specs and arguments are those of `qgraph.codegen.kernels`, whose docstrings say what
they compute; a docstring here says what one block of threads does, where that is not the block of the CPU's
kernel. A kernel takes no range of blocks: it is launched once, with a block of threads for each of the step's
`blocks`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from qgraph.codegen.kernels import import_builders, register
from qgraph.codegen.spec import KernelSpec


@dataclass(frozen=True)
class CudaKernel:
    """A device function (TIR), the threads of a block and its bytes of dynamic shared memory."""

    function: Any
    threads: int
    shared: int = 0


Builder = Callable[[KernelSpec, str], CudaKernel]
BUILDERS: dict[str, Builder] = {}

_MODULES = (
    "attention",
    "attention_decode",
    "elementwise",
    "gather",
    "matmul",
    "matmul_dynamic",
    "norm",
    "quantize",
    "reduce",
    "rotary",
)


def kernel(op: str) -> Callable[[Builder], Builder]:
    """Register the builder of operation `op`."""
    return register(op, BUILDERS)


@cache
def load_builders() -> dict[str, Builder]:
    """Import TVM and every kernel module; return the table of builders."""
    import_builders(__name__, _MODULES)
    return BUILDERS


def build_kernel(spec: KernelSpec) -> CudaKernel:
    """The device function of `spec`, its symbol `spec.symbol`."""
    return load_builders()[spec.op](spec, spec.symbol)
