"""How matrix products read a constant weight: one reader a family of layouts.

A reader gives weights in vectors of output columns, one vector an input. Inputs come in blocks that share a
scale, blocks in units that are read at once: the words of a unit are loaded once, its codes unrolled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels.decode import e2m1_decoder, e4m3
from qgraph.codegen.kernels.vector import f32, splat
from qgraph.codegen.kernels.vmath import Expr
from qgraph.codegen.packing import GROUP, LANES, WORD

Buffers = Sequence[Expr]  # of a reader's operands, in order


@dataclass(frozen=True)
class Operand:
    """A tensor of the packed weight: its element type in TIR, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Columns:
    """Adjacent output columns: an n16 tile, and which of its lanes (a ramp)."""

    tile: Expr
    lanes: Expr


class Reader(ABC):
    """How the weight [K, N] of one kernel is read.

    Attributes:
        operands: the kernel's weight arguments, in order.
        block: inputs that share a scale.
        unit: inputs that are read at once; the last unit of a block may be shorter.
        decoded: whether many rows read weights decoded to the stack, else where they lie.
        has_offset: whether a number a block and column is added to its scaled weights.
    """

    operands: tuple[Operand, ...]
    block: int
    unit: int
    decoded: bool
    has_offset: bool = False

    @abstractmethod
    def raw(self, w: Buffers, at: Columns, block: Expr, unit: Expr, count: int) -> list[Expr]:
        """The first `count` inputs of a unit, a vector each, without what `scaled` puts on them."""

    def weight(self, w: Buffers, at: Columns, k: Expr) -> Expr:
        """Input k where it lies, of a weight that is not decoded."""
        raise NotImplementedError

    @abstractmethod
    def scale(self, w: Buffers, at: Columns, block: Expr) -> Expr:
        """The scale of a block."""

    def offset(self, w: Buffers, at: Columns, block: Expr) -> Expr:
        """The offset of a block, where there is one."""
        raise NotImplementedError

    def scaled(self, value: Expr, scale: Expr) -> Expr:
        """What a linear function of raw weights of a block becomes when its scale is put on."""
        return value * scale


class F32Reader(Reader):
    """Layout `f32_n16`."""

    def __init__(self, K: int, N: int) -> None:
        self.operands = (Operand("float32", (-(-N // LANES), K, LANES)),)
        self.block = self.unit = GROUP
        self.decoded = False

    def raw(self, w: Buffers, at: Columns, block: Expr, unit: Expr, count: int) -> list[Expr]:
        return [self.weight(w, at, block * GROUP + i) for i in range(count)]

    def weight(self, w: Buffers, at: Columns, k: Expr) -> Expr:
        return w[0][at.tile, k, at.lanes]

    def scale(self, w: Buffers, at: Columns, block: Expr) -> Expr:
        return f32(1, at.lanes.lanes)

    def scaled(self, value: Expr, scale: Expr) -> Expr:
        return value


class NVFP4Reader(Reader):
    """Layout `nvfp4_n16k8`: operands are codes, block scales and the global scale."""

    def __init__(self, K: int, N: int, isa: Isa) -> None:
        tiles, blocks = -(-N // LANES), -(-K // GROUP)
        self.operands = (
            Operand("uint32", (tiles, blocks * (GROUP // WORD), LANES)),
            Operand("uint8", (tiles, blocks, LANES)),
            Operand("float32", (1,)),
        )
        self.block = self.unit = GROUP
        self.decoded = True
        self._isa, self._lanes = isa, isa.lanes
        self._decoder = e2m1_decoder(isa)

    def raw(self, w: Buffers, at: Columns, block: Expr, unit: Expr, count: int) -> list[Expr]:
        first = block * (GROUP // WORD)
        return [self.code(w, at, first + i // WORD, i % WORD) for i in range(count)]

    def code(self, w: Buffers, at: Columns, word: Expr, i: int) -> Expr:
        """The value of code i of a word."""
        return self._decoder.raw(w[0][at.tile, word, at.lanes], i)

    def scale(self, w: Buffers, at: Columns, block: Expr) -> Expr:
        return e4m3(w[1][at.tile, block, at.lanes], self._isa) * splat(w[2][0], self._lanes)

    def scaled(self, value: Expr, scale: Expr) -> Expr:
        # The decoder's unit comes first, where it is exact.
        unit = self._decoder.unit
        return (value if unit == 1.0 else value * f32(unit, self._lanes)) * scale
