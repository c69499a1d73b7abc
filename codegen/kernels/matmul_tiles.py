"""Products of many rows with low-bit weights in integers, by AMX: the kernels of matmul_int8.py and
matmul_digits.py where a block of weights fills a tile, which 16 inputs of NVFP4 do not (matmul_bf16.py).

A block of the panel is unpacked to bytes on the stack once for all rows of a chunk, in the vectors of u32
lanes that are rows of a tile; activations are read where they lie. What tiles give is a block's sum of
products, exact in 32 bits; what becomes of it is what the kernels for VNNI do, in the same order. So results
are the same, to the bit, and a block with a row that digits cannot stand for is left to those kernels.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.digits import digit_rows, many_digits
from qgraph.codegen.int8_input import int8_input
from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels import TILED, kernel
from qgraph.codegen.kernels.amx import INT8, ROW_BYTES, ROWS, SIZE, At, Rows, multiply, on_stack
from qgraph.codegen.kernels.epilogue import Result
from qgraph.codegen.kernels.function import Function
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.matmul_digits import DigitProduct
from qgraph.codegen.kernels.tiled import CHUNK, flat, tiled_matmul
from qgraph.codegen.kernels.vector import f32, lanes_at, splat
from qgraph.codegen.kernels.vmath import Expr, named
from qgraph.codegen.kernels.weights_bytes import ByteReader, open_bytes
from qgraph.codegen.packing import LANES
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import QGraphError
from qgraph.formats import FORMATS
from qgraph.formats.group import GROUP_FORMATS

_WIDTH, _PANEL = 64, 8192  # columns done side by side, and bytes of a block of them, at most


class _Int8Rows:
    """Rows as int8 codes (quantize_int8.py): codes i8 [M, B block], scale f32 [M], block_sums i32 [M, B]."""

    arguments = (("codes", "int8"), ("scale", "float32"), ("block_sums", "int32"))
    planes = 1

    def __init__(self, spec: KernelSpec, isa: Isa, reader: ByteReader, result: Result) -> None:
        self._reader, self._blocks = reader, -(-spec["k"] // reader.input.block)

    def open(self, buffers: dict[str, Any]) -> None:
        self._codes, self._scale, self._sums = (buffers[name] for name, _ in self.arguments)

    def usable(self, row: Expr) -> Expr | None:
        """Whether (bool) the row can be multiplied in integers; None is always."""
        return None

    def tile(self, row: Expr, kb: Expr, plane: int, at: int) -> At:
        """The left operand from byte `at` of block kb on, of one digit."""
        stride = self._blocks * self._reader.input.block
        return self._codes, row * stride + kb * self._reader.input.block + at, stride

    def words(self, row: Expr, kb: Expr) -> list[Expr]:
        """What `add` wants to know of a block of a row."""
        return [named(self._sums[row * self._blocks + kb])]

    def add(self, acc: Expr, dots: list[Expr], words: list[Expr], scales: list[Expr]) -> Expr:
        """acc plus the share of a block."""
        dot = dots[0] + splat(words[0], LANES) if self._reader.input.offset else dots[0]
        return self._reader.add(acc, dot, words[0], scales)

    def finished(self, acc: Expr, row: Expr) -> Expr:
        """The sums of a row when all blocks are in."""
        return acc * splat(self._scale[row], LANES)


class _DigitRows:
    """Rows split into digits (split_digits.py): digits i32 [M, words]."""

    arguments = (("x", "float32"), ("digits", "int32"))

    def __init__(self, spec: KernelSpec, isa: Isa, reader: ByteReader, result: Result) -> None:
        weight_format = _OF_KERNEL[spec.op]
        rows = digit_rows(weight_format, dict(spec.params).get("packing", ""), spec["k"], spec["block"])
        if rows is None:
            raise QGraphError(f"{spec.op}: cannot build {dict(spec.params)}")
        self._rows = replace(rows, digits=many_digits(spec, isa))
        self.planes = self._rows.digits
        self._product = DigitProduct(self._rows, reader, weight_format, isa, result)

    def open(self, buffers: dict[str, Any]) -> None:
        self._digits = buffers["digits"]
        self._bytes = flat(self._digits, "int8")

    def usable(self, row: Expr) -> Expr | None:
        return self._product.is_split(self._digits, row)

    def tile(self, row: Expr, kb: Expr, plane: int, at: int) -> At:
        start = row * (4 * self._rows.words) + kb * (4 * self._rows.record)
        return self._bytes, start + plane * self._rows.input.block + at, 4 * self._rows.words

    def words(self, row: Expr, kb: Expr) -> list[Expr]:
        return [named(word) for word in self._product.extra(self._digits, row, kb)]

    def add(self, acc: Expr, dots: list[Expr], words: list[Expr], scales: list[Expr]) -> Expr:
        starts = self._product.starts
        parts = [dot + splat(words[starts[d]], LANES) if d in starts else dot for d, dot in enumerate(dots)]
        return self._product.share(acc, parts, words, scales)

    def finished(self, acc: Expr, row: Expr) -> Expr:
        return acc


_OF_KERNEL = {spec.kernel: spec.name for spec in GROUP_FORMATS if int8_input(spec.name)}


def _matmul_tiles(
    weight_format: str, kind: type[_Int8Rows | _DigitRows], spec: KernelSpec, isa: Isa, symbol: str
) -> Any:
    """The kernel of `spec` for tiles: arguments and blocks are those of matmul_group.py or matmul_int8.py."""
    if LANES * spec["block"] > _PANEL:
        raise QGraphError(f"{spec.op}: cannot build {dict(spec.params)}")
    reader = open_bytes(weight_format, spec["k"], spec["n"], isa, spec["block"])

    def start(f: Function, weights: list[Any], result: Result) -> _Product:
        left = kind(spec, isa, reader, result)
        left.open(f.buffers)
        return _Product(f.buffers["y"], weights, left, reader, result)

    return tiled_matmul(spec, symbol, kind.arguments, reader.operands, start)


for _name in _OF_KERNEL.values():
    kernel(FORMATS[_name].kernel, TILED)(partial(_matmul_tiles, _name, _DigitRows))
    kernel(f"{FORMATS[_name].kernel}_a8", TILED)(partial(_matmul_tiles, _name, _Int8Rows))


class _Product:
    """A `tiled.Product`."""

    def __init__(
        self, y: Any, weights: list[Any], left: _Int8Rows | _DigitRows, reader: ByteReader, result: Result
    ) -> None:
        self._y, self._weights, self._left, self._reader, self._result = y, weights, left, reader, result
        self._block, self._fields = reader.input.block, reader.input.fields
        self._words = reader.operands[0].shape[1]  # a column's
        self.padded, self.slabs = False, 1
        self.depth = ROW_BYTES if self._block % ROW_BYTES == 0 else ROW_BYTES // 2
        widths = (w for w in (_WIDTH, 32, LANES) if result.n_block % w == 0 and w * self._block <= _PANEL)
        self._width = next(widths)
        self._side = 2 if self._width > LANES else 1  # columns of tiles that are multiplied together

    def usable(self, row: Expr) -> Expr | None:
        return self._left.usable(row)

    def open(self, rows: Rows, slab: Expr) -> None:
        pass

    def chunk(self, rows: Rows, panel: Expr, slab: Expr) -> None:
        result, tiles, every = self._result, self._width // LANES, lanes_at(index(0), LANES)
        per_block = self._block // (4 * self._fields)
        whole, rest = divmod(self._words, per_block)
        # Of tile t of the rows and column c of tiles: element [t, c, i, :] is row 16 t + i of the chunk.
        with (
            on_stack("float32", CHUNK // ROWS, tiles, ROWS, LANES) as acc,
            on_stack("uint32", tiles, self._block // 4, LANES) as unpacked,
            on_stack("int32", self._left.planes, 2, self._side, ROWS, LANES) as dots,
            B.serial(index(result.n_block // self._width)) as part,
        ):
            buffers = (acc, unpacked, dots)
            first = B.bind(panel * result.n_block + part * self._width)
            with B.serial(index(CHUNK // ROWS * tiles * ROWS)) as i:
                c, r = T.truncdiv(i, index(ROWS)), T.truncmod(i, index(ROWS))
                at = [T.truncdiv(c, index(tiles)), T.truncmod(c, index(tiles)), r, every]
                B.buffer_store(acc, f32(0, LANES), at)
            if whole:
                with B.serial(index(whole)) as kb:
                    self._add_block(buffers, rows, first, kb, per_block)
            if rest:
                self._add_block(buffers, rows, first, index(whole), rest)
            with B.serial(rows.count) as r, B.serial(index(tiles)) as c:
                value = acc[T.truncdiv(r, index(ROWS)), c, T.truncmod(r, index(ROWS)), every]
                value = self._left.finished(value, rows.m0 + r)
                result.store(self._y, rows.m0 + r, B.bind(first + c * LANES), value)

    def _add_block(
        self, buffers: tuple[Any, Any, Any], rows: Rows, first: Expr, kb: Expr, words: int
    ) -> None:
        """The share of the first `words` words of block kb, of columns `first` .. of the panel."""
        reader, result, fields, every = self._reader, self._result, self._fields, lanes_at(index(0), LANES)
        acc, unpacked, dots = buffers
        tiles, codes = self._width // LANES, self._weights[0]
        with B.serial(index(tiles)) as c, B.serial(index(words)) as word:
            place = result.columns(first + c * LANES)
            packed = named(codes[place.tile, kb * (self._block // (4 * fields)) + word, place.lanes])
            for field, value in enumerate(reader.bytes(packed)):
                B.buffer_store(unpacked, value, [c, word * fields + field, every])

        def some(row_tiles: list[Expr]) -> None:
            with B.serial(index(tiles // self._side)) as group:
                self._add_tiles(acc, unpacked, dots, rows, row_tiles, group, first, kb, words)

        rows.each_pair(some)

    def _add_tiles(
        self,
        acc: Any,
        unpacked: Any,
        dots: Any,
        rows: Rows,
        row_tiles: list[Expr],
        group: Expr,
        first: Expr,
        kb: Expr,
        words: int,
    ) -> None:
        left, every, columns = self._left, lanes_at(index(0), LANES), range(self._side)
        starts = [B.bind(rows.start(t)) for t in row_tiles]
        size = 4 * words * self._fields  # bytes; activations beyond are zeros
        for plane in range(left.planes):
            sums: list[list[At]] = [
                [(flat(dots), index(((plane * 2 + a) * self._side + c) * SIZE), ROW_BYTES) for c in columns]
                for a in range(len(row_tiles))
            ]

            def steps(step: Any, plane: int = plane) -> None:
                for at in range(0, size, self.depth):
                    right = [
                        (
                            flat(unpacked),
                            ((group * self._side + c) * (self._block // 4) + at // 4) * LANES,
                            ROW_BYTES,
                        )
                        for c in columns
                    ]
                    step([left.tile(row, kb, plane, at) for row in starts], right)

            multiply(INT8, sums, steps)
        scales = [
            [
                named(s)
                for s in self._reader.scales(
                    self._weights, self._result.columns(first + (group * self._side + c) * LANES), kb
                )
            ]
            for c in columns
        ]
        for a, t in enumerate(row_tiles):
            shift = B.bind(rows.shift(t))
            with B.serial(rows.own(t)) as i:
                about = left.words(B.bind(rows.m0 + t * ROWS + i), kb)
                for c in columns:
                    here = [t, group * self._side + c, i, every]
                    parts = [dots[index(d), index(a), index(c), i + shift, every] for d in range(left.planes)]
                    B.buffer_store(acc, left.add(acc[here], parts, about, scales[c]), here)
