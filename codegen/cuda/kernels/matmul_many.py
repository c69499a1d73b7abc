"""Many rows by a packed weight, on tensor cores: mma.m16n8k16 of bfloat16, sums in float32.

A block of threads does CUDA_MANY_ROWS rows by 128 outputs, a warp all of the rows by one n16 tile, so that a
weight is decoded once in a block. In a step of 32 inputs lane (g, t) = (lane / 4, lane % 4) decodes octet t
of outputs g and g + 8: which inputs of a product share an instruction is open, as long as both operands agree
on it, and so an octet is what one lane has of two instructions. Then x is read from shared memory 16 bytes at
a time, and weights go from their words to fragments without shared memory.

Weights are exact in bfloat16: E2M1 x E4M3 has 6 significant bits, levels of the group formats up to 8; the
scale of a block of these goes to the sum over the block. An activation is the sum of `parts` bfloat16
numbers: with two of them it is rounded to 2^-17 of its magnitude, with one to 2^-9."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B
from tvm.tirx import EQ

from qgraph.codegen.cuda.kernels import CudaKernel
from qgraph.codegen.cuda.kernels.epilogue import finished
from qgraph.codegen.cuda.kernels.frame import address, call, copy4, device_function, do, sync
from qgraph.codegen.cuda.kernels.weights import OCTET, open_weight
from qgraph.codegen.kernels.epilogue import epilogue_pointers
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.vmath import Expr, named
from qgraph.codegen.packing import LANES
from qgraph.codegen.spec import CUDA_MANY_COLUMNS, CUDA_MANY_ROWS, KernelSpec

_THREADS = 256
_STEP = 32  # inputs of a step
_WORDS = _STEP // 2  # of bfloat16 pairs, of a row in shared memory
_HALVES = 2  # n8 halves of an n16 tile


def many_rows(weight: str, spec: KernelSpec, symbol: str) -> CudaKernel:
    """Blocks: ceil(M/CUDA_MANY_ROWS) * ceil(n/CUDA_MANY_COLUMNS), rows fastest: blocks that run side by side
    read the same weights."""
    K, N, epilogue, parts = spec["k"], spec["n"], spec["epilogue"], spec["parts"]
    packed = open_weight(weight, spec)
    names = [f"weight{i}" for i in range(len(packed.operands))]
    pointers = [("y", "float32"), ("x", "float32"), *zip(names, packed.operands, strict=True)]
    tiles, steps, octets = -(-N // LANES), -(-K // _STEP), -(-K // OCTET)
    ms = CUDA_MANY_ROWS // 16
    each = CUDA_MANY_ROWS * _STEP // _THREADS  # inputs that a thread brings to shared memory
    sharers = _STEP // each  # threads of a row
    by_block = packed.has_scale and not packed.exact
    with device_function(symbol, [*pointers, *epilogue_pointers(epilogue)], ["M"], _THREADS) as f:
        w, x, y, M = [f.buffers[name] for name in names], f.buffers["x"], f.buffers["y"], f.scalars["M"]
        down = B.bind(T.truncdiv(M + index(CUDA_MANY_ROWS - 1), index(CUDA_MANY_ROWS)))
        m0 = B.bind(T.truncmod(f.block, down) * CUDA_MANY_ROWS)
        warp = T.Cast("int64", T.truncdiv(f.thread, 32))
        own_tile = B.bind(T.truncdiv(f.block, down) * (CUDA_MANY_COLUMNS // LANES) + warp)
        tile = B.bind(T.min(own_tile, index(tiles - 1)))  # beyond the last, the last: its results are dropped
        g, t = B.bind(T.truncmod(f.thread, 32) // 4), B.bind(T.truncmod(f.thread, 4))
        staged = [B.alloc_buffer((CUDA_MANY_ROWS * _WORDS,), "uint32", scope="shared") for _ in range(parts)]
        totals = B.alloc_buffer((CUDA_MANY_ROWS,), "float32", scope="shared") if packed.has_offset else None

        count = ms * _HALVES * 4
        acc = B.alloc_buffer((count,), "float32", scope="local")
        block_acc = B.alloc_buffer((count,), "float32", scope="local") if by_block else acc
        for i in range(count):
            B.buffer_store(acc, T.float32(0), [i])
            if by_block:
                B.buffer_store(block_acc, T.float32(0), [i])

        # What this thread brings: `each` inputs of one row.
        row = B.bind(T.truncdiv(f.thread, sharers))
        place = B.bind(T.truncmod(f.thread, sharers) * each)
        source = B.bind(T.min(m0 + T.Cast("int64", row), M - 1) * K + T.Cast("int64", place))
        brought = B.alloc_buffer((each,), "float32", scope="local")

        def bring(step: Expr) -> None:
            if K % _STEP == 0:
                for i in range(0, each, 4):
                    copy4(brought, i, x, source + step * _STEP + i)
                return
            for i in range(each):
                B.buffer_store(brought, T.float32(0), [i])
                with B.If(step * _STEP + T.Cast("int64", place) + i < index(K)), B.Then():
                    B.buffer_store(brought, x[source + step * _STEP + i], [i])

        def stage(step: Expr) -> None:
            to = row * _WORDS + T.truncdiv(place, 2)
            words = [B.alloc_buffer((each // 2,), "uint32", scope="local") for _ in range(parts)]
            for i in range(0, each, 2):
                low, high = B.bind(brought[i]), B.bind(brought[i + 1])
                if parts == 1:
                    B.buffer_store(words[0], call("uint32", "qg_bf16x2", low, high), [i // 2])
                    continue
                heads = [named(T.call_extern("float32", "qg_head", v)) for v in (low, high)]
                rests = [
                    named(T.call_extern("float32", "qg_rest", v, head))
                    for v, head in zip((low, high), heads, strict=True)
                ]
                B.buffer_store(words[0], call("uint32", "qg_bf16x2", *heads), [i // 2])
                B.buffer_store(words[1], call("uint32", "qg_bf16x2", *rests), [i // 2])
            for buffer, own in zip(staged, words, strict=True):
                for i in range(0, each // 2, 4):
                    copy4(buffer, to + i, own, i)
            if totals is not None:
                total = brought[0]
                for i in range(1, each):
                    total = total + brought[i]
                total = call("float32", "qg_lanes_sum", total, T.int32(sharers - 1))
                begins = EQ(T.truncmod(step * _STEP, index(packed.block)), index(0))
                with B.If(EQ(place, 0)), B.Then():
                    B.buffer_store(totals, T.Select(begins, T.float32(0), totals[row]) + total, [row])

        def fragments(step: Expr) -> Any:
            """Of both halves of the tile the eight inputs of this lane, as four bfloat16 pairs."""
            o = step * (_STEP // OCTET) + T.Cast("int64", t)
            o = B.bind(T.min(o, index(octets - 1)) if octets % (_STEP // OCTET) else o)
            out = B.alloc_buffer((_HALVES * OCTET // 2,), "uint32", scope="local")
            for half in range(_HALVES):
                lane = B.bind(T.Cast("int64", g + 8 * half))
                levels = packed.octet(w, tile, lane, o, 1)[0]
                if packed.exact:
                    scale = packed.scales(w, tile, lane, o, 1)[0]
                    levels = [named(level * scale) for level in levels]
                for i in range(0, OCTET, 2):
                    pair = call("uint32", "qg_bf16x2", levels[i], levels[i + 1])
                    B.buffer_store(out, pair, [half * (OCTET // 2) + i // 2])
            return out

        def finish_block(step: Expr) -> None:
            """The sums of a block to those of all, with its scale and its offset."""
            o = B.bind(step * (_STEP // OCTET))
            for half in range(_HALVES):
                for j in range(2):
                    lane = B.bind(T.Cast("int64", t * 2 + (8 * half + j)))
                    scale = packed.scales(w, tile, lane, o, 1)[0]
                    offset = packed.offsets(w, tile, lane, o, 1)[0] if packed.has_offset else None
                    for m in range(ms):
                        for r in range(2):
                            at = (m * _HALVES + half) * 4 + r * 2 + j
                            value = T.fma(block_acc[at], scale, acc[at])
                            if totals is not None:
                                value = T.fma(totals[g + (16 * m + 8 * r)], offset, value)
                            B.buffer_store(acc, value, [at])
                            B.buffer_store(block_acc, T.float32(0), [at])

        bring(index(0))
        a = B.alloc_buffer((2 * 4,), "uint32", scope="local")  # of one m16: eight inputs of rows g and g + 8
        ordered = B.alloc_buffer((4,), "uint32", scope="local")
        with B.serial(index(steps)) as step:
            sync()
            stage(step)
            sync()
            with B.If(step + 1 < index(steps)), B.Then():
                bring(step + 1)
            b = fragments(step)
            for m in range(ms):
                for part in range(parts):
                    for r in range(2):
                        at = (g + (16 * m + 8 * r)) * _WORDS + t * (OCTET // 2)
                        copy4(a, 4 * r, staged[part], at)
                    for k in range(2):  # instructions of 16 inputs
                        for i, word in enumerate((2 * k, 4 + 2 * k, 2 * k + 1, 4 + 2 * k + 1)):
                            B.buffer_store(ordered, a[word], [i])
                        for half in range(_HALVES):
                            own = address(block_acc, (m * _HALVES + half) * 4)
                            pair = [b[half * (OCTET // 2) + 2 * k + i] for i in range(2)]
                            do("qg_mma_bf16", own, address(ordered, 0), *pair)
            if by_block:
                ends = EQ(T.truncmod((step + 1) * _STEP, index(packed.block)), index(0))
                with B.If(T.Or(ends, EQ(step + 1, index(steps)))), B.Then():
                    finish_block(step)

        overall = packed.overall(w)
        for m in range(ms):
            for half in range(_HALVES):
                for r in range(2):
                    for j in range(2):
                        to = B.bind(m0 + T.Cast("int64", g + (16 * m + 8 * r)))
                        column = B.bind(own_tile * LANES + T.Cast("int64", t * 2 + (8 * half + j)))
                        with B.If(T.And(to < M, column < index(N))), B.Then():
                            total = named(acc[(m * _HALVES + half) * 4 + r * 2 + j])
                            total = total if overall is None else total * overall
                            B.buffer_store(y, finished(f, total, to, column, N, epilogue), [to * N + column])
    return CudaKernel(f.result, _THREADS)
