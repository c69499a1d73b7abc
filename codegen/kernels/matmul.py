"""x @ W for a constant weight W: kernels that differ in how weights are read (weights.py).

Block b of the grid is chunk b // panels of `m_block` rows and panel b % panels of `n_block` output columns. A
chunk of few rows multiplies weights straight from registers: in integers where the kernel has the digits of x
and the ISA multiplies bytes (matmul_digits.py; with VNNI any number of rows is few), else in float32. One of
more rows decodes a K-slice of the panel once, to a tile on the stack, and runs a register-blocked kernel over
it (gemm.py); sums wait in y between K-slices. All end with the same pass that applies the epilogue to the
finished block. Sums are float32, and a row's result depends on no other row's values. With fewer `digits`
than three (matmul_digits.py) it does depend on whether there are more than FEW_ROWS rows.

A row that has no digits, as it holds an infinity, NaN or nearly, is done over with the weights decoded. In
float32 few rows take the share of a block's offset o, where it has one, as o times the sum of the block's
inputs, of the digits or from a matrix of block sums (block_sums.py). That is the product with the decoded
weights but for rounding, as long as the sums are finite: a row where they are not is done over likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B
from tvm.tirx import PrimFunc

from qgraph.codegen.digits import FEW_ROWS
from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels import kernel
from qgraph.codegen.kernels.epilogue import Result
from qgraph.codegen.kernels.function import UNBOUNDED
from qgraph.codegen.kernels.gemm import accumulate, accumulator, vectors
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.matmul_digits import open_digits
from qgraph.codegen.kernels.signature import drop_parameters
from qgraph.codegen.kernels.vector import f32, lanes_at, splat
from qgraph.codegen.kernels.vmath import named
from qgraph.codegen.kernels.weights import Columns
from qgraph.codegen.kernels.weights_group import open_reader
from qgraph.codegen.packing import LANES
from qgraph.codegen.spec import EPILOGUE_OPERANDS, KernelSpec
from qgraph.errors import QGraphError
from qgraph.formats.nvfp4 import NVFP4

_DIRECT_ROWS = 4
_EXPONENT = 0x7F800000  # of a float32 that is an infinity or NaN
_PANEL_FLOATS = 8192  # of decoded weights: 32 KiB of stack, half of what a kernel may use


@kernel("matmul_nvfp4")
def matmul_nvfp4(spec: KernelSpec, isa: Isa, symbol: str) -> PrimFunc:
    """y = epilogue(x @ dequantize(W)), W in layout `nvfp4_n16k8`.

    Spec: k, n, n_block (multiple of 16), m_block, epilogue: see `Result`; digits, where the rows of x have
    fewer than three if there are more than FEW_ROWS of them.
    Arguments: y f32 [M, n], x f32 [M, k], digits i32 [M, words] (codegen/digits.py), codes u32, block_scale
    u8, global_scale f32 [1], those of the epilogue (epilogue.py), M, begin, end.
    Blocks: ceil(M/m_block) * ceil(n/n_block).
    """
    return matmul(spec, isa, symbol, NVFP4.name)


@kernel("matmul_f32")
def matmul_f32(spec: KernelSpec, isa: Isa, symbol: str) -> PrimFunc:
    """y = epilogue(x @ W), W in layout `f32_n16`.

    Spec, blocks: as of matmul_nvfp4. Arguments: y, x, w f32, the epilogue's, M, begin, end.
    """
    return matmul(spec, isa, symbol, "f32")


def matmul(spec: KernelSpec, isa: Isa, symbol: str, weight: str) -> PrimFunc:
    """The kernel of `spec` over a weight: `f32`, or a format that linear layers have."""
    reader = open_reader(weight, spec, isa)
    K, N, n_block, m_block = spec["k"], spec["n"], spec["n_block"], spec["m_block"]
    epilogue: tuple[str, ...] = spec["epilogue"]
    block, unit = reader.block, reader.unit
    result = Result(N, n_block, isa.lanes, epilogue)
    if (
        min(K, N, m_block) < 1
        or n_block < LANES
        or n_block % LANES
        or n_block * block > _PANEL_FLOATS
        or not result.known
    ):
        raise QGraphError(f"{spec.op}: cannot build {dict(spec.params)}")

    products = open_digits(weight, spec, isa, result) if weight != "f32" else None
    product: Any = products.few if products else None
    many: Any = products.many if products else None
    has_digits, has_many = product is not None, many is not None
    in_digits = product is not None and product.most > 0
    few = product.most if product and in_digits else _DIRECT_ROWS  # more rows of a chunk are decoded
    has_sums = reader.has_offset and not has_digits
    again = in_digits or reader.has_offset  # a row that is done for naught may be done over

    L = isa.lanes
    parts = LANES // L  # vectors of one n16 tile
    tile_rows, tile_vectors = accumulator(isa)
    each = vectors(isa)
    if n_block % (tile_vectors * L):
        tile_vectors = parts
    width = tile_vectors * L  # columns of the accumulator tile
    groups = n_block // width
    tiles, panels, blocks = -(-N // LANES), -(-N // n_block), -(-K // block)
    slices = -(-K // (_PANEL_FLOATS // n_block // block * block))
    depth = -(-K // (slices * block)) * block  # inputs of one K-slice

    def tile_of(panel: Any, group: Any, v: Any) -> Any:
        """The n16 tile of vector v of a group; beyond the last tile, the last (its sums are dropped)."""
        tile = panel * (n_block // LANES) + group * (width // LANES) + v // parts
        return T.min(tile, tiles - 1) if result.ragged else tile

    def columns(panel: Any, group: Any, v: Any) -> Columns:
        """Those of vector v of a group."""
        return Columns(tile_of(panel, group, v), lanes_at(v % parts * L, L))

    def x_at(X: Any, m0: Any, row: Any, rows: Any, k0: Any) -> Callable[[Any, Any], Any]:
        """Element (r, k) of the tile kernel's left operand; rows beyond the block repeat its last one."""
        return lambda r, k: X[(m0 + T.min(row + r, rows - 1)) * K + k0 + k]

    def weight_at(W: Any, P: Any, panel: Any, group: Any, k0: Any) -> Callable[[Any, Any], Any]:
        """Vector (k, v) of its right operand: decoded to the stack, or where it is."""
        if reader.decoded:
            return lambda k, v: P[k, lanes_at(group * width + v * L, L)]
        return lambda k, v: reader.weight(W, columns(panel, group, v), k0 + k)

    def chains(R: int) -> int:
        """Sums a row is split into, so that few rows still fill the pipeline of additions."""
        return 2 if R < _DIRECT_ROWS else 1

    def sum_of_chains(part: Any, r: Any, R: int) -> Any:
        sums = [part[h, r, lanes_at(0, L)] for h in range(chains(R))]
        return sums[0] + sums[1] if len(sums) == 2 else sums[0]

    def add_unit(part: Any, x: Callable[[Any, Any], Any], weights: list[Any], R: int) -> None:
        """part[:, r] += x(r, i) * weights[i] for every i, input by input to the next chain."""
        for i, weight in enumerate(weights):
            vector = named(weight)
            for r in range(R):
                at = [i % chains(R), r, lanes_at(0, L)]
                B.buffer_store(part, part[at] + splat(x(index(r), i), L) * vector, at)

    def block_sum(S: Any, row: Any, kb: Any) -> Any:
        """The sum of a block's inputs, float32."""
        return product.total(S, row, kb) if product else S[row, kb]

    @T.inline
    def add_block(acc, X, W, S, m0, rows, panel, group, kb, count, R):
        """acc[R, tile_vectors] += the first `count` inputs of block kb, weights straight from registers."""
        for v in each(tile_vectors):
            # The scale is applied to the sum of the block's products.
            part = T.alloc_buffer((chains(R), R, L), "float32", scope="local")
            for h in T.unroll(chains(R)):
                for r in T.unroll(R):
                    part[h, r, lanes_at(0, L)] = f32(0, L)
            for u in T.serial(T.int64(count // unit)):
                add_unit(
                    part,
                    x_at(X, m0, 0, rows, kb * block + u * unit),
                    reader.raw(W, columns(panel, group, v), kb, u, unit),
                    R,
                )
            if count % unit != 0:
                add_unit(
                    part,
                    x_at(X, m0, 0, rows, kb * block + count // unit * unit),
                    reader.raw(W, columns(panel, group, v), kb, T.int64(count // unit), count % unit),
                    R,
                )
            for r in T.unroll(R):
                acc[r, v, lanes_at(0, L)] = acc[r, v, lanes_at(0, L)] + reader.scaled(
                    sum_of_chains(part, r, R), reader.scale(W, columns(panel, group, v), kb)
                )
                if reader.has_offset:
                    acc[r, v, lanes_at(0, L)] = acc[r, v, lanes_at(0, L)] + reader.offset(
                        W, columns(panel, group, v), kb
                    ) * splat(block_sum(S, m0 + T.min(r, rows - 1), kb), L)

    @T.inline
    def direct(Y, X, W, S, m0, rows, panel, R):
        """Rows m0 .. m0 + rows - 1, at most R of them; the rest repeat the last one and are dropped."""
        for group in T.serial(T.int64(groups)):
            acc = T.alloc_buffer((R, tile_vectors, L), "float32", scope="local")
            for r in T.unroll(T.int64(R)):
                for v in T.unroll(tile_vectors):
                    acc[r, v, lanes_at(0, L)] = f32(0, L)
            for kb in T.serial(T.int64(K // block)):
                add_block(acc, X, W, S, m0, rows, panel, group, kb, block, R)
            if K % block != 0:
                add_block(acc, X, W, S, m0, rows, panel, group, T.int64(K // block), K % block, R)
            for r in T.unroll(T.int64(R)):
                if r < rows:
                    for v in T.unroll(tile_vectors):
                        result.store(
                            Y, m0 + r, panel * n_block + group * width + v * L, acc[r, v, lanes_at(0, L)]
                        )

    def decode_unit(P: Any, k: Any, column: Any, weights: list[Any], grid: Any) -> None:
        """P[k + i, column ..] = weights[i] with their scale, grid[0], and their offset, grid[1], for every
        i."""
        for i, weight in enumerate(weights):
            value = reader.scaled(weight, grid[0, lanes_at(0, L)])
            value = value + grid[1, lanes_at(0, L)] if reader.has_offset else value
            B.buffer_store(P, value, [k + i, lanes_at(column, L)])

    @T.inline
    def decode_block(P, W, panel, group, kb, k, count):
        """The first `count` inputs of block kb to rows k .. of the panel on the stack."""
        for v in each(tile_vectors):
            grid = T.alloc_buffer((2, L), "float32", scope="local")
            grid[0, lanes_at(0, L)] = reader.scale(W, columns(panel, group, v), kb)
            if reader.has_offset:
                grid[1, lanes_at(0, L)] = reader.offset(W, columns(panel, group, v), kb)
            for u in T.serial(T.int64(count // unit)):
                decode_unit(
                    P,
                    k + u * unit,
                    group * width + v * L,
                    reader.raw(W, columns(panel, group, v), kb, u, unit),
                    grid,
                )
            if count % unit != 0:
                decode_unit(
                    P,
                    k + count // unit * unit,
                    group * width + v * L,
                    reader.raw(W, columns(panel, group, v), kb, T.int64(count // unit), count % unit),
                    grid,
                )

    @T.inline
    def decode_slice(P, W, panel, k0, kn):
        """P[k, n] = weight of input k0 + k, for k < kn; k0 is a multiple of the block."""
        for group in T.serial(T.int64(groups)):
            for kb in T.serial(T.truncdiv(kn, T.int64(block))):
                decode_block(P, W, panel, group, T.truncdiv(k0, T.int64(block)) + kb, kb * block, block)
            if K % block != 0:  # noqa: SIM102 - one is decided here, the other by the kernel
                if k0 + kn == K:
                    decode_block(P, W, panel, group, T.int64(K // block), K // block * block - k0, K % block)

    @T.inline
    def tile(Y, X, W, P, m0, row, rows, panel, k0, kn, R):
        """Adds inputs [k0, k0 + kn) to rows [row, row + R) of the block, as far as they are below `rows`."""
        for group in T.serial(T.int64(groups)):
            acc = T.alloc_buffer((R, tile_vectors, L), "float32", scope="local")
            accumulate(
                acc,
                x_at(X, m0, row, rows, k0),
                weight_at(W, P, panel, group, k0),
                kn,
                R,
                tile_vectors,
                L,
            )
            for r in T.unroll(T.int64(R)):
                if row + r < rows:
                    for v in T.unroll(tile_vectors):
                        column: T.let = panel * n_block + group * width + v * L
                        if slices == 1:
                            result.store(Y, m0 + row + r, column, acc[r, v, lanes_at(0, L)])
                        else:
                            if k0 == 0:
                                result.store(Y, m0 + row + r, column, acc[r, v, lanes_at(0, L)])
                            else:
                                result.store(
                                    Y,
                                    m0 + row + r,
                                    column,
                                    acc[r, v, lanes_at(0, L)] + result.load(Y, m0 + row + r, column),
                                )

    @T.inline
    def tiles_of_rows(Y, X, W, P, m0, rows, panel):
        for s in T.serial(T.int64(slices)):
            kn: T.let = T.min(T.int64(depth), K - s * depth)
            if reader.decoded:
                decode_slice(P, W, panel, s * depth, kn)
            full: T.let = T.truncdiv(rows + (tile_rows - tile_rows // 2 - 1), T.int64(tile_rows))
            for t in T.serial(full):
                tile(Y, X, W, P, m0, t * tile_rows, rows, panel, s * depth, kn, tile_rows)
            if full * tile_rows < rows:
                tile(Y, X, W, P, m0, full * tile_rows, rows, panel, s * depth, kn, tile_rows // 2)

    def not_finite(x: Any) -> Any:
        """Bits that are _EXPONENT exactly where x is an infinity or NaN."""
        return T.bitwise_and(T.reinterpret("int32", x), T.int32(_EXPONENT))

    def decoded(rows: Any) -> Any:
        """Whether there are more rows than are done directly."""
        return T.bool(False) if has_many else rows > few

    def is_split(S: Any, row: Any, M: Any) -> Any:
        """Whether there are digits of a row."""
        split = product.is_split(S, row)
        return T.Select(M > FEW_ROWS, many.is_split(S, row), split) if has_many else split

    @T.inline
    def by_decoding(Y, X, W, S, P, M, m0, rows, panel):
        """More rows than are done directly; else those that take it, one by one."""
        for r in T.serial(T.Select(decoded(rows), T.int64(1), rows)):
            count: T.let = T.Select(decoded(rows), rows, T.int64(1))
            if has_digits:
                if T.Or(decoded(rows), T.Not(is_split(S, m0 + r, M))):
                    tiles_of_rows(Y, X, W, P, m0 + r, count, panel)
            else:
                worst = T.alloc_buffer((1,), "int32", scope="local")
                worst[0] = T.int32(0)
                for kb in T.serial(T.int64(blocks)):
                    worst[0] = T.max(worst[0], not_finite(S[m0 + r, kb]))
                if rows > few or worst[0] == _EXPONENT:
                    tiles_of_rows(Y, X, W, P, m0 + r, count, panel)

    # The script has a fixed number of parameters; those beyond the reader's are dropped below.
    taken = len(reader.operands)
    operands = (*reader.operands, *(reader.operands[-1],) * (3 - taken))

    @T.prim_func(s_tir=True)
    def func(
        y: T.handle("float32"),
        x: T.handle("float32"),
        digits: T.handle("int32"),
        weight0: T.handle(operands[0].dtype),
        weight1: T.handle(operands[1].dtype),
        weight2: T.handle(operands[2].dtype),
        block_sums: T.handle("float32"),
        bias: T.handle("float32"),
        residual: T.handle("float32"),
        factor: T.handle("float32"),
        M: T.int64,
        begin: T.int64,
        end: T.int64,
    ):
        T.func_attr({"global_symbol": symbol, "tirx.noalias": True})
        Y = T.decl_buffer((M * N,), "float32", data=y)
        X = T.decl_buffer((M * K,), "float32", data=x)
        W0 = T.decl_buffer(operands[0].shape, operands[0].dtype, data=weight0)
        W1 = (
            T.decl_buffer(operands[1].shape, operands[1].dtype, data=weight1)
            if taken > 1
            else T.meta_var(None)
        )
        W2 = (
            T.decl_buffer(operands[2].shape, operands[2].dtype, data=weight2)
            if taken > 2
            else T.meta_var(None)
        )
        W = T.meta_var((W0, W1, W2))
        S0 = T.decl_buffer((M, blocks), "float32", data=block_sums) if has_sums else T.meta_var(None)
        S = T.decl_buffer((UNBOUNDED,), "int32", data=digits) if has_digits else T.meta_var(S0)
        bias_row = T.decl_buffer((N,), "float32", data=bias) if "bias" in epilogue else T.meta_var(None)
        R = T.decl_buffer((M * N,), "float32", data=residual) if "residual" in epilogue else T.meta_var(None)
        F = T.decl_buffer((M * N,), "float32", data=factor) if "factor" in epilogue else T.meta_var(None)
        of_epilogue = T.meta_var({"bias": bias_row, "residual": R, "factor": F})
        P = T.alloc_buffer((depth, n_block), "float32") if reader.decoded else T.meta_var(None)
        for b in T.serial(end - begin):
            m0: T.let = T.truncdiv(begin + b, T.int64(panels)) * m_block
            panel: T.let = T.truncmod(begin + b, T.int64(panels))
            rows: T.let = T.min(T.int64(m_block), M - m0)
            if has_many:
                if M > FEW_ROWS:
                    many.chunk(Y, S, W, m0, rows, panel)
                else:
                    product.chunk(Y, S, W, m0, rows, panel)
            elif in_digits:
                if rows <= few:
                    product.chunk(Y, S, W, m0, rows, panel)
            elif rows == 1:
                direct(Y, X, W, S, m0, rows, panel, 1)
            elif rows == 2:
                direct(Y, X, W, S, m0, rows, panel, 2)
            elif rows <= _DIRECT_ROWS:
                direct(Y, X, W, S, m0, rows, panel, _DIRECT_ROWS)
            elif not again:
                tiles_of_rows(Y, X, W, P, m0, rows, panel)
            if again:
                by_decoding(Y, X, W, S, P, M, m0, rows, panel)
            result.finish(Y, of_epilogue, m0, rows, panel)

    unused = {f"weight{i}" for i in range(taken, len(operands))}
    unused |= set() if has_sums else {"block_sums"}
    unused |= set() if has_digits else {"digits"}
    return drop_parameters(func, unused | (set(EPILOGUE_OPERANDS) - set(epilogue)))
