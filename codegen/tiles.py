"""Which kernels have a form of their own for tiles (AMX). Knows nothing of TVM."""

from __future__ import annotations

from qgraph.codegen.int8_input import Int8Input, int8_input
from qgraph.codegen.isa import Isa
from qgraph.codegen.spec import KernelSpec
from qgraph.formats import FORMATS
from qgraph.formats.nvfp4 import NVFP4

_DIGITS = {FORMATS[name].kernel for name in FORMATS if int8_input(name)}
_OPS = _DIGITS | {f"{kernel}_a8" for kernel in _DIGITS}


def has_tiles(spec: KernelSpec, isa: Isa) -> bool:
    """Whether the kernel of `spec` is not that of the variant that `isa` extends."""
    if not isa.base:
        return False
    if spec.op in ("split_digits", "quantize_int8"):  # other weights take the same bytes in tiles
        return int8_input(NVFP4.name) == _input(spec)
    return spec.op in _OPS and dict(spec.params).get("packing") != "base3"


def _input(spec: KernelSpec) -> Int8Input:
    """What a kernel that writes bytes writes them for."""
    params = dict(spec.params)
    offset = params["offset"] if "offset" in params else -params["factor"]
    return Int8Input(params["fields"], params["block"], offset)


def symbol(spec: KernelSpec, isa: Isa) -> str:
    """Of the kernel of `spec` for `isa`: variants of one image have different ones."""
    return f"{spec.symbol}_tiles" if has_tiles(spec, isa) else spec.symbol
