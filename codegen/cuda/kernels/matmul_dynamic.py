"""Products in float32 without tensor cores: of two activations, and of many rows by a float weight.

A block of threads does a tile of 64 x 64 results, a thread 4 x 4 of them, over slices of 16 inputs in shared
memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.cuda.kernels import CudaKernel, kernel
from qgraph.codegen.cuda.kernels.epilogue import finished
from qgraph.codegen.cuda.kernels.frame import Frame, device_function, sync
from qgraph.codegen.kernels.epilogue import epilogue_pointers
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.vmath import Expr
from qgraph.codegen.packing import LANES
from qgraph.codegen.spec import CUDA_TILE, KernelSpec

_THREADS, _DEPTH, _OWN = 256, 16, 4
_SIDE = CUDA_TILE // _OWN  # threads along a side of the tile


def _tile_product(
    f: Frame,
    m0: Expr,
    n0: Expr,
    K: Expr,
    a: Callable[[Expr, Expr, Any, Any], None],
    b: Callable[[Expr, Expr, Any, Any], None],
    put: Callable[[Expr, Expr, Expr], None],
) -> None:
    """put(row, column, sum) for the results of a tile; a(row, k, to, at) writes an element to shared memory,
    zero outside of the matrix, as does b(k, column, to, at)."""
    A = B.alloc_buffer((_DEPTH * CUDA_TILE,), "float32", scope="shared")  # [k, row]
    W = B.alloc_buffer((_DEPTH * CUDA_TILE,), "float32", scope="shared")  # [k, column]
    acc = B.alloc_buffer((_OWN * _OWN,), "float32", scope="local")
    for i in range(_OWN * _OWN):
        B.buffer_store(acc, T.float32(0), [i])
    tm, tn = B.bind(T.truncdiv(f.thread, _SIDE)), B.bind(T.truncmod(f.thread, _SIDE))
    with B.serial(T.truncdiv(K + index(_DEPTH - 1), index(_DEPTH))) as slice_:
        sync()
        for i in range(_DEPTH * CUDA_TILE // _THREADS):
            flat = B.bind(f.thread + i * _THREADS)
            # Neighbouring threads read neighbouring inputs of a, and neighbouring columns of b.
            row, k = T.truncdiv(flat, _DEPTH), T.truncmod(flat, _DEPTH)
            a(m0 + T.Cast("int64", row), slice_ * _DEPTH + T.Cast("int64", k), A, k * CUDA_TILE + row)
            k, column = T.truncdiv(flat, CUDA_TILE), T.truncmod(flat, CUDA_TILE)
            b(slice_ * _DEPTH + T.Cast("int64", k), n0 + T.Cast("int64", column), W, flat)
        sync()
        with B.serial(_DEPTH) as k:
            left = [B.bind(A[k * CUDA_TILE + tm * _OWN + i]) for i in range(_OWN)]
            right = [B.bind(W[k * CUDA_TILE + tn * _OWN + j]) for j in range(_OWN)]
            for i in range(_OWN):
                for j in range(_OWN):
                    B.buffer_store(acc, T.fma(left[i], right[j], acc[i * _OWN + j]), [i * _OWN + j])
    for i in range(_OWN):
        for j in range(_OWN):
            row = B.bind(m0 + T.Cast("int64", tm * _OWN + i))
            put(row, B.bind(n0 + T.Cast("int64", tn * _OWN + j)), acc[i * _OWN + j])


def _element(buffer: Any, at: Expr, inside: Expr, to: Any, place: Expr) -> None:
    B.buffer_store(to, T.float32(0), [place])
    with B.If(inside), B.Then():
        B.buffer_store(to, buffer[at], [place])


@kernel("matmul_dynamic")
def matmul_dynamic(spec: KernelSpec, symbol: str) -> CudaKernel:
    """m_block and n_block are CUDA_TILE."""
    scalars = ["M", "K", "N", "B1", "as_0", "as_1", "as_m", "as_k"]
    scalars += ["bs_0", "bs_1", "bs_k", "bs_n", "ys_0", "ys_1", "ys_m"]
    with device_function(symbol, [(n, "float32") for n in "yab"], scalars, _THREADS) as f:
        s, y, a, b = f.scalars, f.buffers["y"], f.buffers["a"], f.buffers["b"]
        M, K, N = s["M"], s["K"], s["N"]
        across = B.bind(T.truncdiv(N + index(CUDA_TILE - 1), index(CUDA_TILE)))
        down = B.bind(T.truncdiv(M + index(CUDA_TILE - 1), index(CUDA_TILE)))
        n0 = B.bind(T.truncmod(f.block, across) * CUDA_TILE)
        rest = B.bind(T.truncdiv(f.block, across))
        m0 = B.bind(T.truncmod(rest, down) * CUDA_TILE)
        batch = B.bind(T.truncdiv(rest, down))
        i0, i1 = B.bind(T.truncdiv(batch, s["B1"])), B.bind(T.truncmod(batch, s["B1"]))
        a0, b0 = B.bind(i0 * s["as_0"] + i1 * s["as_1"]), B.bind(i0 * s["bs_0"] + i1 * s["bs_1"])
        y0 = B.bind(i0 * s["ys_0"] + i1 * s["ys_1"])

        def put(row: Expr, column: Expr, value: Expr) -> None:
            with B.If(T.And(row < M, column < N)), B.Then():
                B.buffer_store(y, value, [y0 + row * s["ys_m"] + column])

        def from_a(row: Expr, k: Expr, to: Any, place: Expr) -> None:
            _element(a, a0 + row * s["as_m"] + k * s["as_k"], T.And(row < M, k < K), to, place)

        def from_b(k: Expr, column: Expr, to: Any, place: Expr) -> None:
            _element(b, b0 + k * s["bs_k"] + column * s["bs_n"], T.And(column < N, k < K), to, place)

        _tile_product(f, m0, n0, K, from_a, from_b, put)
    return CudaKernel(f.result, _THREADS)


def many_float_rows(spec: KernelSpec, symbol: str) -> CudaKernel:
    """x @ W, W float32 in layout `f32_n16`. Blocks: ceil(M/CUDA_TILE) * ceil(n/CUDA_TILE), the last
    fastest."""
    K, N, epilogue = spec["k"], spec["n"], spec["epilogue"]
    pointers = [(name, "float32") for name in ("y", "x", "weight0")]
    with device_function(symbol, [*pointers, *epilogue_pointers(epilogue)], ["M"], _THREADS) as f:
        M, across = f.scalars["M"], -(-N // CUDA_TILE)
        m0 = B.bind(T.truncdiv(f.block, index(across)) * CUDA_TILE)
        n0 = B.bind(T.truncmod(f.block, index(across)) * CUDA_TILE)

        def put(row: Expr, column: Expr, value: Expr) -> None:
            with B.If(T.And(row < M, column < index(N))), B.Then():
                result = finished(f, value, row, column, N, epilogue)
                B.buffer_store(f.buffers["y"], result, [row * N + column])

        def from_x(row: Expr, k: Expr, to: Any, place: Expr) -> None:
            _element(f.buffers["x"], row * K + k, T.And(row < M, k < index(K)), to, place)

        def from_weight(k: Expr, column: Expr, to: Any, place: Expr) -> None:
            tile, lane = T.truncdiv(column, index(LANES)), T.truncmod(column, index(LANES))
            inside = T.And(column < index(N), k < index(K))
            _element(f.buffers["weight0"], (tile * K + k) * LANES + lane, inside, to, place)

        _tile_product(f, m0, n0, index(K), from_x, from_weight, put)
    return CudaKernel(f.result, _THREADS)
