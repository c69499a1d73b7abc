"""Products of float32 activations, split into three digits (split_digits.py), with low-bit weights, in
integers: a part of matmul.py.

A block's product is 65536 a . w + 256 b . w + c . w, for its digits a, b, c and the bytes w that weights
are unpacked to in registers (weights_bytes.py), each of the three exact in 32 bits. So inputs are rounded
once, to 2^-23 of the largest of the block, and neither products nor their sums within the block are, which
float32 arithmetic rounds to 2^-24 input by input. It takes three multiplications of bytes where float32 takes
four of floats, and no conversion. (Integer digits for floats, the largest of a block setting their unit:
Ozaki, Ogita, Oishi, Rump 2012; on int8 units: Ootomo, Ozaki, Yokota 2024.)

Products of many rows may have fewer digits: two are a . w and b . w alone, one a . w, of inputs that are
rounded to 2^-16 or 2^-8 of the largest of the block (`digits` of a kernel's spec).

The sum over blocks is float32, one fused multiply-add after the other from the first block to the last. So a
row's result depends on nothing but the row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.digits import DIGITS, DigitRows, digit_rows, many_digits
from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels.dot import multiply_add
from qgraph.codegen.kernels.epilogue import Result
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.vector import f32, lanes_at, prefetch, splat
from qgraph.codegen.kernels.vmath import Expr, const_like, convert, named
from qgraph.codegen.kernels.weights import Columns
from qgraph.codegen.kernels.weights_bytes import ByteReader, open_bytes
from qgraph.codegen.spec import KernelSpec
from qgraph.formats import FORMATS

# By how the ISA multiplies bytes, rows of a chunk that are done this way at most. VNNI is faster than float32
# at any number of them, AVX2 until decoding to the stack pays; without either it is not worth it.
_MOST = {"vnni": 1 << 30, "maddubs": 8, "halves": 0, "widen": 0}
_ROWS = {3: 4, 2: 6, 1: 12}  # that share unpacked weights, by digits: registers hold 12 sums and the weights
_UNROLLED = 4  # words of a block that are unrolled
_AHEAD = 64  # words, of 16 columns 64 bytes, that are asked for ahead (see matmul_int8.py)
_LONG = 8  # fields of a block from which a row alone has two sums a digit, as one has to wait for itself


def open_digits(weight_format: str, spec: KernelSpec, isa: Isa, result: Result) -> Products | None:
    """What multiplies by digits in the kernel of `spec`; None if its weight is read as floats only.

    Of the spec: k, n; of a group format block, and of `ternary` packing; digits, if many rows have fewer than
    three.
    """
    block = spec["block"] if "block" in dict(spec.params) else 0
    packing = spec["packing"] if weight_format == "ternary" else ""
    rows, count = digit_rows(weight_format, packing, spec["k"], block), many_digits(spec, isa)
    if rows is None:
        return None
    reader = open_bytes(weight_format, spec["k"], spec["n"], isa, block)
    few, many = (
        DigitProduct(replace(rows, digits=digits), reader, weight_format, isa, result)
        for digits in (DIGITS, count)
    )
    return Products(few, many if count != DIGITS else None)


@dataclass(frozen=True)
class Products:
    """Those of a kernel: `few`, whose rows have three digits, and, where it is not None, `many`, for calls of
    more than FEW_ROWS rows."""

    few: DigitProduct
    many: DigitProduct | None


class DigitProduct:
    """Emits products of rows.

    Attributes:
        most: rows of a chunk that are done this way with three digits, at most; 0 where the ISA has no use
            for it.
    """

    def __init__(
        self, rows: DigitRows, reader: ByteReader, weight_format: str, isa: Isa, result: Result
    ) -> None:
        self._rows, self._reader, self._isa, self._result = rows, reader, isa, result
        self._offset = FORMATS[weight_format].offset
        self._per_block = reader.input.block // (4 * reader.input.fields)  # words
        self._digits, self._chunk = rows.digits, _ROWS[rows.digits]
        self.most = _MOST[isa.dot]

    @property
    def starts(self) -> dict[int, int]:
        """What sums of products start from, as bytes are too large by the offset: digit -> one of the four
        words behind a block, of all but the first of three digits with the last."""
        if not self._reader.input.offset:
            return {}
        high = {0: self._rows.HIGH} if self._digits == DIGITS else {}
        return high | {self._digits - 1: self._rows.LOW}

    def is_split(self, X: Any, row: Expr) -> Expr:
        """Whether the digits of a row, of the flat buffer X of digits, are what it is."""
        return X[row * self._rows.words + self._rows.flag] != 0

    def total(self, X: Any, row: Expr, kb: Expr) -> Expr:
        """The sum of the inputs of block kb, float32."""
        total = self.extra(X, row, kb)[self._rows.TOTAL]
        return total * T.float32(1 / self._reader.input.factor)

    def chunk(self, Y: Any, X: Any, W: Any, m0: Expr, rows: Expr, panel: Expr) -> None:
        """Stores rows m0 .. m0 + rows - 1 of a panel to Y, without epilogue; W are the weight's buffers."""
        size = self._chunk
        full = B.bind(T.truncdiv(rows + (size - size // 2 - 1), index(size)))
        with B.serial(full) as c:
            first = B.bind(m0 + c * size)
            self._some(Y, X, W, first, B.bind(T.min(rows - c * size, index(size))), panel, size)
        left = B.bind(rows - full * size)
        for low, high in pairwise((0, 1, size // 2)):
            with B.If(T.And(left > low, left <= high)), B.Then():
                self._some(Y, X, W, B.bind(m0 + full * size), left, panel, high)

    def _some(self, Y: Any, X: Any, W: Any, first: Expr, rows: Expr, panel: Expr, R: int) -> None:
        """Rows first .. first + rows - 1, at most R of them; the rest repeat the last one and are dropped."""
        lanes, n_block = self._isa.lanes, self._result.n_block
        at = [B.bind(first + T.min(index(r), rows - 1)) for r in range(R)]
        starts = [B.bind(row * self._rows.words) for row in at]
        every = lanes_at(index(0), lanes)
        with B.serial(index(n_block // lanes)) as vector:
            column = B.bind(panel * n_block + vector * lanes)
            place = self._result.columns(column)
            acc = B.alloc_buffer((R, lanes), "float32", scope="local")
            for r in range(R):
                B.buffer_store(acc, f32(0, lanes), [index(r), every])
            whole, rest = divmod(self._reader.operands[0].shape[1], self._per_block)
            if whole:
                with B.serial(index(whole)) as kb:
                    self._block(acc, X, W, starts, place, kb, self._per_block)
            if rest:
                self._block(acc, X, W, starts, place, index(whole), rest)
            for r in range(R):
                with B.If(index(r) < rows), B.Then():
                    self._result.store(Y, at[r], column, acc[index(r), every])

    def extra(self, X: Any, row: Expr, kb: Expr) -> list[Expr]:
        """The four words behind the digits of block kb."""
        return self._extra(X, row * self._rows.words + kb * self._rows.record)

    def _extra(self, X: Any, record: Expr) -> list[Expr]:
        rows = self._rows
        words = [X[record + rows.extra + i] for i in range(4)]
        return [
            T.reinterpret("float32", w) if i in (rows.SCALE, rows.TOTAL) else w for i, w in enumerate(words)
        ]

    def _block(
        self, acc: Any, X: Any, W: Any, starts: list[Expr], place: Columns, kb: Expr, words: int
    ) -> None:
        """acc += the share of the first `words` words of block kb, of the rows that begin at `starts`."""
        lanes, reader, rows, R = self._isa.lanes, self._reader, self._rows, len(starts)
        every, unrolled = lanes_at(index(0), lanes), min(_UNROLLED, words)
        records = [B.bind(start + kb * rows.record) for start in starts]
        extra = [[named(word) for word in self._extra(X, record)] for record in records]
        long = words * reader.input.fields >= _LONG
        chains = 2 if R == 1 and long and self._isa.dot == "vnni" else 1
        dots = B.alloc_buffer((R, self._digits, chains, lanes), "int32", scope="local")
        for r, d, c in product(range(R), range(self._digits), range(chains)):
            start: Expr = T.int32(0)
            if c == 0 and d in self.starts:
                start = extra[r][self.starts[d]]
            B.buffer_store(dots, splat(start, lanes), [index(r), index(d), index(c), every])

        def add(word: Expr, count: int) -> None:
            self._add_words(dots, X, W, records, place, kb, word, count)

        if words > unrolled:
            with B.serial(index(words // unrolled)) as u:
                add(u * unrolled, unrolled)
        else:
            add(index(0), unrolled)
        if rest := words % unrolled:
            add(index(words - rest), rest)
        scales = [named(scale) for scale in reader.scales(W, place, kb)]
        if (unit := reader.unit(W)) is not None:  # rounded where dequantizing rounds
            scales[0] = named(scales[0] * splat(unit, lanes))
        for r in range(R):
            parts = [
                sum(
                    (dots[index(r), index(d), index(c), every] for c in range(1, chains)),
                    start=dots[index(r), index(d), index(0), every],
                )
                for d in range(self._digits)
            ]
            here = [index(r), every]
            B.buffer_store(acc, self.share(acc[here], parts, extra[r], scales), here)

    def share(self, acc: Expr, parts: list[Expr], extra: list[Expr], scales: list[Expr]) -> Expr:
        """acc plus a block's share: `parts` its sums of products digit by digit, with what they start from,
        `extra` the words behind the digits."""
        lanes, rows = self._isa.lanes, self._rows

        def exact(value: Expr, over: Expr) -> Expr:
            """A sum of products with weights, as float32, from that with bytes."""
            value = convert(value, "float32")
            if self._offset != "zero_point":
                return value
            # Exact for blocks of 32: all are integers below 2^24.
            return T.fma(splat(convert(T.int32(0) - over, "float32"), lanes), scales[1], value)

        *_, last = parts
        if len(parts) > 1:
            last = T.shift_left(parts[-2], const_like(last, 8)) + last
        value = exact(last, extra[rows.LOW])
        if self._digits == DIGITS:
            value = T.fma(exact(parts[0], extra[rows.HIGH]), f32(65536, lanes), value)
        acc = T.fma(value * splat(extra[rows.SCALE], lanes), scales[0], acc)
        return T.fma(splat(extra[rows.TOTAL], lanes), scales[1], acc) if self._offset == "mean" else acc

    def _add_words(
        self,
        dots: Any,
        X: Any,
        W: Any,
        records: list[Expr],
        place: Columns,
        kb: Expr,
        word: Expr,
        count: int,
    ) -> None:
        """dots += products of words word .. word + count - 1 of block kb."""
        reader, chains = self._reader, int(dots.shape[2])
        fields: list[Expr] = []
        for i in range(count):
            row = kb * self._per_block + word + i
            prefetch(W[0], (place.tile, row + _AHEAD, index(0)), level=2)
            fields += map(named, reader.bytes(named(W[0][place.tile, row, place.lanes])))
        # One field after the other goes into all sums, unless the ISA sums several at once.
        step = 1 if self._isa.dot == "vnni" else len(fields)
        for t, (r, record), d in product(
            range(0, len(fields), step), enumerate(records), range(self._digits)
        ):
            start = record + d * (reader.input.block // 4) + word * reader.input.fields + t
            weights = fields[t : t + step]
            inputs = [X[start + i] for i in range(len(weights))]
            here = [index(r), index(d), index(t % chains), lanes_at(index(0), self._isa.lanes)]
            B.buffer_store(dots, multiply_add(self._isa, dots[here], weights, inputs, reader.largest), here)
