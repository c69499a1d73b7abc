"""Up to 8 rows by a packed weight, on tensor cores: mma.m16n8k16 of float16, sums in float32.

Bound by the memory that the weight lies in, if its decoding is cheap enough: multiplying and adding cost next
    to nothing here, whatever the number of rows, as weights are the left operand and rows the 8 columns of
    the right one.

A block of threads does 32 outputs, its warps share K. Lane (g, t) = (lane / 4, lane % 4) has four outputs of
tile g / 4, those from 4 (g % 4) on, and unit t of each four units of inputs: 16 bytes of codes a load, and a
warp's loads are 256 bytes side by side of two tiles. Which output is which row of an instruction, and which
inputs share one, is open as long as both operands agree on it: so codes go from words to fragments without a
detour.

Levels are exact in float16. A row of x is scaled by a power of two to where float16 has most digits, and is
the sum of two float16 numbers: each input is held to 2^-23 of itself, or 2^-39 of the row's largest. Sums of
the warps are added in shared memory, in a fixed order; a row's result does not depend on how many rows there
are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.cuda.kernels import CudaKernel
from qgraph.codegen.cuda.kernels.epilogue import finished
from qgraph.codegen.cuda.kernels.frame import Frame, address, call, copy4, device_function, do, strided, sync
from qgraph.codegen.cuda.kernels.weights import OCTET, Weight, open_weight
from qgraph.codegen.digits import FEW_ROWS
from qgraph.codegen.kernels.epilogue import epilogue_pointers
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.vmath import Expr, named
from qgraph.codegen.packing import LANES
from qgraph.codegen.spec import CUDA_FEW_COLUMNS, KernelSpec
from qgraph.errors import QGraphError

_WARPS = 16  # of a block, at most
_SEGMENT = 128  # inputs that a warp does at a time
_OUTPUTS = 4  # of a lane
_ONES = 0x3C003C00  # a pair of 1.0
_MOST_STAGED = 20 * 1024  # inputs of a row that shared memory holds on every GPU, beside the sums
_INPUT_BYTES = 4  # of an input there: two float16


def few_rows(weight: str, spec: KernelSpec, symbol: str, rows: int) -> CudaKernel:
    """The kernel for one row, staged in shared memory once for all warps, or for up to FEW_ROWS of them,
    which each lane splits itself. Blocks: ceil(n/CUDA_FEW_COLUMNS)."""
    K, N, epilogue = spec["k"], spec["n"], spec["epilogue"]
    packed = open_weight(weight, spec)
    P = packed.unit
    if packed.block % (4 * P) and not packed.exact:
        raise QGraphError(f"{spec.op}: blocks of {packed.block} inputs in units of {P}")
    names = [f"weight{i}" for i in range(len(packed.operands))]
    pointers = [("y", "float32"), ("x", "float32"), *zip(names, packed.operands, strict=True)]
    segments, tiles = -(-K // _SEGMENT), -(-N // LANES)
    warps = min(_WARPS, max(segments, FEW_ROWS))
    threads = 32 * warps
    staged = rows == 1 and K <= _MOST_STAGED
    steps = _SEGMENT // (4 * P)
    units = segments * _SEGMENT // P  # of a row in shared memory, zeros beyond K
    with device_function(symbol, [*pointers, *epilogue_pointers(epilogue)], ["M"], threads) as f:
        w, x, M = [f.buffers[name] for name in names], f.buffers["x"], f.scalars["M"]
        place = B.bind(T.truncmod(f.thread, 32))
        warp = B.bind(T.Cast("int64", T.truncdiv(f.thread, 32)))
        g, t = B.bind(T.truncdiv(place, 4)), B.bind(T.Cast("int64", T.truncmod(place, 4)))
        first_tile = f.block * (CUDA_FEW_COLUMNS // LANES)
        # Beyond the last tile, the last: its results are dropped.
        tile = B.bind(T.min(first_tile + T.Cast("int64", T.truncdiv(g, 4)), index(tiles - 1)))
        lane = B.bind(T.Cast("int64", T.truncmod(g, 4) * _OUTPUTS))

        largest = _largest_of_rows(f, x, M, K, rows)
        row = T.min(T.Cast("int64", g), M - 1) if rows > 1 else index(0)
        factor = call("float32", "qg_to_unit", largest[row])
        if staged:
            fragment = _staged(f, x, K, units, packed, factor)
        else:
            fragment = _split(x, K, packed, factor, B.bind(row))

        groups = _OUTPUTS // 2  # of two outputs a lane: those of one instruction
        acc = B.alloc_buffer((groups * 4,), "float32", scope="local")
        part = acc if packed.exact else B.alloc_buffer((groups * 4,), "float32", scope="local")
        ones = B.alloc_buffer((4,), "float32", scope="local") if packed.has_offset else None
        one = B.alloc_buffer((4,), "uint32", scope="local") if packed.has_offset else None
        a = B.alloc_buffer((4,), "uint32", scope="local")
        for buffer in {id(b): b for b in (acc, part, ones) if b is not None}.values():
            for i in range(4 if buffer is ones else groups * 4):
                B.buffer_store(buffer, T.float32(0), [i])
        if one is not None:
            for i in range(4):
                B.buffer_store(one, T.uint32(_ONES), [i])

        def finish_part(u: Expr) -> None:
            """The sums of inputs that share scales to those of all."""
            o = u * (P // OCTET)
            scales = packed.scales(w, tile, lane, o, _OUTPUTS)
            offsets = packed.offsets(w, tile, lane, o, _OUTPUTS) if ones is not None else None
            for c in range(_OUTPUTS):
                for column in range(2):
                    at = c * 2 + column
                    value = T.fma(part[at], scales[c], acc[at])
                    if ones is not None and offsets is not None:
                        value = T.fma(ones[column], offsets[c], value)
                    B.buffer_store(acc, value, [at])
                    B.buffer_store(part, T.float32(0), [at])
            if ones is not None:
                for i in range(4):
                    B.buffer_store(ones, T.float32(0), [i])

        def step(u: Expr) -> None:
            """Four units of inputs, this lane's is u."""
            held = B.bind(T.min(u, index(-(-K // P) - 1)))
            pairs = packed.pairs(w, tile, lane, held, _OUTPUTS)
            inputs = fragment(u)
            for m in range(P // 4):
                for own in inputs:
                    right = [own[2 * m], own[2 * m + 1]]
                    for group in range(groups):
                        for i in range(4):
                            B.buffer_store(a, pairs[2 * group + i % 2][2 * m + i // 2], [i])
                        do("qg_mma_f16", address(part, group * 4), address(a, 0), *right)
                    if ones is not None:
                        do("qg_mma_f16", address(ones, 0), address(one, 0), *right)

        every = max(1, min(steps, packed.block // (4 * P)))  # steps that share scales
        with B.serial(index(-(-segments // warps))) as i:
            segment = B.bind(i * warps + warp)
            with B.If(segment < index(segments)), B.Then():
                for s in range(steps):
                    u = B.bind(segment * (_SEGMENT // P) + 4 * s + t)
                    step(u)
                    if not packed.exact and (s + 1) % every == 0:
                        finish_part(T.min(u - t, index(-(-K // P) - 1)))

        def put(output: Expr, row: Expr, total: Expr) -> None:
            to = B.bind(T.Cast("int64", row))
            column = B.bind(first_tile * LANES + T.Cast("int64", output))
            with B.If(T.And(to < T.min(M, index(rows)), column < index(N))), B.Then():
                unit = call("float32", "qg_from_unit", largest[T.min(row, T.int32(rows - 1))])
                overall = packed.overall(w)
                value = named(named(total * unit) * T.float32(packed.factor))
                value = value if overall is None else value * overall
                B.buffer_store(f.buffers["y"], finished(f, value, to, column, N, epilogue), [to * N + column])

        _gather(f, acc, warps, put)
    return CudaKernel(f.result, threads, units * P * _INPUT_BYTES if staged else 0)


def _largest_of_rows(f: Frame, x: Any, M: Expr, K: int, rows: int) -> Any:
    """The largest finite magnitude of each row, as its bits, in shared memory."""
    shared = B.alloc_buffer((rows,), "int32", scope="shared")
    own = B.alloc_buffer((1,), "int32", scope="local")
    for row in range(rows):
        with B.If(index(row) < M), B.Then():
            B.buffer_store(own, T.int32(0), [0])

            def look(k: Expr) -> None:
                bits = call("int32", "qg_finite_bits", x[row * K + k])
                B.buffer_store(own, T.max(own[0], bits), [0])

            strided(f, index(K), look)
            B.buffer_store(shared, f.reduce("max", own[0]), [row])
    sync()
    return shared


Fragment = Callable[[Expr], list[list[Expr]]]  # of a unit: its pairs of heads, and of rests


def _staged(f: Frame, x: Any, K: int, units: int, packed: Weight, factor: Expr) -> Fragment:
    """The one row as float16, in dynamic shared memory: of a unit the pairs of heads, then those of rests."""
    half = packed.unit // 2
    words = B.alloc_buffer((2,), "uint32", scope="local")

    def put(flat: Expr) -> None:
        u, i = B.bind(T.truncdiv(flat, index(half))), B.bind(T.truncmod(flat, index(half)))
        start = T.truncdiv(i, index(packed.apart)) * (2 * packed.apart)
        low = B.bind(start + T.truncmod(i, index(packed.apart)))
        values = B.alloc_buffer((2,), "float32", scope="local")
        for j in range(2):
            k = B.bind(u * packed.unit + low + j * packed.apart)
            B.buffer_store(values, T.float32(0), [j])
            with B.If(k < index(K)), B.Then():
                B.buffer_store(values, x[k] * factor, [j])
        do("qg_split_f16", values[0], values[1], address(words, 0), address(words, 1))
        for j in range(2):
            do("qg_dynamic_put", T.Cast("int32", u * packed.unit + i + j * half), words[j])

    strided(f, index(units * half), put)
    sync()

    def fragment(u: Expr) -> list[list[Expr]]:
        out = []
        for part in range(2):
            local = B.alloc_buffer((half,), "uint32", scope="local")
            for i in range(0, half, 4):
                at = T.Cast("int32", u * packed.unit + (part * half + i))
                do("qg_dynamic_get4", address(local, i), at)
            out.append([local[i] for i in range(half)])
        return out

    return fragment


def _split(x: Any, K: int, packed: Weight, factor: Expr, row: Expr) -> Fragment:
    """A row of each lane as float16, made where it is needed."""
    half = packed.unit // 2

    def fragment(u: Expr) -> list[list[Expr]]:
        values = B.alloc_buffer((packed.unit,), "float32", scope="local")
        at = B.bind(row * K + u * packed.unit)
        if K % packed.unit == 0:
            with B.If(u * packed.unit < index(K)):
                with B.Then():
                    for i in range(0, packed.unit, 4):
                        copy4(values, i, x, at + i)
                with B.Else():
                    for i in range(packed.unit):
                        B.buffer_store(values, T.float32(0), [i])
        else:
            for i in range(packed.unit):
                B.buffer_store(values, T.float32(0), [i])
                with B.If(u * packed.unit + i < index(K)), B.Then():
                    B.buffer_store(values, x[at + i], [i])
        words = [B.alloc_buffer((half,), "uint32", scope="local") for _ in range(2)]
        for i in range(half):
            low = i // packed.apart * (2 * packed.apart) + i % packed.apart
            pair = [values[k] * factor for k in (low, low + packed.apart)]
            do("qg_split_f16", *pair, address(words[0], i), address(words[1], i))
        return [[own[i] for i in range(half)] for own in words]

    return fragment


def _gather(f: Frame, acc: Any, warps: int, put: Callable[[Expr, Expr, Expr], None]) -> None:
    """put(output of the block, row, sum) of all warps' sums."""
    size = CUDA_FEW_COLUMNS * FEW_ROWS
    sums = B.alloc_buffer((warps * size,), "float32", scope="shared")
    warp, place = T.truncdiv(f.thread, 32), T.truncmod(f.thread, 32)
    g, t = T.truncdiv(place, 4), T.truncmod(place, 4)
    for c in range(_OUTPUTS):
        for column in range(2):
            output = T.truncdiv(g, 4) * LANES + T.truncmod(g, 4) * _OUTPUTS + c
            at = warp * size + output * FEW_ROWS + t * 2 + column
            B.buffer_store(sums, acc[c * 2 + column], [at])
    sync()
    with B.If(f.thread < size), B.Then():
        total = sums[f.thread]
        for other in range(1, warps):
            total = total + sums[f.thread + other * size]
        put(T.truncdiv(f.thread, FEW_ROWS), T.truncmod(f.thread, FEW_ROWS), named(total))
