"""Reading group-quantized weights: codes of 2, 3, 4 and 8 bits and base-3 bytes to float32, in registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels.decode import float16, permute16
from qgraph.codegen.kernels.vector import f32
from qgraph.codegen.kernels.vmath import Expr, const_like, lanes_of, named
from qgraph.codegen.kernels.weights import Buffers, Columns, F32Reader, NVFP4Reader, Operand, Reader
from qgraph.codegen.packing import LANES
from qgraph.codegen.packing_group import TRITS, code_layout, code_rows
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import QGraphError
from qgraph.formats import FORMATS
from qgraph.formats.block import BlockFormat
from qgraph.formats.nvfp4 import NVFP4

# (load, unit, count) -> vectors of the first `count` inputs of a unit, counted from the start of the weight.
# `load(row)` gives 16 lanes of packed codes.
Decode = Callable[[Callable[[Expr], Expr], Expr, int], list[Expr]]

# Layout of the codes -> inputs of a unit. Larger ones make LLVM spill in the loop over the decoded panel on
# AVX2, which needs every register.
_UNITS = {"n16b2": 16, "n16b4": 16, "n16b8": 16, "n16b3": 32, "n16t5": TRITS}


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
        codes = Operand("int8" if base3 else "uint32", (tiles, code_rows(layout, K, block), LANES))
        scales = Operand("float16", (tiles, blocks, LANES))
        zeros = Operand("uint8", (tiles, -(-blocks // 2), LANES))
        offsets = {"none": (), "zero_point": (zeros,), "mean": (scales,)}[self._spec.offset]
        self.operands = (codes, scales, *offsets)
        self.has_offset = self._spec.offset == "mean"
        self._isa, self._lanes = isa, isa.lanes
        if block % 32:  # so that blocks begin with a word of their own
            raise QGraphError(f"blocks of {block} inputs: a multiple of 32 is needed")
        self.unit = _UNITS[layout]
        self._units = -(-block // self.unit)
        if base3:
            self._decode: Decode = _trits
        else:
            self._decode = _threes(isa) if layout == "n16b3" else _fields(self._spec, isa)

    def raw(self, w: Buffers, at: Columns, block: Expr, unit: Expr, count: int) -> list[Expr]:
        def load(row: Expr) -> Expr:
            return named(w[0][at.tile, row, at.lanes])

        values = self._decode(load, block * self._units + unit, count)
        if self._spec.offset != "zero_point":
            return values
        zero = named(self.zero_point(w, at, block))
        return [value - zero for value in values]

    def zero_point(self, w: Buffers, at: Columns, block: Expr) -> Expr:
        """The zero point of a block, float32 lanes, where there is one."""
        pair = T.cast(w[2][at.tile, T.truncdiv(block, T.int64(2)), at.lanes], f"int32x{self._lanes}")
        half = T.broadcast(T.cast(T.truncmod(block, T.int64(2)) * 4, "int32"), self._lanes)
        nibble = T.bitwise_and(T.shift_right(pair, half), const_like(pair, 15))
        return T.cast(nibble, f"float32x{self._lanes}")

    def scale(self, w: Buffers, at: Columns, block: Expr) -> Expr:
        return float16(w[1][at.tile, block, at.lanes], self._isa)

    def offset(self, w: Buffers, at: Columns, block: Expr) -> Expr:
        return float16(w[2][at.tile, block, at.lanes], self._isa)


def open_reader(weight: str, spec: KernelSpec, isa: Isa) -> Reader:
    """The reader of the weight [k, n] of a kernel: `f32`, or a format that linear layers have.

    Of the spec: k, n; of a group format block, and of `ternary` packing.
    """
    K, N = spec["k"], spec["n"]
    if weight == "f32":
        return F32Reader(K, N)
    if weight == NVFP4.name:
        return NVFP4Reader(K, N, isa)
    return GroupReader(K, N, isa, weight, spec["block"], spec["packing"] if weight == "ternary" else "")


def _fields(spec: BlockFormat, isa: Isa) -> Decode:
    """Fields of a word, unsigned or in two's complement, to float32."""
    bits, lanes, signed = spec.code_bits, isa.lanes, spec.values[0] < 0

    def number(field: int) -> int:
        return field - (1 << bits) if signed and field >> (bits - 1) else field

    def value(word: Expr, j: int) -> Expr:
        if isa.decode == "permute" and bits <= 4:
            # A lookup by the low 4 bits; of narrower fields the bits above do not matter.
            table = [float(number(i % (1 << bits))) for i in range(16)]
            return permute16(table, _shifted(word, bits * j))
        if signed:
            top = T.shift_left(word, const_like(word, 32 - bits * (j + 1)))
            integer = T.shift_right(T.reinterpret(f"int32x{lanes}", top), _int32(32 - bits, lanes))
        else:
            integer = T.reinterpret(f"int32x{lanes}", _field(word, bits * j, bits))
        return T.cast(integer, f"float32x{lanes}")

    per = 32 // bits

    def decode(load: Callable[[Expr], Expr], unit: Expr, count: int) -> list[Expr]:
        words = [load(unit * (16 // per) + i) for i in range(-(-count // per))]
        return [value(words[i // per], i % per) for i in range(count)]

    return decode


def _threes(isa: Isa) -> Decode:
    """3-bit codes, 32 in three words w: ten in the low 30 bits of each, and two in what is left."""
    lanes = isa.lanes

    def value(code: Expr) -> Expr:
        if isa.decode == "permute":
            return permute16([float(k % 8) for k in range(16)], code)
        masked = T.bitwise_and(code, const_like(code, 7))
        return T.cast(T.reinterpret(f"int32x{lanes}", masked), f"float32x{lanes}")

    def decode(load: Callable[[Expr], Expr], unit: Expr, count: int) -> list[Expr]:
        w = [load(unit * 3 + i) for i in range(3)]
        values = [value(_shifted(w[i // 10], 3 * (i % 10))) for i in range(min(count, 30))]
        left = [(w[0], 29), (w[2], 28)][: max(0, count - 30)]
        return [*values, *(value(T.bitwise_xor(_shifted(v, 30), _shifted(w[1], by))) for v, by in left)]

    return decode


def _trits(load: Callable[[Expr], Expr], unit: Expr, count: int) -> list[Expr]:
    """The digits -1, 0, 1 of a base-3 byte, the first the most significant.

    A byte v stands for the fraction f = v / 243 = sum_j t_j / 3^(j+1), |f| < 1/2. So the first digit is the
    integer nearest to 3 f, and 3 f less that digit is again such a fraction. No 3 f comes closer to a tie
    than 1/162, far more than rounding can move it.
    """
    byte = load(unit)
    lanes = lanes_of(byte)
    tripled: Any = named(T.cast(T.cast(byte, f"int32x{lanes}"), f"float32x{lanes}") * f32(1 / 81, lanes))
    digits = [named(T.nearbyint(tripled))]
    while len(digits) < count:
        tripled = named((tripled - digits[-1]) * f32(3, lanes))
        digits.append(named(T.nearbyint(tripled)))
    return digits


def _int32(value: int, lanes: int) -> Expr:
    return T.broadcast(T.int32(value), lanes)


def _shifted(word: Expr, right: int) -> Expr:
    return T.shift_right(word, const_like(word, right)) if right else word


def _field(word: Expr, start: int, bits: int) -> Expr:
    """Bits [start, start + bits)."""
    return T.bitwise_and(_shifted(word, start), const_like(word, (1 << bits) - 1))
