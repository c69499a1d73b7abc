"""The kernel library: KernelSpec -> TIR function for an ISA level.

One module a family of operations. A module registers builders by name of the operation:

    @kernel("layer_norm")
    def layer_norm(spec: KernelSpec, isa: Isa, symbol: str) -> PrimFunc: ...

Its docstring lists the spec's parameters, the arguments in order, and what one block is. Modules import TVM
inside `load_builders()` only, so that planning needs no TVM.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, TypeVar

from qgraph.codegen import tiles as forms
from qgraph.codegen.isa import Isa
from qgraph.codegen.spec import KernelSpec

T = TypeVar("T")
Builder = Callable[[KernelSpec, Isa, str], Any]
BUILDERS: dict[str, Builder] = {}
TILED: dict[str, Builder] = {}  # forms for tiles; they call the kernel of their spec where tiles do not pay

_MODULES = (
    "attention",
    "attention_decode",
    "block_sums",
    "dynamic_quantize",
    "elementwise",
    "gather",
    "gather_columns",
    "matmul",
    "matmul_bf16",
    "matmul_dynamic",
    "matmul_group",
    "matmul_int8",
    "matmul_tiles",
    "norm",
    "quantize_int8",
    "reduce",
    "split_bf16",
    "split_digits",
    "support",
    "support_arm",
    "support_rounding",
)


def register(op: str, table: dict[str, T]) -> Callable[[T], T]:
    """Enter the builder of operation `op` into a table."""

    def enter(builder: T) -> T:
        if op in table:
            raise ValueError(f"kernel '{op}' is registered twice")
        table[op] = builder
        return builder

    return enter


def kernel(op: str, table: dict[str, Builder] = BUILDERS) -> Callable[[Builder], Builder]:
    """Register the builder of operation `op`; with `TILED`, of its form for tiles."""
    return register(op, table)


def import_builders(package: str, modules: Iterable[str]) -> None:
    """Import TVM, then the modules of a package that register builders."""
    from qgraph.codegen.tvm_backend import load_tvm

    load_tvm()
    for module in modules:
        importlib.import_module(f"{package}.{module}")


@cache
def load_builders() -> dict[str, Builder]:
    """Import TVM and every kernel module; return the table of builders."""
    import_builders(__name__, _MODULES)
    return BUILDERS


def build_kernel(spec: KernelSpec, isa: Isa) -> Any:
    """The TIR function of `spec` for `isa`, its symbol `tiles.symbol(spec, isa)`."""
    builders = load_builders()
    return (TILED if forms.has_tiles(spec, isa) else builders)[spec.op](spec, isa, forms.symbol(spec, isa))
