"""x @ W in integers: int8 activations (quantize_int8.py) by low-bit weights, `matmul_<format>_a8`.

Weights are unpacked to bytes in registers and multiplied there (weights_bytes.py, dot.py). A block's sum of
products is exact, in 32 bits; the sum over blocks is float32, one fused multiply-add after the other from the
first block to the last. So a row's result depends on nothing but the row, not even on the instruction set.

Block b of the grid is chunk b // panels of `m_block` rows and panel b % panels of `n_block` columns. Rows go
through a panel _ROWS at a time, so that weights are unpacked once for so many.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise, product
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.int8_input import int8_input
from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels import kernel
from qgraph.codegen.kernels.dot import multiply_add
from qgraph.codegen.kernels.epilogue import Result, epilogue_pointers
from qgraph.codegen.kernels.function import function
from qgraph.codegen.kernels.gemm import each_vector
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.vector import f32, lanes_at, prefetch, splat
from qgraph.codegen.kernels.vmath import Expr, named
from qgraph.codegen.kernels.weights import Columns
from qgraph.codegen.kernels.weights_bytes import ByteReader, open_bytes
from qgraph.codegen.packing import LANES
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import QGraphError
from qgraph.formats import FORMATS

# By lanes of the ISA: rows at most that share unpacked weights. Columns are done tile by tile, the order that
# weights lie in: memory is read as one stream.
_ROWS = {16: 8, 8: 4, 4: 4}
_UNROLLED = 4  # words of a block that are unrolled
_FIELDS = 4  # vectors of weights that all rows are multiplied by before the next are unpacked
# Words, of 16 columns 64 bytes, that are asked for ahead: a page, beyond which the hardware does not look by
# itself. Half as many read a tenth less a second, twice as many the same or a little less.
_AHEAD = 64


def _matmul_int8(weight_format: str, spec: KernelSpec, isa: Isa, symbol: str) -> Any:
    """y = epilogue((codes * scale) @ dequantize(W)), codes and scale what `quantize_int8` makes of x.

    Spec: k, n, n_block (multiple of 16), m_block, epilogue, of group formats block: as of `matmul_<format>`.
    Arguments: y f32 [M, n], codes i8 [M, B block], scale f32 [M], block_sums i32 [M, B], the weight's as in
    `matmul_<format>`, those of the epilogue (epilogue.py), M, begin, end.
    Blocks: ceil(M/m_block) * ceil(n/n_block).
    """
    K, N, n_block, m_block = spec["k"], spec["n"], spec["n_block"], spec["m_block"]
    result = Result(N, n_block, isa.lanes, spec["epilogue"])
    if min(K, N, m_block) < 1 or n_block < LANES or n_block % LANES or not result.known:
        raise QGraphError(f"{spec.op}: cannot build {dict(spec.params)}")
    block = 0 if weight_format == "nvfp4" else spec["block"]
    reader = open_bytes(weight_format, K, N, isa, block)
    names = [f"weight{i}" for i in range(len(reader.operands))]
    pointers = [
        ("y", "float32"),
        ("codes", "int32"),  # four at a time
        ("scale", "float32"),
        ("block_sums", "int32"),
        *((name, operand.dtype) for name, operand in zip(names, reader.operands, strict=True)),
        *epilogue_pointers(spec["epilogue"]),
    ]
    panels = -(-N // n_block)
    with function(symbol, pointers, ["M"]) as f:
        weights = [
            B.decl_buffer(operand.shape, operand.dtype, data=f.buffers[name].data)
            for name, operand in zip(names, reader.operands, strict=True)
        ]
        emit = _Product(f.buffers, weights, reader, result, isa, K)
        with B.serial(f.scalars["begin"], f.scalars["end"]) as b:
            m0 = B.bind(T.truncdiv(b, index(panels)) * m_block)
            panel = B.bind(T.truncmod(b, index(panels)))
            rows = B.bind(T.min(index(m_block), f.scalars["M"] - m0))
            emit.chunk(m0, rows, panel)
            result.finish(f.buffers["y"], f.buffers, m0, rows, panel)
    return f.result


for _name in FORMATS:
    if int8_input(_name):
        kernel(f"{FORMATS[_name].kernel}_a8")(partial(_matmul_int8, _name))


class _Product:
    """Emits the sums of products of a kernel."""

    def __init__(
        self,
        buffers: dict[str, Any],
        weights: list[Any],
        reader: ByteReader,
        result: Result,
        isa: Isa,
        K: int,
    ) -> None:
        self._buffers, self._weights, self._reader = buffers, weights, reader
        self._result, self._isa = result, isa
        self._per_word = 4 * reader.input.fields  # inputs
        self._blocks = -(-K // reader.input.block)
        self._words = reader.operands[0].shape[1]  # a column's

    def chunk(self, m0: Expr, rows: Expr, panel: Expr) -> None:
        """Rows m0 .. m0 + rows - 1 of a panel."""
        most = _ROWS[self._isa.lanes]
        sizes = [size for size in (1, 2, 4, 8) if size <= most]
        full = B.bind(T.truncdiv(rows + (most - most // 2 - 1), index(most)))
        with B.serial(full) as c:
            self._rows(B.bind(m0 + c * most), B.bind(T.min(rows - c * most, index(most))), panel, most)
        left = B.bind(rows - full * most)
        for low, size in pairwise([0, *sizes[:-1]]):
            with B.If(T.And(left > low, left <= size)), B.Then():
                self._rows(B.bind(m0 + full * most), left, panel, size)

    def _rows(self, first: Expr, rows: Expr, panel: Expr, R: int) -> None:
        """Rows first .. first + rows - 1, at most R of them; the rest repeat the last one and are dropped."""
        lanes, reader, n_block = self._isa.lanes, self._reader, self._result.n_block
        vectors = LANES // lanes
        per_block = reader.input.block // self._per_word
        at = [B.bind(first + T.min(index(r), rows - 1)) for r in range(R)]
        every = lanes_at(index(0), lanes)
        with B.serial(index(n_block // LANES)) as tile:
            column = B.bind(panel * n_block + tile * LANES)
            acc = B.alloc_buffer((R, vectors, lanes), "float32", scope="local")
            for r, v in product(range(R), range(vectors)):
                B.buffer_store(acc, f32(0, lanes), [index(r), index(v), every])
            whole, rest = divmod(self._words, per_block)
            if whole:
                with B.serial(index(whole)) as kb:
                    self._block(acc, at, column, kb, per_block)
            if rest:
                self._block(acc, at, column, index(whole), rest)
            unit = reader.unit(self._weights)
            for r in range(R):
                with B.If(index(r) < rows), B.Then():
                    for v in range(vectors):
                        value = acc[index(r), index(v), every]
                        if unit is not None:
                            value = value * splat(unit, lanes)
                        value = value * splat(self._buffers["scale"][at[r]], lanes)
                        self._result.store(self._buffers["y"], at[r], column + v * lanes, value)

    def _block(self, acc: Any, at: list[Expr], column: Expr, kb: Expr, words: int) -> None:
        """acc += the share of the first `words` words of block kb, of a tile that begins with `column`."""
        lanes, reader = self._isa.lanes, self._reader
        first = kb * (reader.input.block // self._per_word)
        every, unrolled = lanes_at(index(0), lanes), min(_UNROLLED, words)
        sums = [named(self._buffers["block_sums"][row * self._blocks + kb]) for row in at]
        for v in each_vector(self._isa, LANES // lanes):
            place = self._result.columns(column + v * lanes)
            dots = B.alloc_buffer((len(at), lanes), "int32", scope="local")
            for r in range(len(at)):
                start = sums[r] if reader.input.offset else T.int32(0)
                B.buffer_store(dots, splat(start, lanes), [index(r), every])
            with B.serial(index(words // unrolled)) as u:
                self._add_words(dots, at, place, first + u * unrolled, unrolled)
            if rest := words % unrolled:
                self._add_words(dots, at, place, first + words // unrolled * unrolled, rest)
            scales = [named(scale) for scale in reader.scales(self._weights, place, kb)]
            for r in range(len(at)):
                here = [index(r), v, every]
                B.buffer_store(acc, reader.add(acc[here], dots[index(r), every], sums[r], scales), here)

    def _add_words(self, dots: Any, at: list[Expr], place: Columns, row: Expr, count: int) -> None:
        """dots += products of words row .. row + count - 1."""
        reader, codes, every = self._reader, self._weights[0], lanes_at(index(0), self._isa.lanes)
        stride, each = self._blocks * reader.input.block // 4, reader.input.fields
        for first in range(0, count, _FIELDS // each):
            fields: list[Expr] = []
            for i in range(first, min(first + _FIELDS // each, count)):
                prefetch(codes, (place.tile, row + i + _AHEAD, index(0)), level=2)
                fields += map(named, reader.bytes(named(codes[place.tile, row + i, place.lanes])))
            for r, m in enumerate(at):
                start = m * stride + (row + first) * each
                inputs = [self._buffers["codes"][start + t] for t in range(len(fields))]
                total = multiply_add(self._isa, dots[index(r), every], fields, inputs, reader.largest)
                B.buffer_store(dots, total, [index(r), every])
