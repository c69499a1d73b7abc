"""How products with int8 activations read a constant weight: as unsigned bytes, in registers.

The layouts are those of the float kernels. A u32 of a layout holds the codes of 4 * fields inputs of an
output, and field f of its four bytes belongs to the inputs f, fields + f, 2 fields + f and 3 fields + f. So
all that is left of unpacking is a shift and a mask, or a lookup, for four inputs at once: activations come in
that order (codegen/int8_input.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from tvm.script import tirx as T

from qgraph.codegen.int8_input import Int8Input, int8_input
from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels.decode import E4M3_UNIT, doubled_bytes, e4m3_units
from qgraph.codegen.kernels.vector import splat
from qgraph.codegen.kernels.vmath import Expr, const_like, convert
from qgraph.codegen.kernels.weights import Buffers, Columns, NVFP4Reader, Operand
from qgraph.codegen.kernels.weights_group import GroupReader
from qgraph.errors import QGraphError
from qgraph.formats import FORMATS, e2m1
from qgraph.formats.nvfp4 import NVFP4


class ByteReader(ABC):
    """The weight [K, N] of one kernel as bytes.

    Attributes:
        operands: the kernel's weight arguments, in order; the first are the codes, u32 [.., rows, 16].
        input: what it takes of the activations.
        largest: no byte is larger.
    """

    operands: tuple[Operand, ...]
    input: Int8Input
    largest: int

    @abstractmethod
    def bytes(self, word: Expr) -> list[Expr]:
        """The fields of packed codes, in order, as bytes: u32 lanes each."""

    @abstractmethod
    def scales(self, w: Buffers, at: Columns, block: Expr) -> list[Expr]:
        """What `add` takes of a block: float32 lanes, read once for all rows."""

    def add(self, acc: Expr, dot: Expr, block_sum: Expr, scales: list[Expr]) -> Expr:
        """acc plus the share of a block, float32 lanes: `dot` its sum of products, int32 lanes, `block_sum`
        the quantizer's, int32."""
        return T.fma(convert(dot, "float32"), scales[0], acc)

    def unit(self, w: Buffers) -> Expr | None:
        """What finished sums are multiplied by, float32; None is 1."""
        return None


class NVFP4Bytes(ByteReader):
    """Layout `nvfp4_n16k8`: bytes are twice the E2M1 numbers, and 12; scales are in units of 256."""

    def __init__(self, K: int, N: int, isa: Isa) -> None:
        self.operands = NVFP4Reader(K, N, isa).operands
        wanted = int8_input(NVFP4.name)
        assert wanted is not None
        self.input, self._isa = wanted, isa
        self.largest = int(2 * max(e2m1.VALUES)) + wanted.offset

    def bytes(self, word: Expr) -> list[Expr]:
        high = T.shift_right(word, const_like(word, 4))
        return [doubled_bytes(half, self.input.offset, self._isa) for half in (word, high)]

    def scales(self, w: Buffers, at: Columns, block: Expr) -> list[Expr]:
        return [e4m3_units(w[1][at.tile, block, at.lanes], self._isa)]

    def unit(self, w: Buffers) -> Expr:
        return w[2][0] * T.float32(E4M3_UNIT / 2)


class GroupBytes(ByteReader):
    """Layouts `n16b2`, `n16b4` and `n16b8`: bytes are the fields; of signed ones with the sign bit inverted,
    which puts half their range on top."""

    def __init__(self, K: int, N: int, isa: Isa, weight_format: str, block: int) -> None:
        self._reader = GroupReader(K, N, isa, weight_format, block, "2bit")
        self._spec, self.operands = FORMATS[weight_format], self._reader.operands
        wanted = int8_input(weight_format, block)
        if wanted is None:
            raise QGraphError(f"{weight_format} has no products with int8 activations")
        self.input, self._lanes = wanted, isa.lanes
        self.largest = (1 << self._spec.code_bits) - 1

    def bytes(self, word: Expr) -> list[Expr]:
        bits = self._spec.code_bits
        if self.input.offset:
            word = T.bitwise_xor(word, const_like(word, self.input.offset * (0xFFFFFFFF // self.largest)))
        if bits == 8:
            return [word]
        mask = const_like(word, self.largest * 0x01010101)
        shifted = [T.shift_right(word, const_like(word, s)) if s else word for s in range(0, 8, bits)]
        return [T.bitwise_and(field, mask) for field in shifted]

    def scales(self, w: Buffers, at: Columns, block: Expr) -> list[Expr]:
        read = [self._reader.scale(w, at, block)]
        if self._spec.offset == "zero_point":
            read.append(self._reader.zero_point(w, at, block))
        if self._spec.offset == "mean":
            # The sums are multiplied by a power of two: what undoes that is exact.
            unit = splat(T.float32(1 / self.input.factor), self._lanes)
            read.append(self._reader.offset(w, at, block) * unit)
        return read

    def add(self, acc: Expr, dot: Expr, block_sum: Expr, scales: list[Expr]) -> Expr:
        value = convert(dot, "float32")
        if self._spec.offset == "none":
            return T.fma(value, scales[0], acc)
        total = splat(T.cast(block_sum, "float32"), self._lanes)
        if self._spec.offset == "zero_point":
            # Exact: integers far below 2^24.
            less = value - total * scales[1]
            return T.fma(less, scales[0], acc)
        return T.fma(total, scales[1], T.fma(value, scales[0], acc))


def open_bytes(weight_format: str, K: int, N: int, isa: Isa, block: int) -> ByteReader:
    """The reader of a format's weight; `block` is of a group format."""
    return (
        NVFP4Bytes(K, N, isa) if weight_format == NVFP4.name else GroupBytes(K, N, isa, weight_format, block)
    )
