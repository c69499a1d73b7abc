"""memset and memcpy for kernels: LLVM may turn a loop of stores into a call to either."""

from __future__ import annotations

from functools import cache

from tvm.script import tirx as T

from qgraph.codegen.isa import Isa
from qgraph.codegen.tvm_backend import compile_object

# Keeps LLVM from recognising these very loops as memset and memcpy, which would call themselves.
_BARRIER = """
define void @qg_barrier() alwaysinline {
  call void asm sideeffect "", "~{memory}"()
  ret void
}
"""


@T.prim_func(s_tir=True)
def _memset(dst: T.handle("uint8"), value: T.int32, size: T.int64):
    T.func_attr({"global_symbol": "memset", "tirx.noalias": True})
    D = T.decl_buffer((size,), "uint8", data=dst)
    with T.attr(0, "pragma_import_llvm", _BARRIER):
        for i in T.serial(size // 32):
            D[T.ramp(i * 32, 1, 32)] = T.broadcast(T.cast(value, "uint8"), 32)
            T.evaluate(T.call_extern("void", "qg_barrier"))
        for i in T.serial(size % 32):
            D[size // 32 * 32 + i] = T.cast(value, "uint8")
            T.evaluate(T.call_extern("void", "qg_barrier"))


@T.prim_func(s_tir=True)
def _memcpy(dst: T.handle("uint8"), src: T.handle("uint8"), size: T.int64):
    T.func_attr({"global_symbol": "memcpy", "tirx.noalias": True})
    D = T.decl_buffer((size,), "uint8", data=dst)
    S = T.decl_buffer((size,), "uint8", data=src)
    with T.attr(0, "pragma_import_llvm", _BARRIER):
        for i in T.serial(size // 32):
            D[T.ramp(i * 32, 1, 32)] = S[T.ramp(i * 32, 1, 32)]
            T.evaluate(T.call_extern("void", "qg_barrier"))
        for i in T.serial(size % 32):
            D[size // 32 * 32 + i] = S[size // 32 * 32 + i]
            T.evaluate(T.call_extern("void", "qg_barrier"))


@cache
def support_object(isa: Isa) -> bytes:
    """The support routines of `isa` as an object. They return nothing: compilers ignore what the calls they
    insert return."""
    return compile_object({"memset": _memset, "memcpy": _memcpy}, isa)
