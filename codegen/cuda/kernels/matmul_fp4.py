"""Many rows of NVFP4 by an NVFP4 weight, on tensor cores: one instruction multiplies 64 inputs of E2M1 with
their scales of E4M3 where the GPU has it (compute capability 12.0), else they are decoded to float16, which
is exact, and multiplied there. Sums are float32.

A block of threads does CUDA_MANY_ROWS rows by 128 outputs, a warp all of the rows by one n16 tile. In a step
of 64 inputs lane (g, t) has words t and 4 + t of rows and columns g and g + 8: as codes lie, in activations
and weights."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.cuda.kernels import CudaKernel
from qgraph.codegen.cuda.kernels.epilogue import finished
from qgraph.codegen.cuda.kernels.frame import address, device_function, do
from qgraph.codegen.kernels.epilogue import epilogue_pointers
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.vmath import Expr, named
from qgraph.codegen.packing import GROUP, LANES, WORD
from qgraph.codegen.spec import CUDA_MANY_COLUMNS, CUDA_MANY_ROWS, KernelSpec

_THREADS = 256
_STEP = 64  # inputs of an instruction
_BLOCKS = _STEP // GROUP  # scales of a step


def fp4_rows(spec: KernelSpec, symbol: str) -> CudaKernel:
    """y = epilogue(x @ W). Spec: k, n, epilogue.

    Arguments: y f32 [M, n], codes u32 [M, 2 B], B = ceil(k/16), and scales u8 [M, B], as quantize_nvfp4
    writes them, act_scale f32 [1], the weight's codes u32, block_scale u8 (none negative), global_scale f32
    [1], the epilogue's, M. Blocks: ceil(M/CUDA_MANY_ROWS) * ceil(n/CUDA_MANY_COLUMNS), rows fastest."""
    K, N, epilogue = spec["k"], spec["n"], spec["epilogue"]
    tiles, blocks = -(-N // LANES), -(-K // GROUP)
    words, steps, ms = blocks * (GROUP // WORD), -(-K // _STEP), CUDA_MANY_ROWS // 16
    pointers = [
        ("y", "float32"),
        ("codes", "uint32"),
        ("scales", "uint8"),
        ("act_scale", "float32"),
        ("weight0", "uint32"),
        ("weight1", "uint8"),
        ("weight2", "float32"),
    ]
    with device_function(symbol, [*pointers, *epilogue_pointers(epilogue)], ["M"], _THREADS) as f:
        p, M = f.buffers, f.scalars["M"]
        down = B.bind(T.truncdiv(M + index(CUDA_MANY_ROWS - 1), index(CUDA_MANY_ROWS)))
        m0 = B.bind(T.truncmod(f.block, down) * CUDA_MANY_ROWS)
        warp = T.Cast("int64", T.truncdiv(f.thread, 32))
        own_tile = B.bind(T.truncdiv(f.block, down) * (CUDA_MANY_COLUMNS // LANES) + warp)
        tile = B.bind(T.min(own_tile, index(tiles - 1)))  # beyond the last, the last: its results are dropped
        g = B.bind(T.Cast("int64", T.truncdiv(T.truncmod(f.thread, 32), 4)))
        t = B.bind(T.Cast("int64", T.truncmod(f.thread, 4)))
        acc = B.alloc_buffer((ms * 2 * 4,), "float32", scope="local")
        for i in range(ms * 2 * 4):
            B.buffer_store(acc, T.float32(0), [i])

        def words_of(buffer: Any, start: Expr, stride: int, step: Expr) -> list[Expr]:
            """Words t and 4 + t of a step; beyond the last, 0."""
            local = B.alloc_buffer((2,), "uint32", scope="local")
            for half in range(2):
                at = B.bind(step * (_STEP // WORD) + 4 * half + t)
                B.buffer_store(local, T.uint32(0), [half])
                with B.If(at < index(words)), B.Then():
                    B.buffer_store(local, buffer[start + at * stride], [half])
            return [local[half] for half in range(2)]

        def scales_of(buffer: Any, start: Expr, stride: int, step: Expr) -> Expr:
            """The four scales of a step, in one word; beyond the last, 0."""
            local = B.alloc_buffer((1,), "uint32", scope="local")
            B.buffer_store(local, T.uint32(0), [0])
            for i in range(_BLOCKS):
                at = B.bind(step * _BLOCKS + i)
                with B.If(at < index(blocks)), B.Then():
                    bits = T.shift_left(T.Cast("uint32", buffer[start + at * stride]), T.uint32(8 * i))
                    B.buffer_store(local, T.bitwise_or(local[0], bits), [0])
            return local[0]

        rows = [[B.bind(T.min(m0 + g + (16 * m + 8 * half), M - 1)) for half in range(2)] for m in range(ms)]
        a = B.alloc_buffer((4,), "uint32", scope="local")
        with B.serial(index(steps)) as step:
            right = []
            for half in range(2):
                lane = g + 8 * half
                own = words_of(p["weight0"], tile * (words * LANES) + lane, LANES, step)
                right.append((own, scales_of(p["weight1"], tile * (blocks * LANES) + lane, LANES, step)))
            for m in range(ms):
                scales = []
                for half, row in enumerate(rows[m]):
                    for i, word in enumerate(words_of(p["codes"], row * words, 1, step)):
                        B.buffer_store(a, word, [2 * i + half])
                    scales.append(scales_of(p["scales"], row * blocks, 1, step))
                for half, (own, scale) in enumerate(right):
                    sums = address(acc, (m * 2 + half) * 4)
                    do("qg_mma_fp4", sums, address(a, 0), *own, *scales, scale)

        overall = named(p["act_scale"][0] * p["weight2"][0])
        for m in range(ms):
            for half in range(2):
                for r in range(2):
                    for j in range(2):
                        to = B.bind(m0 + g + (16 * m + 8 * r))
                        column = B.bind(own_tile * LANES + t * 2 + (8 * half + j))
                        with B.If(T.And(to < M, column < index(N))), B.Then():
                            total = named(acc[(m * 2 + half) * 4 + r * 2 + j])
                            value = finished(f, total * overall, to, column, N, epilogue)
                            B.buffer_store(p["y"], value, [to * N + column])
    return CudaKernel(f.result, _THREADS)
