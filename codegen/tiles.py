"""Which kernels have a form of their own for tiles (AMX). Knows nothing of TVM."""

from __future__ import annotations

from qgraph.codegen.int8_input import int8_input
from qgraph.codegen.isa import Isa
from qgraph.codegen.spec import KernelSpec
from qgraph.formats import FORMATS

_DIGITS = {FORMATS[name].kernel: name for name in FORMATS if int8_input(name)}
_INT8 = {f"{kernel}_a8": name for kernel, name in _DIGITS.items()}


def has_tiles(spec: KernelSpec, isa: Isa) -> bool:
    """Whether the kernel of `spec` is not that of the variant that `isa` extends."""
    if not isa.base:
        return False
    if spec.op in _DIGITS:
        return spec.op != "matmul_nvfp4" and dict(spec.params).get("packing") != "base3"
    return spec.op in _INT8 and spec.op != "matmul_nvfp4_a8"


def symbol(spec: KernelSpec, isa: Isa) -> str:
    """Of the kernel of `spec` for `isa`: variants of one image have different ones."""
    return f"{spec.symbol}_tiles" if has_tiles(spec, isa) else spec.symbol
