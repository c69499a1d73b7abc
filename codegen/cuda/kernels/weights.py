"""Reading packed weights on a GPU: eight inputs of an output at a time, to float32 levels in registers.

The layouts are those of the CPU (runtime/FORMAT.md, "Weight layouts"), so an artifact for both holds its
weights once. They serve a GPU as well: the words of neighbouring outputs lie side by side, so four lanes read
64 bytes of one row of words, and a warp 512 bytes of eight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.cuda.kernels.frame import call, copy4
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.vmath import Expr, named
from qgraph.codegen.packing import GROUP, LANES
from qgraph.codegen.packing_group import TRITS, code_layout, code_rows
from qgraph.codegen.spec import KernelSpec
from qgraph.formats import FORMATS
from qgraph.formats.nvfp4 import NVFP4

OCTET = 8
Buffers = Sequence[Any]  # flat, of a weight's operands in order
_MAGIC, _MAGIC_BITS = 8388608.0, 0x4B000000  # 2^23: an integer in the low bits of its mantissa is added to it


def e2m1_value(code: Expr) -> Expr:
    """The number of an E2M1 code in the low 4 bits of a u32, whatever lies above, as float32."""
    sign = T.bitwise_and(T.shift_left(code, T.uint32(28)), T.uint32(0x80000000))
    magnitude = T.shift_left(T.bitwise_and(code, T.uint32(7)), T.uint32(22))
    # Exponent and mantissa where float32 has them; its bias is 127, E2M1's 1. Subnormals fall into place.
    return T.reinterpret("float32", T.bitwise_or(sign, magnitude)) * T.float32(2.0**126)


def e4m3_value(bits: Expr) -> Expr:
    """The number of E4M3 bits (a u8, not NaN) as float32."""
    wide = T.Cast("uint32", bits)
    sign = T.shift_left(T.bitwise_and(wide, T.uint32(0x80)), T.uint32(24))
    magnitude = T.shift_left(T.bitwise_and(wide, T.uint32(0x7F)), T.uint32(20))
    return T.reinterpret("float32", T.bitwise_or(sign, magnitude)) * T.float32(2.0**120)


def _half(bits: Expr) -> Expr:
    return T.call_extern("float32", "qg_f16_to_float", bits)


def _loaded(buffer: Any, at: Expr, outputs: int, dtype: str) -> list[Expr]:
    """Elements at .. at + outputs - 1 (1 or 4), by one load."""
    if outputs == 1:
        return [named(buffer[at])]
    local = B.alloc_buffer((4,), dtype, scope="local")
    copy4(local, 0, buffer, at)
    return [local[i] for i in range(4)]


class Weight:
    """A weight [K, N] as products and lookups read it.

    Attributes:
        operands: element types of the kernel's arguments that hold it.
        block: inputs that share a scale, a multiple of 8; K where there is none.
        exact: whether a level times its scale is exact in bfloat16, and what `pairs` gives has the scale.
        unit: inputs that a lane multiplies at a time on tensor cores (`pairs`).
        apart: how far apart the two inputs of a pair are: pair i of a unit has input
            i // apart * 2 * apart + i % apart, and the one `apart` behind it.
        factor: what products of `pairs` are multiplied by.
    """

    operands: tuple[str, ...]
    block: int
    exact = False
    unit = OCTET
    apart = 1
    factor = 1.0
    has_scale = True
    has_offset = False

    def octet(self, w: Buffers, tile: Expr, lane: Expr, o: Expr, outputs: int) -> list[list[Expr]]:
        """Levels of inputs 8 o .. 8 o + 7, for outputs `lane` .. of an n16 tile: [outputs][8] float32. `lane`
        is a multiple of `outputs`, 1 or 4. Beyond K they are something finite."""
        raise NotImplementedError

    def pairs(self, w: Buffers, tile: Expr, lane: Expr, u: Expr, outputs: int) -> list[list[Expr]]:
        """Inputs `unit` * u .. as pairs of float16, which hold levels exactly: [outputs][unit / 2] of u32."""
        levels = self.octet(w, tile, lane, u, outputs)
        return [
            [call("uint32", "qg_f16x2", own[i], own[i + 1]) for i in range(0, OCTET, 2)] for own in levels
        ]

    def scales(self, w: Buffers, tile: Expr, lane: Expr, o: Expr, outputs: int) -> list[Expr]:
        """The scales of the block that octet o is in."""
        raise NotImplementedError

    def offsets(self, w: Buffers, tile: Expr, lane: Expr, o: Expr, outputs: int) -> list[Expr]:
        """What is added to its scaled levels."""
        raise NotImplementedError

    def overall(self, w: Buffers) -> Expr | None:
        """What all sums are multiplied by."""
        return None


class _F32(Weight):
    """Layout `f32_n16`: the levels are the weights."""

    operands = ("float32",)
    has_scale = False

    def __init__(self, K: int) -> None:
        self.block = self._rows = K

    def octet(self, w: Buffers, tile: Expr, lane: Expr, o: Expr, outputs: int) -> list[list[Expr]]:
        rows = []
        for i in range(OCTET):
            k = T.min(o * OCTET + i, index(self._rows - 1)) if self._rows % OCTET else o * OCTET + i
            rows.append(_loaded(w[0], (tile * self._rows + k) * LANES + lane, outputs, "float32"))
        return [[row[c] for row in rows] for c in range(outputs)]


class _NVFP4(Weight):
    """Layout `nvfp4_n16k8`: one word an octet."""

    operands = ("uint32", "uint8", "float32")
    block = GROUP
    exact = True
    apart = 4
    factor = 256.0  # float16 has no room for the largest products of levels and scales

    def __init__(self, K: int) -> None:
        self._blocks = -(-K // GROUP)

    def _words(self, w: Buffers, tile: Expr, lane: Expr, o: Expr, outputs: int) -> list[Expr]:
        return _loaded(w[0], (tile * (2 * self._blocks) + o) * LANES + lane, outputs, "uint32")

    def _scale_bits(self, w: Buffers, tile: Expr, lane: Expr, o: Expr, outputs: int) -> list[Expr]:
        at = (tile * self._blocks + T.truncdiv(o, index(2))) * LANES + lane
        return _loaded(w[1], at, outputs, "uint8")

    def octet(self, w: Buffers, tile: Expr, lane: Expr, o: Expr, outputs: int) -> list[list[Expr]]:
        return [
            [named(e2m1_value(T.shift_right(word, T.uint32(4 * i)))) for i in range(OCTET)]
            for word in self._words(w, tile, lane, o, outputs)
        ]

    def pairs(self, w: Buffers, tile: Expr, lane: Expr, u: Expr, outputs: int) -> list[list[Expr]]:
        words = self._words(w, tile, lane, u, outputs)
        bits = self._scale_bits(w, tile, lane, u, outputs)
        scales = [call("uint32", "qg_e4m3_pair", own) for own in bits]
        return [
            [
                call("uint32", "qg_e2m1_pair", T.shift_left(word, T.uint32(12 - 4 * i)), scale)
                for i in range(4)
            ]
            for word, scale in zip(words, scales, strict=True)
        ]

    def scales(self, w: Buffers, tile: Expr, lane: Expr, o: Expr, outputs: int) -> list[Expr]:
        return [named(e4m3_value(bits)) for bits in self._scale_bits(w, tile, lane, o, outputs)]

    def overall(self, w: Buffers) -> Expr | None:
        return w[2][0]


class _Group(Weight):
    """A format of qgraph.formats.group."""

    def __init__(self, K: int, weight_format: str, block: int, packing: str) -> None:
        self._spec, self.block = FORMATS[weight_format], block
        self._layout = code_layout(weight_format, packing)
        self._rows, self._blocks = code_rows(self._layout, K, block), -(-K // block)
        self._base3 = self._layout == "n16t5"
        offset = {"none": (), "zero_point": ("uint8",), "mean": ("uint16",)}[self._spec.offset]
        self.operands = ("int8" if self._base3 else "uint32", "uint16", *offset)
        self.has_offset = self._spec.offset == "mean"
        self._words = not self._base3 and self._layout != "n16b3"  # whether codes are fields of words
        self._per = 32 // self._spec.code_bits  # codes of a word, if they are
        if self._words:
            self.unit, self.apart = max(OCTET, self._per), self._per // 2

    def pairs(self, w: Buffers, tile: Expr, lane: Expr, u: Expr, outputs: int) -> list[list[Expr]]:
        if not self._words:
            return super().pairs(w, tile, lane, u, outputs)
        bits, signed = self._spec.code_bits, self._spec.values[0] < 0
        flip = 1 << (bits - 1) if signed else 0
        mask = ((1 << bits) - 1) * 0x10001
        count = self.unit // self._per
        read = [
            _loaded(
                w[0],
                (tile * self._rows + T.min(u * count + i, index(self._rows - 1))) * LANES + lane,
                outputs,
                "uint32",
            )
            for i in range(count)
        ]
        less: list[Expr] = [T.uint32((0x6400 + flip) * 0x10001)] * outputs
        if self._spec.offset == "zero_point":
            zeros = self._zero_fields(w, tile, lane, u, outputs)
            less = [call("uint32", "qg_less", zero) for zero in zeros]
        return [
            [
                call(
                    "uint32",
                    "qg_field_pair",
                    T.shift_right(words[c], T.uint32(bits * i)),
                    T.uint32(mask),
                    T.uint32(flip * 0x10001),
                    less[c],
                )
                for words in read
                for i in range(self._per // 2)
            ]
            for c in range(outputs)
        ]

    def _block_of(self, o: Expr) -> Expr:
        return T.truncdiv(o, index(self.block // OCTET))

    def octet(self, w: Buffers, tile: Expr, lane: Expr, o: Expr, outputs: int) -> list[list[Expr]]:
        def words(row: Expr) -> list[Expr]:
            at = (tile * self._rows + T.min(row, index(self._rows - 1))) * LANES + lane
            return _loaded(w[0], at, outputs, "int8" if self._base3 else "uint32")

        if self._base3:
            levels = self._trits(words, o, outputs)
        elif self._layout == "n16b3":
            levels = self._threes(words, o, outputs)
        else:
            levels = self._fields(words, o, outputs)
        if self._spec.offset != "zero_point":
            return levels
        zeros = self._zero_points(w, tile, lane, o, outputs)
        return [[named(level - zero) for level in own] for own, zero in zip(levels, zeros, strict=True)]

    def _fields(self, words: Any, o: Expr, outputs: int) -> list[list[Expr]]:
        """Fields of 2, 4 or 8 bits, unsigned or in two's complement."""
        bits, signed = self._spec.code_bits, self._spec.values[0] < 0
        per = 32 // bits  # codes of a word
        if per >= OCTET:
            parts = per // OCTET  # octets of a word
            down = T.Cast("uint32", T.truncmod(o, index(parts)) * (OCTET * bits))
            read = [words(T.truncdiv(o, index(parts)))]
            read = [[named(T.shift_right(word, down)) if parts > 1 else word for word in read[0]]]
        else:
            read = [words(o * (OCTET // per) + i) for i in range(OCTET // per)]
        each = min(per, OCTET)
        flip = (1 << (bits - 1)) if signed else 0

        def level(c: int, i: int) -> Expr:
            field = T.bitwise_and(
                T.shift_right(read[i // each][c], T.uint32(bits * (i % each))), T.uint32((1 << bits) - 1)
            )
            return named(_integer(T.bitwise_xor(field, T.uint32(flip)) if flip else field, flip))

        return [[level(c, i) for i in range(OCTET)] for c in range(outputs)]

    def _threes(self, words: Any, o: Expr, outputs: int) -> list[list[Expr]]:
        """3-bit codes, 32 in three words."""
        group, part = T.truncdiv(o, index(4)), T.truncmod(o, index(4))
        w = [words(group * 3 + i) for i in range(3)]
        place = T.Cast("int32", part * OCTET)

        def level(c: int, i: int) -> Expr:
            code = T.call_extern("uint32", "qg_three", w[0][c], w[1][c], w[2][c], place + i)
            return named(_integer(code, 0))

        return [[level(c, i) for i in range(OCTET)] for c in range(outputs)]

    def _trits(self, words: Any, o: Expr, outputs: int) -> list[list[Expr]]:
        """Five digits a byte, and every block begins with a byte of its own."""
        bytes_of_block = -(-self.block // TRITS)
        place = B.bind(T.truncmod(o, index(self.block // OCTET)) * OCTET)
        first = B.bind(self._block_of(o) * bytes_of_block + T.truncdiv(place, index(TRITS)))
        start = T.Cast("int32", T.truncmod(place, index(TRITS)))
        rows = [words(first + i) for i in range(-(-(OCTET + TRITS - 1) // TRITS))]

        def level(c: int, i: int) -> Expr:
            own = [T.Cast("int32", row[c]) for row in rows]
            return named(T.call_extern("float32", "qg_trit", *own, start + i))

        return [[level(c, i) for i in range(OCTET)] for c in range(outputs)]

    def _numbers(self, buffer: Any, tile: Expr, lane: Expr, o: Expr, outputs: int) -> list[Expr]:
        at = (tile * self._blocks + self._block_of(o)) * LANES + lane
        return [named(_half(bits)) for bits in _loaded(buffer, at, outputs, "uint16")]

    def _zero_points(self, w: Buffers, tile: Expr, lane: Expr, o: Expr, outputs: int) -> list[Expr]:
        return [named(_integer(zero, 0)) for zero in self._zero_fields(w, tile, lane, o, outputs)]

    def _zero_fields(self, w: Buffers, tile: Expr, lane: Expr, o: Expr, outputs: int) -> list[Expr]:
        block = self._block_of(o)
        at = (tile * -(-self._blocks // 2) + T.truncdiv(block, index(2))) * LANES + lane
        down = T.Cast("uint32", T.truncmod(block, index(2)) * 4)
        return [
            named(T.bitwise_and(T.shift_right(T.Cast("uint32", pair), down), T.uint32(15)))
            for pair in _loaded(w[2], at, outputs, "uint8")
        ]

    def scales(self, w: Buffers, tile: Expr, lane: Expr, o: Expr, outputs: int) -> list[Expr]:
        return self._numbers(w[1], tile, lane, o, outputs)

    def offsets(self, w: Buffers, tile: Expr, lane: Expr, o: Expr, outputs: int) -> list[Expr]:
        return self._numbers(w[2], tile, lane, o, outputs)


def _integer(field: Expr, less: int) -> Expr:
    """A small unsigned integer, less `less`, as float32: without the conversion, which is slow on GPUs."""
    bits = T.bitwise_or(field, T.uint32(_MAGIC_BITS))
    return T.reinterpret("float32", bits) - T.float32(_MAGIC + less)


def open_weight(weight: str, spec: KernelSpec) -> Weight:
    """The weight [k, n] of a kernel: `f32`, or a format that linear layers have; the spec as of `open_reader`
    of the CPU's kernels."""
    if weight == "f32":
        return _F32(spec["k"])
    if weight == NVFP4.name:
        return _NVFP4(spec["k"])
    return _Group(spec["k"], weight, spec["block"], spec["packing"] if weight == "ternary" else "")
