"""Products of many rows with NVFP4 weights by AMX in bfloat16, which an E2M1 number times an E4M3 one is
exactly: together they have 6 significant bits. A block of 16 inputs would fill a quarter of a tile of bytes.

A slice of the panel is decoded to the stack once for all rows of a chunk, as pairs of inputs 16 apart. The
activations are one, two or three bfloat16 parts (split_bf16.py): three are float32 itself, so that products
are exact and sums float32. Of a slice the smallest parts are summed first. The global scale is taken apart: a
power of two, that weights are multiplied by, and a number from 1 up to 2 for the finished sums. So these
overflow where those in float32 do. To the tiles zero is all, inputs, products and sums, below 2^-126.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.bf16_rows import INPUTS, WORDS, parts_of
from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels import TILED, kernel
from qgraph.codegen.kernels.amx import BF16, ROW_BYTES, ROWS, SIZE, At, Rows, multiply, on_stack
from qgraph.codegen.kernels.decode import E4M3_UNIT, e4m3_units
from qgraph.codegen.kernels.epilogue import Result
from qgraph.codegen.kernels.function import Function
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.tiled import CHUNK, flat, tiled_matmul
from qgraph.codegen.kernels.vector import lanes_at, prefetch, splat
from qgraph.codegen.kernels.vmath import Expr, bits_as, const_like, named
from qgraph.codegen.kernels.weights import NVFP4Reader
from qgraph.codegen.packing import GROUP, LANES, WORD
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import QGraphError

_CACHE = 1 << 20  # bytes of activations of a chunk that are read again and again: half of a core's cache
_HALVES = GROUP // WORD  # of a block, by words
_SLICE = 8  # times INPUTS: 8 KiB of decoded weights a column of tiles
_FLOATS = (("x", "float32"), ("digits", "int32"))
_CODES = (("codes", "int8"), ("scale", "float32"), ("block_sums", "int32"))


def _matmul_bf16(arguments: tuple[tuple[str, str], ...], spec: KernelSpec, isa: Isa, symbol: str) -> Any:
    """The kernel of `spec` for tiles: arguments and blocks are those of matmul.py or matmul_int8.py."""
    if spec["m_block"] % ROWS:
        raise QGraphError(f"{spec.op}: cannot build {dict(spec.params)}")
    reader = NVFP4Reader(spec["k"], spec["n"], isa)

    def start(f: Function, weights: list[Any], result: Result) -> _Product:
        return _Product(spec, isa, f, weights, reader, result)

    return tiled_matmul(spec, symbol, arguments, reader.operands, start)


kernel("matmul_nvfp4", TILED)(partial(_matmul_bf16, _FLOATS))
kernel("matmul_nvfp4_a8", TILED)(partial(_matmul_bf16, _CODES))


class _Product:
    """A `tiled.Product`."""

    depth, padded = ROW_BYTES, True

    def __init__(
        self,
        spec: KernelSpec,
        isa: Isa,
        f: Function,
        weights: list[Any],
        reader: NVFP4Reader,
        result: Result,
    ) -> None:
        self._isa = isa
        self._y, self._weights, self._reader, self._result = f.buffers["y"], weights, reader, result
        codes = "codes" in f.buffers
        self._left = flat(f.buffers["codes" if codes else "digits"], "int32")
        self._parts = 1 if codes else parts_of(spec)
        self._scale = f.buffers["scale"] if codes else None
        self._blocks = -(-spec["k"] // GROUP)
        self._steps = -(-spec["k"] // INPUTS)
        most = _CACHE // (CHUNK * ROW_BYTES * self._parts)  # of a slab's steps
        slabs = -(-self._steps // most)
        self._slab = -(-self._steps // (slabs * _SLICE)) * _SLICE
        self.slabs = -(-self._steps // self._slab)
        self._side = 2 if result.n_block % (2 * LANES) == 0 else 1  # columns of tiles that are done together
        bits = named(bits_as(weights[2][index(0)], "int32"))
        power = T.max(bits & T.int32(0x7F800000), T.int32(0x00800000))
        self._power = named(T.reinterpret("float32", power))
        self._rest = named(weights[2][index(0)] / self._power)

    def usable(self, row: Expr) -> Expr | None:
        return None

    def open(self, rows: Rows, slab: Expr) -> None:
        """Brings the activations of a slab into the core's second cache: tiles leave them there."""
        begin = B.bind(slab * self._slab)
        count = B.bind(T.min(begin + self._slab, index(self._steps)) - begin)
        lines = B.bind(count * (self._parts * ROWS))
        tile = B.bind(T.truncdiv(rows.m0, index(ROWS)))
        with B.serial(T.truncdiv(rows.count + (ROWS - 1), index(ROWS))) as t, B.serial(lines) as i:
            at = ((tile + t) * self._steps + begin) * (self._parts * SIZE) + i * WORDS
            prefetch(self._left, at, level=2)

    def chunk(self, rows: Rows, panel: Expr, slab: Expr) -> None:
        result, side, every = self._result, self._side, lanes_at(index(0), LANES)
        last = slab == self.slabs - 1
        begin = B.bind(slab * self._slab)
        end = B.bind(T.min(begin + self._slab, index(self._steps)))
        # What the sums are multiplied by when all are in.
        rest = named(T.Select(last, self._rest, T.float32(1)))
        # Of tile t of the rows and column c of tiles: element [t, c, :, :].
        with (
            on_stack("float32", CHUNK // ROWS, side, ROWS, LANES) as acc,
            on_stack("uint32", 2, side, _SLICE * WORDS, LANES) as decoded,
            B.serial(index(result.n_block // (side * LANES))) as part,
        ):
            first = B.bind(panel * result.n_block + part * (side * LANES))
            if self.slabs > 1:
                with B.If(slab > 0), B.Then(), B.serial(rows.count) as r, B.serial(index(side)) as c:
                    value = result.load(self._y, rows.m0 + r, first + c * LANES)
                    B.buffer_store(
                        acc, value, [T.truncdiv(r, index(ROWS)), c, T.truncmod(r, index(ROWS)), every]
                    )
            with B.serial(T.truncdiv(end - begin + (_SLICE - 1), index(_SLICE))) as s:
                start = B.bind(begin + s * _SLICE)
                count = B.bind(T.min(index(_SLICE), end - start))
                now = B.bind(T.truncmod(s, index(2)))
                following = B.bind(T.min(index(_SLICE), end - start - _SLICE))

                def decode(buffer: Expr, start: Expr, i: Expr, piece: Expr) -> None:
                    c, half = T.truncdiv(piece, index(_HALVES)), T.truncmod(piece, index(_HALVES))
                    self._decode(decoded, first + c * LANES, start + i, half, [buffer, c, i])

                # Each pair of a whole chunk's tiles decodes a half of a column of the next slice meanwhile.
                whole = B.bind(rows.count > CHUNK - ROWS)
                pieces = side * _HALVES  # of a step; one loop over all, which LLVM does not unroll
                with (
                    B.If(T.Or(s == 0, T.Not(whole))),
                    B.Then(),
                    B.serial(count * pieces) as u,
                ):
                    decode(now, start, T.truncdiv(u, index(pieces)), T.truncmod(u, index(pieces)))

                def add(tiles: list[Expr]) -> None:
                    pair = B.bind(T.truncdiv(tiles[0], index(2)))
                    ahead = B.bind(T.And(whole, pair < pieces))

                    def meanwhile(i: Expr) -> None:
                        with B.If(T.And(ahead, i < following)), B.Then():
                            decode(1 - now, start + _SLICE, i, pair)

                    paired = len(tiles) == 2  # one is left of a chunk that is not whole
                    self._add_tiles(
                        acc, decoded, rows, tiles, start, count, now, meanwhile if paired else None
                    )

                rows.each_pair(add)
            with B.serial(rows.count) as r, B.serial(index(side)) as c:
                value = acc[T.truncdiv(r, index(ROWS)), c, T.truncmod(r, index(ROWS)), every]
                value = value * splat(rest, LANES)
                if self._scale is not None:
                    value = value * splat(T.Select(last, self._scale[rows.m0 + r], T.float32(1)), LANES)
                result.store(self._y, rows.m0 + r, B.bind(first + c * LANES), value)

    def _decode(self, decoded: Any, column: Expr, step: Expr, half: Expr, to: list[Expr]) -> None:
        """Half of a step of the inputs, of columns `column` .., to a place: buffer, column of tiles, step."""
        place = self._result.columns(column)
        low = B.bind(step * 2)
        high = B.bind(T.min(low + 1, index(self._blocks - 1)))
        # Behind the last block the last comes again, times 0.
        units = [self._power * T.float32(E4M3_UNIT)] * 2
        units[1] = units[1] * T.cast(low + 1 < index(self._blocks), "float32")
        halves = []
        for block, unit in zip((low, high), units, strict=True):
            scale = e4m3_units(self._weights[1][place.tile, block, place.lanes], self._isa)
            scale = named(scale * splat(named(unit), LANES))
            word = block * _HALVES + half
            halves.append([self._reader.code(self._weights, place, word, i) * scale for i in range(WORD)])
        for j, pair in enumerate(zip(*halves, strict=True)):
            even, odd = (bits_as(named(weight), "uint32") for weight in pair)
            words = (even >> const_like(even, 16)) | (odd & const_like(odd, 0xFFFF0000))
            row = to[2] * WORDS + half * WORD + j
            B.buffer_store(decoded, words, [*to[:2], row, lanes_at(index(0), LANES)])

    def _add_tiles(
        self,
        acc: Any,
        decoded: Any,
        rows: Rows,
        tiles: list[Expr],
        start: Expr,
        count: Expr,
        now: Expr,
        meanwhile: Callable[[Expr], None] | None,
    ) -> None:
        """The share of `count` steps of inputs from `start`."""
        columns, parts = range(self._side), self._parts
        firsts = [
            B.bind(T.truncdiv(rows.start(t), index(ROWS)) * (self._steps * parts) + start * parts)
            for t in tiles
        ]
        sums: list[list[At]] = [
            [(flat(acc), (t * self._side + c) * SIZE, ROW_BYTES) for c in columns] for t in tiles
        ]

        def steps(step: Any) -> None:
            with B.serial(index(parts)) as done, B.serial(count) as i:
                part = B.bind(i * parts + (parts - 1 - done))
                left = [(self._left, (tile + part) * SIZE, ROW_BYTES) for tile in firsts]
                right = [
                    (flat(decoded), ((now * self._side + c) * _SLICE + i) * (WORDS * LANES), ROW_BYTES)
                    for c in columns
                ]
                step(left, right)
                if meanwhile is not None:
                    with B.If(done == 0), B.Then():
                        meanwhile(i)

        multiply(BF16, sums, steps, resume=start > 0, passing=True)
