"""Products of float32 activations, split into three digits (split_digits.py), and low-bit weights, in
integers.

A block's product is sum_d 2^8d (digits d . weights), its three sums exact in 32 bits: the float32 product with
inputs rounded at 2^-23 of the block's largest, and no rounding of products or sums within the block, where
float32 arithmetic has one of 2^-24 for every input. (Integer digits in place of floating point: Ozaki,
Ogita, Oishi and Rump 2012; on units for int8: Ootomo, Ozaki and Yokota 2024.)
"""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.digits import DIGITS, DigitRows
from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels.dot import multiply_add
from qgraph.codegen.kernels.epilogue import Result
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.vector import f32, lanes_at, prefetch, splat
from qgraph.codegen.kernels.vmath import Expr, const_like, named
from qgraph.codegen.kernels.weights import Columns
from qgraph.codegen.kernels.weights_bytes import open_bytes
from qgraph.codegen.packing import LANES
from qgraph.codegen.spec import KernelSpec
from qgraph.formats import FORMATS
from qgraph.formats.nvfp4 import NVFP4

import os
_UNROLLED = 4
def tune():
    global _CHAINS,_TILES,_AHEAD,_AHEAD_ROWS,_VECTORS,_UNROLLED
    g=lambda n,d:int(os.environ.get(n,d))
    _TILES = {16: (g("TR",4), g("TV",2)), 8: (2, 2)}
    _CHAINS = g("CH",2)
    _VECTORS = g("TVM",1)
    _AHEAD = g("AHEAD", 32)
    _AHEAD_ROWS = g("AHEADR", 2)
    _UNROLLED = g("UNR",4)
tune()


class DigitProduct:
    """Emits the sums of products of a kernel's rows.

    Attributes:
        most: rows of a chunk that are done this way; 0 where the ISA has no use for it.
        rows: how the digits lie.
    """

    def __init__(self, weight_format: str, spec: KernelSpec, isa: Isa, result: Result) -> None:
        K, N = spec["k"], spec["n"]
        block = 0 if weight_format == NVFP4.name else spec["block"]
        self._reader = open_bytes(weight_format, K, N, isa, block)
        self._offset, self._isa, self._result = FORMATS[weight_format].offset, isa, result
        self.rows = DigitRows(self._reader.input, K)
        self._per_word = 4 * self._reader.input.fields  # inputs
        self._words = self._reader.operands[0].shape[1]  # a column's
        self.most = {"vnni": int(os.environ.get("MOST", 128)), "maddubs": 8}.get(isa.dot, 0)

    def chunk(self, X: Any, W: Any, Y: Any, m0: Expr, rows: Expr, panel: Expr) -> None:
        """Rows m0 .. m0 + rows - 1 of a panel; X are digits, a flat buffer, W the weight's buffers."""
        self._x, self._w, self._y = X, W, Y
        most, _ = _TILES[self._isa.lanes]
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
        most, vectors = _TILES[lanes]
        if R == most:
            vectors = _VECTORS if R > 2 else vectors
        while n_block % (vectors * lanes):
            vectors //= 2
        per_block = reader.input.block // self._per_word
        at = [B.bind(first + T.min(index(r), rows - 1)) for r in range(R)]
        starts = [B.bind(m * self.rows.words) for m in at]
        every = lanes_at(index(0), lanes)
        with B.serial(index(n_block // (vectors * lanes))) as group:
            column = B.bind(panel * n_block + group * (vectors * lanes))
            acc = B.alloc_buffer((R, vectors, lanes), "float32", scope="local")
            for r, v in product(range(R), range(vectors)):
                B.buffer_store(acc, f32(0, lanes), [index(r), index(v), every])
            whole, rest = divmod(self._words, per_block)
            if whole:
                with B.serial(index(whole)) as kb:
                    self._block(acc, starts, [self._columns(column, v) for v in range(vectors)], kb, per_block)
            if rest:
                self._block(acc, starts, [self._columns(column, v) for v in range(vectors)], index(whole), rest)
            unit = reader.unit(self._w)
            for r in range(R):
                with B.If(index(r) < rows), B.Then():
                    for v in range(vectors):
                        value = acc[index(r), index(v), every]
                        if unit is not None:
                            value = value * splat(unit, lanes)
                        self._result.store(self._y, at[r], column + v * lanes, value)

    def _columns(self, first: Expr, v: int) -> Columns:
        """Those of vector v of a group; beyond the last tile, of the last (its sums are dropped)."""
        start = first + v * self._isa.lanes
        tile = T.truncdiv(start, index(LANES))
        if self._result.ragged:
            tile = T.min(tile, index(-(-self._result.N // LANES) - 1))
        return Columns(tile, lanes_at(T.truncmod(start, index(LANES)), self._isa.lanes))

    def total(self, X: Any, row: Expr, kb: Expr) -> Expr:
        """The sum of a block's inputs, float32."""
        return self._extra(X, row * self.rows.words, kb, self.rows.TOTAL) * T.float32(1 / self._reader.input.factor)

    def whole(self, X: Any, row: Expr) -> Expr:
        """Whether a row could be split."""
        return X[row * self.rows.words + self.rows.flag] != 0

    def _extra(self, X: Any, row: Expr, kb: Expr, which: int) -> Expr:
        value = X[row + kb * self.rows.record + self.rows.extra + which]
        return value if which in (self.rows.HIGH, self.rows.LOW) else T.reinterpret("float32", value)

    def _block(self, acc: Any, at: list[Expr], columns: list[Columns], kb: Expr, words: int) -> None:
        """acc += the share of the first `words` words of block kb."""
        lanes, reader, R = self._isa.lanes, self._reader, len(at)
        first = kb * (reader.input.block // self._per_word)
        every, unrolled = lanes_at(index(0), lanes), min(_UNROLLED, words)
        records = [row + kb * self.rows.record for row in at]
        extra = [{which: named(self._extra(self._x, row, kb, which)) for which in range(4)} for row in at]
        chains = _CHAINS if R == 1 and words > unrolled else 1
        for v, place in enumerate(columns):
            dots = B.alloc_buffer((R, DIGITS, chains, lanes), "int32", scope="local")
            for r, d, c in product(range(R), range(DIGITS), range(chains)):
                start = T.int32(0)
                if reader.input.offset and not c and d != 1:
                    start = extra[r][self.rows.LOW if d else self.rows.HIGH]
                B.buffer_store(dots, splat(start, lanes), [index(r), index(d), index(c), every])

            def add(word: Any, count: int, place: Columns = place, dots: Any = dots) -> None:
                self._add_words(dots, records, place, first, word, count, chains)

            if words > unrolled:
                with B.serial(index(words // unrolled)) as u:
                    add(u * unrolled, unrolled)
            else:
                add(index(0), unrolled)
            if rest := words % unrolled:
                add(index(words // unrolled * unrolled), rest)
            if int(os.environ.get("SA","0")):
                prefetch(self._w[1], (place.tile, kb + int(os.environ["SA"]), index(0)))
            scales = [named(scale) for scale in reader.scales(self._w, place, kb)]
            for r in range(R):
                here = [index(r), index(v), every]
                parts = []
                for d in range(DIGITS):
                    part = dots[index(r), index(d), index(0), every]
                    for c in range(1, chains):
                        part = part + dots[index(r), index(d), index(c), every]
                    parts.append(part)
                B.buffer_store(acc, self._share(acc[here], parts, extra[r], scales), here)

    def _share(self, acc: Expr, parts: list[Expr], extra: dict[int, Expr], scales: list[Expr]) -> Expr:
        """acc plus a block's share, `parts` its sums of products digit by digit."""
        lanes, rows = self._isa.lanes, self.rows
        # The two low digits fit an integer.
        low: Any = T.shift_left(parts[1], const_like(parts[1], 8)) + parts[2]
        high, low = _float(parts[0]), _float(low)
        if self._offset == "zero_point":  # all exact, in blocks of at most 32
            high = T.fma(splat(T.cast(T.int32(0) - extra[rows.HIGH], "float32"), lanes), scales[1], high)
            low = T.fma(splat(T.cast(T.int32(0) - extra[rows.LOW], "float32"), lanes), scales[1], low)
        value = T.fma(high, f32(65536, lanes), low) * splat(extra[rows.SCALE], lanes)
        acc = T.fma(value, scales[0], acc)
        if self._offset == "mean":
            acc = T.fma(splat(extra[rows.TOTAL], lanes), scales[1], acc)
        return acc

    def _add_words(
        self, dots: Any, records: list[Expr], place: Columns, first: Expr, word: Expr, count: int, chains: int
    ) -> None:
        """dots += products of words word .. word + count - 1 of the block that begins at word `first`."""
        reader, codes = self._reader, self._w[0]
        fields: list[Expr] = []
        for i in range(count):
            if len(records) >= _AHEAD_ROWS:
                prefetch(codes, (place.tile, first + word + i + _AHEAD, index(0)))
            fields += map(named, reader.bytes(named(codes[place.tile, first + word + i, place.lanes])))
        # One field after the other goes into all sums, where there is no need to have several at once.
        step = 1 if self._isa.dot == "vnni" else len(fields)
        for t, (r, record), d in product(range(0, len(fields), step), enumerate(records), range(DIGITS)):
            start = record + d * (reader.input.block // 4) + word * reader.input.fields + t
            weights = fields[t : t + step]
            inputs = [self._x[start + i] for i in range(len(weights))]
            here = [index(r), index(d), index(t % chains), lanes_at(index(0), self._isa.lanes)]
            B.buffer_store(dots, multiply_add(self._isa, dots[here], weights, inputs, reader.largest), here)


def _float(value: Expr) -> Expr:
    return T.cast(value, f"float32x{value.ty.dtype.lanes}")
