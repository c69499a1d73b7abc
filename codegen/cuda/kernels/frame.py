"""The frame of a device function written with the IR builder, and what its threads do together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tvm import tirx
from tvm.ir import PointerType, PrimType
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.kernels.function import UNBOUNDED
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.vmath import Expr, element_of

_MOST_BLOCKS = (1 << 31) - 1
_WARPS = 32  # of a block, at most


@dataclass
class Frame:
    """A kernel being built: flat buffers and int64 scalars by name, and which block and thread this is.

    Attributes:
        block: int64, 0 .. blocks - 1.
        thread: int32, 0 .. threads - 1.
    """

    threads: int
    buffers: dict[str, Any] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)
    block: Any = None
    thread: Any = None
    result: Any = None  # the PrimFunc, once the frame is closed
    _scratch: dict[str, Any] = field(default_factory=dict)

    def reduce(self, op: str, value: Expr) -> Expr:
        """`value` of all threads of the block in one: op is sum, prod, max or min. All threads must come
        here."""
        element = element_of(value)
        if element not in self._scratch:
            self._scratch[element] = B.alloc_buffer((_WARPS,), element, scope="shared")
        return call(element, f"qg_block_{op}", value, address(self._scratch[element], 0))


def call(dtype: str, name: str, *args: Expr) -> Expr:
    """The value of a device function of prelude.cuh, computed here and once."""
    return B.bind(T.call_extern(dtype, name, *args))


def do(name: str, *args: Expr) -> None:
    """Call a device function of prelude.cuh."""
    B.evaluate(T.call_extern("void", name, *args))


def address(buffer: Any, at: Expr | int) -> Expr:
    """Pointer to element `at` of a flat buffer."""
    return T.address_of(buffer[at])


def copy4(to: Any, to_at: Expr | int, source: Any, at: Expr) -> None:
    """Four elements of a flat buffer at once; both places are aligned to them. (TVM makes one load of a
    vector only where it can prove that it is aligned.)"""
    do("qg_copy4", address(to, to_at), address(source, at))


def sync() -> None:
    """Wait for all threads of the block."""
    B.evaluate(T.tvm_storage_sync("shared"))


def sync_warp() -> None:
    """Wait for all threads of the warp. (TVM's own storage sync of a warp emits nothing for CUDA.)"""
    do("__syncwarp")


@contextmanager
def device_function(
    symbol: str, pointers: Sequence[tuple[str, str]], scalars: Sequence[str], threads: int
) -> Iterator[Frame]:
    """Build `__global__ void symbol(pointers.., int64 scalars..)`; the body is what the block emits.

    `pointers` are (name, element type); they are restrict: no two of them overlap.
    """
    out = Frame(threads)
    with IRBuilder() as builder:
        with B.prim_func(s_tir=True):
            B.func_name(symbol)
            B.func_attr({"global_symbol": symbol, "tirx.noalias": True})
            data = [B.arg(n, tirx.Var(n, PointerType(PrimType(dtype)))) for n, dtype in pointers]
            for name in scalars:
                out.scalars[name] = B.arg(name, tirx.Var(name, "int64"))
            for (name, dtype), pointer in zip(pointers, data, strict=True):
                out.buffers[name] = B.decl_buffer((UNBOUNDED,), dtype, data=pointer)
            with (
                B.launch_thread("blockIdx.x", _MOST_BLOCKS) as block,
                B.launch_thread("threadIdx.x", threads) as thread,
            ):
                out.block, out.thread = B.bind(T.Cast("int64", block)), thread
                yield out
        out.result = builder.get()


def strided(frame: Frame, size: Expr, body: Callable[[Expr], None]) -> None:
    """body(i) for the i of [0, size) that are this thread's: every `threads`-th one."""
    thread = T.Cast("int64", frame.thread)
    rounds = T.truncdiv(size - thread + index(frame.threads - 1), index(frame.threads))
    with B.serial(T.max(rounds, index(0))) as i:
        body(B.bind(i * frame.threads + thread))
