"""Reading group-quantized weights: codes of 2, 3, 4 and 8 bits and base-3 bytes to float32, in registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels.decode import permute16
from qgraph.codegen.kernels.vector import f32
from qgraph.codegen.kernels.vmath import Expr, const_like, named
from qgraph.codegen.kernels.weights import Buffers, Columns, Operand, Reader
from qgraph.codegen.packing import LANES
from qgraph.codegen.packing_group import TRITS, code_layout, code_rows
from qgraph.errors import QGraphError
from qgraph.formats import FORMATS
from qgraph.formats.block import BlockFormat

# word(row) -> named vector of a row of codes, counted from the first of a unit
Rows = Callable[[int], Expr]


# Layout of the codes -> inputs of a unit, and rows of 16 lanes that hold them.
_UNITS = {"n16b2": (16, 1), "n16b4": (16, 2), "n16b8": (16, 4), "n16p3": (32, 3), "n16t5": (25, 5)}


class GroupReader(Reader):
    """A format of qgraph.formats.group in blocks of any size, layouts of codegen/packing_group.py.

    Operands are codes, block scales f16, then zero points or means f16 where the format has them. A zero
    point is subtracted from the codes; a mean is an offset, see `Reader.offset`.
    """

    decoded = True

    def __init__(self, K: int, N: int, isa: Isa, weight_format: str, block: int, packing: str) -> None:
        self._spec, self.block = FORMATS[weight_format], block
        layout = code_layout(weight_format, packing)
        tiles, blocks = -(-N // LANES), -(-K // block)
        base3 = layout == "n16t5"
        codes = Operand("uint8" if base3 else "uint32", (tiles, code_rows(layout, K, block), LANES))
        scales = Operand("float16", (tiles, blocks, LANES))
        zeros = Operand("uint8", (tiles, -(-blocks // 2), LANES))
        offsets = {"none": (), "zero_point": (zeros,), "mean": (scales,)}[self._spec.offset]
        self.operands = (codes, scales, *offsets)
        self.has_offset = self._spec.offset == "mean"
        self._lanes = isa.lanes
        self.unit, self._unit_rows = _UNITS[layout]
        if block % 32:  # so that blocks begin with a word of their own
            raise QGraphError(f"blocks of {block} inputs: a multiple of 32 is needed")
        self._block_rows = -(-block // TRITS) if base3 else block // self.unit * self._unit_rows
        if base3:
            self._decode = _trits
        else:
            self._decode = _planes(isa) if layout == "n16p3" else _fields(self._spec, isa)

    def raw(self, w: Buffers, at: Columns, block: Expr, unit: Expr, count: int) -> list[Expr]:
        first = block * self._block_rows + unit * self._unit_rows
        rows: dict[int, Expr] = {}

        def row(i: int) -> Expr:
            if i not in rows:
                rows[i] = named(w[0][at.tile, first + i, at.lanes])
            return rows[i]

        values = self._decode(row, count)
        if self._spec.offset != "zero_point":
            return values
        zero = named(self._zero_point(w, at, block))
        return [value - zero for value in values]

    def _zero_point(self, w: Buffers, at: Columns, block: Expr) -> Expr:
        pair = T.cast(w[2][at.tile, T.truncdiv(block, T.int64(2)), at.lanes], f"int32x{self._lanes}")
        half = T.broadcast(T.cast(T.truncmod(block, T.int64(2)) * 4, "int32"), self._lanes)
        nibble = T.bitwise_and(T.shift_right(pair, half), const_like(pair, 15))
        return T.cast(nibble, f"float32x{self._lanes}")

    def scale(self, w: Buffers, at: Columns, block: Expr) -> Expr:
        return T.cast(w[1][at.tile, block, at.lanes], f"float32x{self._lanes}")

    def offset(self, w: Buffers, at: Columns, block: Expr) -> Expr:
        return T.cast(w[2][at.tile, block, at.lanes], f"float32x{self._lanes}")


def _fields(spec: BlockFormat, isa: Isa) -> Callable[[Rows, int], list[Expr]]:
    """Fields of a word, unsigned or in two's complement, to float32."""
    bits, lanes, signed = spec.code_bits, isa.lanes, spec.values[0] < 0

    def number(field: int) -> int:
        return field - (1 << bits) if signed and field >> (bits - 1) else field

    def value(word: Expr, j: int) -> Expr:
        if isa.decode == "permute16" and bits <= 4:
            # A lookup by the low 4 bits; of narrower fields the bits above do not matter.
            table = [float(number(i % (1 << bits))) for i in range(16)]
            return permute16(table, _shifted(word, bits * j))
        if signed:
            top = T.shift_left(word, const_like(word, 32 - bits * (j + 1)))
            integer = T.shift_right(T.reinterpret(f"int32x{lanes}", top), _int32(32 - bits, lanes))
        else:
            integer = T.reinterpret(f"int32x{lanes}", _low(_shifted(word, bits * j), bits))
        return T.cast(integer, f"float32x{lanes}")

    per = 32 // bits
    return lambda row, count: [value(row(i // per), i % per) for i in range(count)]


def _planes(isa: Isa) -> Callable[[Rows, int], list[Expr]]:
    """3-bit codes: two words of low pairs and one of high bits, for 32 inputs."""
    lanes = isa.lanes

    def value(low: Expr, high: Expr, i: int) -> Expr:
        pair = _low(_shifted(low, 2 * (i % 16)), 2)
        top = T.shift_left(high, const_like(high, 2 - i)) if i < 2 else _shifted(high, i - 2)
        if isa.decode == "permute16":
            # What else is in bit 3 and above does not matter to the lookup.
            index = T.bitwise_or(pair, T.bitwise_and(top, const_like(top, 0xFFFFFFFC)))
            return permute16([float(k % 8) for k in range(16)], index)
        code = T.bitwise_or(pair, T.bitwise_and(top, const_like(top, 4)))
        return T.cast(T.reinterpret(f"int32x{lanes}", code), f"float32x{lanes}")

    return lambda row, count: [value(row(i // 16), row(2), i) for i in range(count)]


def _trits(row: Rows, count: int) -> list[Expr]:
    """Digits of base-3 bytes, the first the most significant, as -1, 0, 1.

    A byte v stands for the balanced fraction f = (v - 121) / 243 = sum_j t_j / 3^(j+1), |f| < 1/2. So the
    first digit is the integer nearest to 3 f, and what is left is again such a fraction. No 3 f comes closer
    to a tie than 1/162, far more than rounding can move it.
    """
    values: list[Expr] = []
    for i in range(-(-count // TRITS)):
        byte = row(i)
        lanes = int(byte.ty.dtype.lanes)
        wide = T.cast(T.cast(byte, f"int32x{lanes}"), f"float32x{lanes}")
        tripled: Any = named((wide - f32(121, lanes)) * f32(1 / 81, lanes))
        for j in range(min(TRITS, count - TRITS * i)):
            digit = named(T.nearbyint(tripled))
            values.append(digit)
            if j + 1 < TRITS:
                tripled = named((tripled - digit) * f32(3, lanes))
    return values


def _int32(value: int, lanes: int) -> Expr:
    return T.broadcast(T.int32(value), lanes)


def _shifted(word: Expr, right: int) -> Expr:
    return T.shift_right(word, const_like(word, right)) if right else word


def _low(word: Expr, bits: int) -> Expr:
    return T.bitwise_and(word, const_like(word, (1 << bits) - 1))
