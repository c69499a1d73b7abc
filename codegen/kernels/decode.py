"""NVFP4 numbers in registers: E2M1 codes and E4M3 scales to float32, exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from qgraph.codegen.isa import Isa

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1: sign, 2 exponent bits (bias 1), 1 mantissa bit
_VALUES = (*_MAGNITUDES, *(-m for m in _MAGNITUDES))


@dataclass(frozen=True)
class E2M1Decoder:
    """How an ISA turns codes into float32.

    Attributes:
        raw: `raw(words, j)` gives, for code j (bits 4j..4j+3) of each u32 lane, its value / unit, exactly. j
            may be a loop variable that is unrolled.
        unit: a power of two.
        signed_zero: whether code 8, the negative zero, becomes one; else it becomes 0.
    """

    raw: Callable[[Any, Any], Any]
    unit: float
    signed_zero: bool


def _bits(value: Any, lanes: int) -> Any:
    return T.broadcast(T.Cast("uint32", value), lanes)


def permute16(table: Sequence[float], index: Any) -> Any:
    """table[index % 16] of 16 values, for ISAs whose `decode` is `permute`: vpermps looks at the low 4 bits
    of each u32 lane only."""
    values = T.Shuffle([T.float32(v) for v in table], list(range(16)))
    permute = T.llvm_lookup_intrinsic_id("llvm.x86.avx512.permvar.sf.512")
    return T.call_llvm_pure_intrin(permute, values, T.reinterpret("int32x16", index), dtype="float32x16")


def _permute16(isa: Isa) -> E2M1Decoder:
    def raw(words: Any, j: Any) -> Any:
        return permute16(_VALUES, T.shift_right(words, _bits(4 * j, 16)))  # other codes need no masking

    return E2M1Decoder(raw, 1.0, signed_zero=True)


def _bytes16(isa: Isa) -> E2M1Decoder:
    # Every other code of the words is decoded at once, to twice its value as a signed byte; a shift up and a
    # shift down widen one of them to 32 bits.
    lanes = isa.lanes

    def raw(words: Any, j: Any) -> Any:
        doubled = doubled_bytes(T.shift_right(words, _bits(j % 2 * 4, lanes)), 0, isa)
        top = T.shift_left(doubled, _bits(24 - j // 2 * 8, lanes))
        signed = T.shift_right(T.reinterpret(f"int32x{lanes}", top), T.broadcast(T.int32(24), lanes))
        return T.cast(signed, f"float32x{lanes}")

    return E2M1Decoder(raw, 0.5, signed_zero=False)


def doubled_bytes(words: Any, offset: int, isa: Isa) -> Any:
    """Twice the E2M1 number of the low 4 bits, plus `offset` and modulo 256, for each byte of u32 lanes, as
    u32 lanes."""
    if isa.decode == "arithmetic":
        return _computed_bytes(words, offset, isa.lanes)
    size = isa.lanes * 4
    table = [T.uint8(int(2 * v) + offset & 0xFF) for v in _VALUES]
    if isa.decode == "bytes16":
        words = T.bitwise_and(words, _bits(0x0F0F0F0F, isa.lanes))
    found = _LOOKUPS[isa.arch, isa.lanes](table * (size // 16), T.reinterpret(f"uint8x{size}", words))
    return T.reinterpret(f"uint32x{isa.lanes}", found)


def _lookup(intrinsic: str) -> Callable[[list[Any], Any], Any]:
    def look(table: list[Any], at: Any) -> Any:
        entries, size = T.Shuffle(table, list(range(len(table)))), len(table)
        identifier = T.llvm_lookup_intrinsic_id(intrinsic)
        return T.call_llvm_pure_intrin(identifier, entries, at, dtype=f"uint8x{size}")

    return look


def _two_halves(table: list[Any], at: Any) -> Any:
    """vtbl2, which looks eight bytes up in a table of two registers."""
    low, high = list(range(8)), list(range(8, 16))
    entries = T.Shuffle(table[:8], low), T.Shuffle(table[8:], low)
    identifier = T.llvm_lookup_intrinsic_id("llvm.arm.neon.vtbl2")
    found = [
        T.call_llvm_pure_intrin(identifier, *entries, T.Shuffle([at], half), dtype="uint8x8")
        for half in (low, high)
    ]
    return T.Shuffle(found, low + high)


_LOOKUPS = {
    # vpermb looks at the low 6 bits of a byte: of a table four times over, at the low 4.
    ("x86_64", 16): _lookup("llvm.x86.avx512.permvar.qi.512"),
    ("x86_64", 8): _lookup("llvm.x86.avx2.pshuf.b"),
    ("aarch64", 4): _lookup("llvm.aarch64.neon.tbl1.v16i8"),
    ("armv7l", 4): _two_halves,
    ("wasm32", 4): _lookup("llvm.wasm.swizzle"),
}


def _computed_bytes(words: Any, offset: int, lanes: int) -> Any:
    """`doubled_bytes` of all bytes of a lane at once: none carries into the next."""

    def every(byte: int) -> Any:
        return _bits(byte * 0x01010101, lanes)

    def shifted(value: Any, right: int) -> Any:
        return T.shift_right(value, _bits(right, lanes))

    # 0 1 2 3 4 6 8 12: of the upper half, whose bit 2 is set, the low bits are added once more, and for the
    # last one 2.
    magnitude = T.bitwise_and(words, every(7))
    upper = T.bitwise_and(shifted(words, 2), every(1)) * _bits(3, lanes)
    low = T.bitwise_and(magnitude, upper)
    last = T.bitwise_and(T.bitwise_and(low, shifted(low, 1)), every(1))
    doubled = magnitude + low + last + last
    negative = T.bitwise_and(doubled, T.bitwise_and(shifted(words, 3), every(1)) * _bits(255, lanes))
    largest = int(2 * _MAGNITUDES[-1])
    above = doubled + every(largest) - negative - negative  # by `largest`, so that no byte is below 0
    if offset == largest:
        return above
    # Of numbers modulo 256: no byte borrows once its top bit is set.
    moved = T.bitwise_or(above, every(128)) - every(largest - offset)
    return T.bitwise_xor(moved, every(128))


_DECODERS = {"permute": _permute16, "bytes16": _bytes16, "arithmetic": _bytes16}


def e2m1_decoder(isa: Isa) -> E2M1Decoder:
    """The decoder that suits `isa`."""
    return _DECODERS[isa.decode](isa)


def e2m1(words: Any, isa: Isa) -> Any:
    """The code in the low 4 bits of each u32 lane as float32, exact, the sign of a zero included."""
    decoder, lanes = e2m1_decoder(isa), isa.lanes
    value = decoder.raw(words, 0)
    if decoder.unit != 1.0:
        value = value * T.broadcast(T.float32(decoder.unit), lanes)
    if decoder.signed_zero:
        return value
    sign = T.bitwise_and(T.shift_left(words, _bits(28, lanes)), _bits(1 << 31, lanes))
    bits = T.bitwise_or(T.reinterpret(f"uint32x{lanes}", value), sign)
    return T.reinterpret(f"float32x{lanes}", bits)


E4M3_UNIT = 256.0


def _small_float(bits: Any, mantissa: int, bias: int, unit: float, lanes: int) -> Any:
    """A float of at most 16 bits / unit as float32, exact but for infinities and NaN, by arithmetic: moved to
    where float32 has mantissa and exponent it is too small by a power of two, subnormal or not. (u32
    lanes, above whose sign all is zero.)"""
    size = {3: 8, 10: 16}[mantissa]
    magnitude = T.bitwise_and(bits, _bits((1 << (size - 1)) - 1, lanes))
    sign = T.bitwise_and(T.shift_left(bits, _bits(32 - size, lanes)), _bits(1 << 31, lanes))
    moved = T.bitwise_or(T.shift_left(magnitude, _bits(23 - mantissa, lanes)), sign)
    power = T.float32(2.0 ** (127 - bias) / unit)
    return T.reinterpret(f"float32x{lanes}", moved) * T.broadcast(power, lanes)


def float16(value: Any, isa: Isa) -> Any:
    """float16 lanes, which are finite, as float32."""
    if isa.float16:
        return T.cast(value, f"float32x{isa.lanes}")
    bits = T.cast(T.reinterpret(f"uint16x{isa.lanes}", value), f"uint32x{isa.lanes}")
    return _small_float(bits, 10, 15, 1.0, isa.lanes)


def e4m3_units(bits: Any, isa: Isa) -> Any:
    """E4M3 bits (u8 lanes) / E4M3_UNIT as float32, exact, subnormals and sign included. NaN (0x7F, 0xFF) is
    no scale."""
    lanes = isa.lanes
    if not isa.float16:
        return _small_float(T.cast(bits, f"uint32x{lanes}"), 3, 7, E4M3_UNIT, lanes)
    # Mantissa and exponent moved to where float16 has them, whose bias is 8 more. The sign is copied upwards
    # first, so that one shift moves all; it leaves a copy in the one bit that float16 has more.
    wide = T.cast(T.reinterpret(f"int8x{lanes}", bits), f"int16x{lanes}")
    moved = T.shift_left(wide, T.broadcast(T.int16(7), lanes))
    half = T.bitwise_and(moved, T.broadcast(T.int16(-0x4001), lanes))
    return T.cast(T.reinterpret(f"float16x{lanes}", half), f"float32x{lanes}")


def e4m3(bits: Any, isa: Isa) -> Any:
    """E4M3 bits (u8 lanes) as float32, exact."""
    return e4m3_units(bits, isa) * T.broadcast(T.float32(E4M3_UNIT), isa.lanes)
