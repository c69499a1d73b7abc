"""a @ b for two activations of any strides: `matmul_dynamic`.

A K-slice of b's panel is copied to a tile on the stack, columns side by side, and the register-blocked kernel
runs over it; sums wait in y between K-slices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels import kernel
from qgraph.codegen.kernels.gemm import accumulate, accumulator
from qgraph.codegen.kernels.vector import f32, lanes_at, load_first, store_first
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import QGraphError

_PANEL_FLOATS = 8192  # 32 KiB of stack


@kernel("matmul_dynamic")
def matmul_dynamic(spec: KernelSpec, isa: Isa, symbol: str) -> PrimFunc:
    """y[b0, b1, m, n] = sum over k of a[b0, b1, m, k] b[b0, b1, k, n], float32.

    Spec: m_block, n_block (a multiple of 16).
    Arguments: y, a, b, M, K, N, B1, strides as0, as1, asm, ask of a, bs0, bs1, bsk, bsn of b (0 where
    broadcast), ys0, ys1, ysm of y, whose n stride is 1; begin, end. K = 0 gives zeros.
    Blocks: B0 * B1 * ceil(M/m_block) * ceil(N/n_block), the last fastest.
    """
    m_block, n_block = spec["m_block"], spec["n_block"]
    if m_block < 1 or n_block < 16 or n_block % 16 or n_block > _PANEL_FLOATS // 16:
        raise QGraphError(f"{spec.op}: cannot build {dict(spec.params)}")
    L = isa.lanes
    tile_rows, tile_vectors = accumulator(isa)
    while n_block % (tile_vectors * L):
        tile_vectors //= 2
    width = tile_vectors * L
    depth = _PANEL_FLOATS // n_block

    def a_at(A: Any, a0: Any, row: Any, rows: Any, stride_m: Any, stride_k: Any) -> Callable[[Any, Any], Any]:
        """Element (r, k); rows beyond the block repeat its last one."""
        return lambda r, k: A[a0 + T.min(row + r, rows - 1) * stride_m + k * stride_k]

    def b_at(P: Any, column: Any) -> Callable[[Any, Any], Any]:
        return lambda k, v: P[k, lanes_at(column + v * L, L)]

    @T.inline
    def copy_slice(P, B, b0, stride_k, stride_n, kn, columns):
        """P[k, n] = b0[k, n] for n < columns, else 0."""
        if stride_n == 1:
            for k in T.serial(kn):
                for v in T.serial(T.int64(n_block // L)):
                    P[k, lanes_at(v * L, L)] = load_first(B, b0 + k * stride_k + v * L, columns - v * L, L)
        else:
            for k in T.serial(kn):
                for v in T.serial(T.int64(n_block // L)):
                    P[k, lanes_at(v * L, L)] = f32(0, L)
            # Along k inside: a transposed b (stride_k 1) is read in order.
            for n in T.serial(columns):
                for k in T.serial(kn):
                    P[k, n] = B[b0 + k * stride_k + n * stride_n]

    @T.inline
    def tile(Y, A, P, y0, stride_y, a0, stride_m, stride_k, row, rows, columns, kn, first, R):
        for group in T.serial(T.int64(n_block // width)):
            acc = T.alloc_buffer((R, tile_vectors, L), "float32", scope="local")
            accumulate(
                acc,
                a_at(A, a0, row, rows, stride_m, stride_k),
                b_at(P, group * width),
                kn,
                R,
                tile_vectors,
                L,
            )
            for r in T.unroll(T.int64(R)):
                if row + r < rows:
                    for v in T.unroll(tile_vectors):
                        column: T.let = group * width + v * L
                        at: T.let = y0 + (row + r) * stride_y + column
                        if not first:
                            acc[r, v, lanes_at(0, L)] = acc[r, v, lanes_at(0, L)] + load_first(
                                Y, at, columns - column, L
                            )
                        store_first(Y, acc[r, v, lanes_at(0, L)], at, columns - column, L)

    @T.prim_func(s_tir=True)
    def func(
        y: T.handle("float32"),
        a: T.handle("float32"),
        b: T.handle("float32"),
        M: T.int64,
        K: T.int64,
        N: T.int64,
        B1: T.int64,
        as0: T.int64,
        as1: T.int64,
        asm: T.int64,
        ask: T.int64,
        bs0: T.int64,
        bs1: T.int64,
        bsk: T.int64,
        bsn: T.int64,
        ys0: T.int64,
        ys1: T.int64,
        ysm: T.int64,
        begin: T.int64,
        end: T.int64,
    ):
        T.func_attr({"global_symbol": symbol, "tirx.noalias": True})
        # Only addresses matter: the shapes of strided operands are not known.
        Y = T.decl_buffer((1,), "float32", data=y)
        A = T.decl_buffer((1,), "float32", data=a)
        B = T.decl_buffer((1,), "float32", data=b)
        P = T.alloc_buffer((depth, n_block), "float32")
        for i in T.serial(end - begin):
            nbs: T.let = T.truncdiv(N + (n_block - 1), T.int64(n_block))
            mbs: T.let = T.truncdiv(M + (m_block - 1), T.int64(m_block))
            batch: T.let = T.truncdiv(begin + i, mbs * nbs)
            within: T.let = T.truncmod(begin + i, mbs * nbs)
            i0: T.let = T.truncdiv(batch, B1)
            i1: T.let = T.truncmod(batch, B1)
            m0: T.let = T.truncdiv(within, nbs) * m_block
            n0: T.let = T.truncmod(within, nbs) * n_block
            rows: T.let = T.min(T.int64(m_block), M - m0)
            columns: T.let = T.min(T.int64(n_block), N - n0)
            y0: T.let = i0 * ys0 + i1 * ys1 + m0 * ysm + n0
            full: T.let = T.truncdiv(rows + (tile_rows - tile_rows // 2 - 1), T.int64(tile_rows))
            for s in T.serial(T.max(T.truncdiv(K + (depth - 1), T.int64(depth)), T.int64(1))):
                k0: T.let = s * depth
                kn: T.let = T.min(T.int64(depth), K - k0)
                a0: T.let = i0 * as0 + i1 * as1 + m0 * asm + k0 * ask
                copy_slice(P, B, i0 * bs0 + i1 * bs1 + k0 * bsk + n0 * bsn, bsk, bsn, kn, columns)
                for t in T.serial(full):
                    tile(Y, A, P, y0, ysm, a0, asm, ask, t * tile_rows, rows, columns, kn, s == 0, tile_rows)
                if full * tile_rows < rows:
                    tile(
                        Y,
                        A,
                        P,
                        y0,
                        ysm,
                        a0,
                        asm,
                        ask,
                        full * tile_rows,
                        rows,
                        columns,
                        kn,
                        s == 0,
                        tile_rows // 2,
                    )

    return func
