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


_BYTE_LOOKUP = {
    "x86_64": "llvm.x86.avx2.pshuf.b",
    "aarch64": "llvm.aarch64.neon.tbl1.v16i8",
    "wasm32": "llvm.wasm.swizzle",
}


def _bytes16(isa: Isa) -> E2M1Decoder:
    # One byte lookup decodes every other code of the words, to twice its value as a signed byte; a shift up
    # and a shift down widen one of them to 32 bits.
    lanes, table = isa.lanes, [int(2 * v) & 0xFF for v in _VALUES]

    def raw(words: Any, j: Any) -> Any:
        doubled = lookup_bytes(table, T.shift_right(words, _bits(j % 2 * 4, lanes)), isa)
        top = T.shift_left(doubled, _bits(24 - j // 2 * 8, lanes))
        signed = T.shift_right(T.reinterpret(f"int32x{lanes}", top), T.broadcast(T.int32(24), lanes))
        return T.cast(signed, f"float32x{lanes}")

    return E2M1Decoder(raw, 0.5, signed_zero=False)


def lookup_bytes(table: Sequence[int], words: Any, isa: Isa) -> Any:
    """table[byte % 16] of 16 numbers 0 .. 255, for each byte of u32 lanes, as u32 lanes."""
    lanes, size = isa.lanes, isa.lanes * 4
    entries = T.Shuffle([T.uint8(v) for v in table] * (size // 16), list(range(size)))
    if isa.decode == "permute":
        # vpermb looks at the low 6 bits of a byte: of a table four times over, at the low 4.
        permute = T.llvm_lookup_intrinsic_id("llvm.x86.avx512.permvar.qi.512")
        at = T.reinterpret(f"uint8x{size}", words)
        found = T.call_llvm_pure_intrin(permute, entries, at, dtype=f"uint8x{size}")
    else:
        nibbles = T.bitwise_and(words, _bits(0x0F0F0F0F, lanes))
        lookup = T.llvm_lookup_intrinsic_id(_BYTE_LOOKUP[isa.arch])
        at = T.reinterpret(f"uint8x{size}", nibbles)
        found = T.call_llvm_pure_intrin(lookup, entries, at, dtype=f"uint8x{size}")
    return T.reinterpret(f"uint32x{lanes}", found)


_DECODERS = {"permute": _permute16, "bytes16": _bytes16}


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


# Architectures where a conversion of float16 is a call, of a lane.
_WITHOUT_FLOAT16 = {"wasm32"}


def e4m3_units(bits: Any, isa: Isa) -> Any:
    """E4M3 bits (u8 lanes) / E4M3_UNIT as float32, exact, subnormals and sign included. NaN (0x7F, 0xFF) is
    no scale."""
    lanes = isa.lanes
    if isa.arch in _WITHOUT_FLOAT16:
        # As below, to where float32 has them, whose bias is 120 more; the sign leaves four copies.
        wide = T.cast(T.reinterpret(f"int8x{lanes}", bits), f"int32x{lanes}")
        moved = T.shift_left(wide, T.broadcast(T.int32(20), lanes))
        single = T.bitwise_and(moved, T.broadcast(T.int32(-0x78000001), lanes))
        return T.reinterpret(f"float32x{lanes}", single) * T.broadcast(T.float32(2.0**120 / E4M3_UNIT), lanes)
    # Mantissa and exponent moved to where float16 has them, whose bias is 8 more. The sign is copied upwards
    # first, so that one shift moves all; it leaves a copy in the one bit that float16 has more.
    wide = T.cast(T.reinterpret(f"int8x{lanes}", bits), f"int16x{lanes}")
    moved = T.shift_left(wide, T.broadcast(T.int16(7), lanes))
    half = T.bitwise_and(moved, T.broadcast(T.int16(-0x4001), lanes))
    return T.cast(T.reinterpret(f"float16x{lanes}", half), f"float32x{lanes}")


def e4m3(bits: Any, isa: Isa) -> Any:
    """E4M3 bits (u8 lanes) as float32, exact."""
    return e4m3_units(bits, isa) * T.broadcast(T.float32(E4M3_UNIT), isa.lanes)
