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

from qgraph.codegen.int8_input import int8_input
from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels.dot import multiply_add
from qgraph.codegen.kernels.epilogue import Result
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.split_digits import DIGITS
from qgraph.codegen.kernels.vector import f32, lanes_at, prefetch, splat
from qgraph.codegen.kernels.vmath import Expr, const_like, named
from qgraph.codegen.kernels.weights import Columns
from qgraph.codegen.kernels.weights_bytes import open_bytes
from qgraph.codegen.packing import LANES
from qgraph.codegen.spec import KernelSpec
from qgraph.formats import FORMATS
from qgraph.formats.nvfp4 import NVFP4

import os
_TILES = {16: (int(os.environ.get("TR", 4)), int(os.environ.get("TV", 2))), 8: (2, 2)}
_UNROLLED = 4
_AHEAD = int(os.environ.get("AHEAD", 32))
_AHEAD_ROWS = int(os.environ.get("AHEADR", 2))


class DigitProduct:
    """Emits the sums of products of a kernel's rows.

    Attributes:
        most: rows of a chunk that are done this way; 0 where the ISA has no use for it.
    """

    def __init__(self, weight_format: str, spec: KernelSpec, isa: Isa, result: Result) -> None:
        K, N = spec["k"], spec["n"]
        block = 0 if weight_format == NVFP4.name else spec["block"]
        self.reader = open_bytes(weight_format, K, N, isa, block)
        self._offset, self._isa, self._result = FORMATS[weight_format].offset, isa, result
        self._per_word = 4 * self.reader.input.fields  # inputs
        self._blocks = -(-K // self.reader.input.block)
        self._words = self.reader.operands[0].shape[1]  # a column's
        self.most = {"vnni": int(os.environ.get("MOST", 128)), "maddubs": 8}.get(isa.dot, 0)

    def chunk(self, X: tuple[Any, ...], W: Any, Y: Any, m0: Expr, rows: Expr, panel: Expr) -> None:
        """Rows m0 .. m0 + rows - 1 of a panel; X are digits, scale and sums, W the weight's buffers."""
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
        lanes, reader, n_block = self._isa.lanes, self.reader, self._result.n_block
        most, vectors = _TILES[lanes]
        if R == most:
            vectors = 1 if R > 2 else vectors
        while n_block % (vectors * lanes):
            vectors //= 2
        per_block = reader.input.block // self._per_word
        at = [B.bind(first + T.min(index(r), rows - 1)) for r in range(R)]
        every = lanes_at(index(0), lanes)
        with B.serial(index(n_block // (vectors * lanes))) as group:
            column = B.bind(panel * n_block + group * (vectors * lanes))
            acc = B.alloc_buffer((R, vectors, lanes), "float32", scope="local")
            for r, v in product(range(R), range(vectors)):
                B.buffer_store(acc, f32(0, lanes), [index(r), index(v), every])
            whole, rest = divmod(self._words, per_block)
            if whole:
                with B.serial(index(whole)) as kb:
                    self._block(acc, at, [self._columns(column, v) for v in range(vectors)], kb, per_block)
            if rest:
                self._block(acc, at, [self._columns(column, v) for v in range(vectors)], index(whole), rest)
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

    def total(self, X: tuple[Any, ...], row: Expr, kb: Expr) -> Expr:
        """The sum of a block's inputs, float32."""
        at = row * self._blocks + kb
        sums = [X[2][at * DIGITS + d] for d in range(DIGITS)]
        return total_of(sums) * X[1][at] * T.float32(1 / self.reader.input.factor)

    def _sums(self, row: Expr, kb: Expr) -> list[Expr]:
        return [named(self._x[2][(row * self._blocks + kb) * DIGITS + d]) for d in range(DIGITS)]

    def _block(self, acc: Any, at: list[Expr], columns: list[Columns], kb: Expr, words: int) -> None:
        """acc += the share of the first `words` words of block kb."""
        lanes, reader = self._isa.lanes, self.reader
        first = kb * (reader.input.block // self._per_word)
        every, unrolled = lanes_at(index(0), lanes), min(_UNROLLED, words)
        needed = reader.input.offset or self._offset != "none"
        sums = [self._sums(row, kb) if needed else [] for row in at]
        units = [named(self._x[1][row * self._blocks + kb]) for row in at]
        for v, place in enumerate(columns):
            dots = B.alloc_buffer((len(at), DIGITS, lanes), "int32", scope="local")
            for r, d in product(range(len(at)), range(DIGITS)):
                start = sums[r][d] if reader.input.offset else T.int32(0)
                B.buffer_store(dots, splat(start, lanes), [index(r), index(d), every])
            if words > unrolled:
                with B.serial(index(words // unrolled)) as u:
                    self._add_words(dots, at, place, first + u * unrolled, unrolled)
            else:
                self._add_words(dots, at, place, first, unrolled)
            if rest := words % unrolled:
                self._add_words(dots, at, place, first + words // unrolled * unrolled, rest)
            scales = [named(scale) for scale in reader.scales(self._w, place, kb)]
            for r in range(len(at)):
                here = [index(r), index(v), every]
                parts = [dots[index(r), index(d), every] for d in range(DIGITS)]
                B.buffer_store(acc, self._share(acc[here], parts, sums[r], units[r], scales), here)

    def _share(
        self, acc: Expr, parts: list[Expr], sums: list[Expr], unit: Expr, scales: list[Expr]
    ) -> Expr:
        """acc plus a block's: `parts` its sums of products and `sums` of inputs, digit by digit."""
        lanes = self._isa.lanes
        # The two low digits fit an integer.
        low = _float(T.shift_left(parts[1], const_like(parts[1], 8)) + parts[0])
        high = _float(parts[2])
        if self._offset == "zero_point":  # which the codes of inputs are all above: exact, of few enough
            low = T.fma(splat(T.cast(T.int32(0) - (sums[1] * 256 + sums[0]), "float32"), lanes), scales[1], low)
            high = T.fma(splat(T.cast(T.int32(0) - sums[2], "float32"), lanes), scales[1], high)
        value = T.fma(high, f32(65536, lanes), low) * splat(unit, lanes)
        acc = T.fma(value, scales[0], acc)
        if self._offset == "mean":
            acc = T.fma(splat(total_of(sums) * unit, lanes), scales[1], acc)
        return acc

    def _add_words(self, dots: Any, at: list[Expr], place: Columns, row: Expr, count: int) -> None:
        """dots += products of words row .. row + count - 1."""
        reader, codes = self.reader, self._w[0]
        fields: list[Expr] = []
        for i in range(count):
            if len(at) >= _AHEAD_ROWS:
                prefetch(codes, (place.tile, row + i + _AHEAD, index(0)))
            fields += map(named, reader.bytes(named(codes[place.tile, row + i, place.lanes])))
        stride = self._blocks * reader.input.block // 4
        for (r, m), d in product(enumerate(at), range(DIGITS)):
            start = (m * DIGITS + d) * stride + row * reader.input.fields
            inputs = [self._x[0][start + t] for t in range(len(fields))]
            here = [index(r), index(d), lanes_at(index(0), self._isa.lanes)]
            B.buffer_store(dots, multiply_add(self._isa, dots[here], fields, inputs, reader.largest), here)


def total_of(sums: list[Expr]) -> Expr:
    """The sum of a block's integers by the sums of its digits, float32."""
    low = T.cast(sums[1] * 256 + sums[0], "float32")
    return T.fma(T.cast(sums[2], "float32"), T.float32(65536), low)


def _float(value: Expr) -> Expr:
    return T.cast(value, f"float32x{value.ty.dtype.lanes}")


def has_digits(weight_format: str, packing: str = "") -> bool:
    """Whether a format's weights are multiplied by digits."""
    return int8_input(weight_format) is not None and packing != "base3"

