"""The frame of a kernel written with the IR builder: its C signature and its buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tvm import tirx
from tvm.ir import PointerType, PrimType
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as B

UNBOUNDED = 1 << 48  # extent of a flat buffer: a kernel does not need it


@dataclass
class Function:
    """A kernel being built: flat buffers and int64 variables by name, `begin` and `end` among them."""

    buffers: dict[str, Any] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)
    result: Any = None  # the PrimFunc, once the frame is closed


@contextmanager
def function(symbol: str, pointers: Sequence[tuple[str, str]], scalars: Sequence[str]) -> Iterator[Function]:
    """Build `void symbol(pointers.., int64 scalars.., int64 begin, int64 end)`; the body is what the block
    emits.

    `pointers` are (name, element type); they are restrict: no two of them overlap.
    """
    out = Function()
    with IRBuilder() as builder:
        with B.prim_func(s_tir=True):
            B.func_name(symbol)
            B.func_attr({"global_symbol": symbol, "tirx.noalias": True})
            data = [B.arg(n, tirx.Var(n, PointerType(PrimType(dtype)))) for n, dtype in pointers]
            for name in (*scalars, "begin", "end"):
                out.scalars[name] = B.arg(name, tirx.Var(name, "int64"))
            for (name, dtype), pointer in zip(pointers, data, strict=True):
                out.buffers[name] = B.decl_buffer((UNBOUNDED,), dtype, data=pointer)
            yield out
        out.result = builder.get()
