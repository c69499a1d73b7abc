"""NVFP4 numbers in registers: E2M1 codes and E4M3 scales to float32, exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from qgraph.codegen.isa import Isa

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1: sign, 2 exponent bits (bias 1), 1 mantissa bit

Decode = Callable[[Any, Any], Any]


def _table(values: tuple[float, ...]) -> Any:
    return T.Shuffle([T.float32(v) for v in values], list(range(len(values))))


def _permute16(lanes: int) -> Decode:
    # vpermps looks at the low 4 bits of an index only, so the other codes of the word need no masking.
    table = _table((*_MAGNITUDES, *(-m for m in _MAGNITUDES)))
    permute = T.llvm_lookup_intrinsic_id("llvm.x86.avx512.permvar.sf.512")

    def decode(words: Any, j: Any) -> Any:
        index = T.reinterpret("int32x16", T.shift_right(words, T.broadcast(T.Cast("uint32", 4 * j), 16)))
        return T.call_llvm_pure_intrin(permute, table, index, dtype="float32x16")

    return decode


def _permute8(lanes: int) -> Decode:
    # The 256-bit vpermps looks at the low 3 bits: the magnitude. The sign goes from bit 4j+3 to bit 31.
    table = _table(_MAGNITUDES)
    permute = T.llvm_lookup_intrinsic_id("llvm.x86.avx2.permps")

    def decode(words: Any, j: Any) -> Any:
        index = T.reinterpret("int32x8", T.shift_right(words, T.broadcast(T.Cast("uint32", 4 * j), 8)))
        magnitude = T.call_llvm_pure_intrin(permute, table, index, dtype="float32x8")
        sign = T.bitwise_and(
            T.shift_left(words, T.broadcast(T.Cast("uint32", 28 - 4 * j), 8)), T.broadcast(T.uint32(1 << 31), 8)
        )
        return T.reinterpret("float32x8", T.bitwise_xor(T.reinterpret("uint32x8", magnitude), sign))

    return decode


def _arithmetic(lanes: int) -> Decode:
    # E2M1 bits at the top of float16's exponent and mantissa are the value / 2^14, also where E2M1 is subnormal.
    # Conversion from float16 is exact whatever the flush-to-zero mode of the thread.
    def field(word: Any, left: int, mask: int) -> Any:
        return T.bitwise_and(
            T.shift_left(word, T.broadcast(T.uint32(left), lanes)), T.broadcast(T.uint32(mask), lanes)
        )

    def decode(words: Any, j: Any) -> Any:
        word = T.shift_right(words, T.broadcast(T.Cast("uint32", 4 * j), lanes))
        bits = T.bitwise_or(field(word, 9, 0x0E00), field(word, 12, 0x8000))
        half = T.reinterpret(f"float16x{lanes}", T.cast(bits, f"uint16x{lanes}"))
        return T.cast(half, f"float32x{lanes}") * T.broadcast(T.float32(2.0**14), lanes)

    return decode


_DECODERS = {"permute16": _permute16, "permute8": _permute8, "arithmetic": _arithmetic}


def e2m1_decoder(isa: Isa) -> Decode:
    """`decode(words, j)`: the float32 values of code j (bits 4j..4j+3) of u32 words, `isa.lanes` of them."""
    return _DECODERS[isa.decode](isa.lanes)


def e4m3(bits: Any, lanes: int) -> Any:
    """E4M3 bits (u8 lanes) as float32, exact, subnormals and sign included. NaN codes (0x7F, 0xFF) are not scales."""
    wide = T.cast(bits, f"uint16x{lanes}")

    def moved(mask: int, left: int) -> Any:
        kept = T.bitwise_and(wide, T.broadcast(T.uint16(mask), lanes))
        return T.shift_left(kept, T.broadcast(T.uint16(left), lanes))

    # Mantissa and exponent moved to where float16 has them; the biases differ by 8.
    half = T.reinterpret(f"float16x{lanes}", T.bitwise_or(moved(0x7F, 7), moved(0x80, 8)))
    return T.cast(half, f"float32x{lanes}") * T.broadcast(T.float32(256.0), lanes)
