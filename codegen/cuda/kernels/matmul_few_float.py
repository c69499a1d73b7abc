"""Up to 8 rows by a float weight (layout `f32_n16`): bound by the memory that the weight lies in.

A block of threads does one n16 tile of outputs. A thread has four outputs of every 64th octet of inputs, 16
bytes side by side for each; all warps of the block share K, and their sums are added in shared memory, in a
fixed order. A row's result does not depend on how many rows there are."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.cuda.kernels import CudaKernel
from qgraph.codegen.cuda.kernels.epilogue import finished
from qgraph.codegen.cuda.kernels.frame import call, copy4, device_function, sync
from qgraph.codegen.cuda.kernels.weights import OCTET, open_weight
from qgraph.codegen.kernels.epilogue import epilogue_pointers
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.vmath import Expr, named
from qgraph.codegen.packing import LANES
from qgraph.codegen.spec import KernelSpec

_THREADS = 256
_OUTPUTS = 4  # of a thread
_QUADS = LANES // _OUTPUTS
_SAME_OUTPUTS = 31 & ~(_QUADS - 1)  # the bits in which lanes with the same outputs differ


def few_float_rows(spec: KernelSpec, symbol: str, rows: int) -> CudaKernel:
    """The kernel for up to `rows` rows. Blocks: ceil(n/16)."""
    K, N, epilogue = spec["k"], spec["n"], spec["epilogue"]
    packed = open_weight("f32", spec)
    names = [f"weight{i}" for i in range(len(packed.operands))]
    pointers = [("y", "float32"), ("x", "float32"), *zip(names, packed.operands, strict=True)]
    octets, warps = -(-K // OCTET), _THREADS // 32
    with device_function(symbol, [*pointers, *epilogue_pointers(epilogue)], ["M"], _THREADS) as f:
        w, x, M = [f.buffers[name] for name in names], f.buffers["x"], f.scalars["M"]
        tile = f.block
        lane = B.bind(T.Cast("int64", T.truncmod(f.thread, _QUADS) * _OUTPUTS))
        acc = B.alloc_buffer((rows * _OUTPUTS,), "float32", scope="local")
        for i in range(rows * _OUTPUTS):
            B.buffer_store(acc, T.float32(0), [i])

        def inputs(row: int, o: Expr) -> list[Expr]:
            """x[row, 8 o ..], beyond K zeros; rows beyond M repeat the last."""
            at = (T.min(index(row), M - 1) if rows > 1 else index(0)) * K + o * OCTET
            local = B.alloc_buffer((OCTET,), "float32", scope="local")
            if K % OCTET == 0:
                for half in (0, 4):
                    copy4(local, half, x, at + half)
            else:
                for i in range(OCTET):
                    B.buffer_store(local, T.float32(0), [i])
                    with B.If(o * OCTET + i < index(K)), B.Then():
                        B.buffer_store(local, x[at + i], [i])
            return [local[i] for i in range(OCTET)]

        def add(o: Expr) -> None:
            levels = packed.octet(w, tile, lane, o, _OUTPUTS)
            for row in range(rows):
                own = inputs(row, o)
                for c in range(_OUTPUTS):
                    part: Any = own[0] * levels[c][0]
                    for i in range(1, OCTET):
                        part = T.fma(own[i], levels[c][i], part)
                    at = row * _OUTPUTS + c
                    B.buffer_store(acc, acc[at] + named(part), [at])

        first = B.bind(T.Cast("int64", T.truncdiv(f.thread, _QUADS)))
        step = _THREADS // _QUADS
        with B.serial(index(-(-octets // step))) as i:
            o = B.bind(i * step + first)
            if octets % step:
                with B.If(o < index(octets)), B.Then():
                    add(o)
            else:
                add(o)

        sums = B.alloc_buffer((warps * rows * LANES,), "float32", scope="shared")
        warp, place = T.truncdiv(f.thread, 32), T.truncmod(f.thread, 32)
        for row in range(rows):
            for c in range(_OUTPUTS):
                total = call("float32", "qg_lanes_sum", acc[row * _OUTPUTS + c], T.int32(_SAME_OUTPUTS))
                with B.If(place < _QUADS), B.Then():
                    B.buffer_store(sums, total, [(warp * rows + row) * LANES + place * _OUTPUTS + c])
        sync()
        with B.If(f.thread < rows * LANES), B.Then():
            total = sums[f.thread]
            for other in range(1, warps):
                total = total + sums[f.thread + other * rows * LANES]
            row = B.bind(T.Cast("int64", T.truncdiv(f.thread, LANES)))
            column = B.bind(tile * LANES + T.Cast("int64", T.truncmod(f.thread, LANES)))
            with B.If(T.And(row < M, column < index(N))), B.Then():
                value = finished(f, total, row, column, N, epilogue)
                B.buffer_store(f.buffers["y"], value, [row * N + column])
    return CudaKernel(f.result, _THREADS)
