"""Activations rounded to low precision and back in float32, their scales found at run time. One block is one
row.

The operations and their order are those of qgraph/formats/activations.py, whose results these kernels give
bit for bit: every division is a division, rounded once, and nothing is contracted or reassociated that would
not be exact.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels import kernel
from qgraph.codegen.kernels.function import function
from qgraph.codegen.kernels.loops import accumulate, each_vector, index, load, store
from qgraph.codegen.kernels.vector import load_first, reduce_lanes, store_first
from qgraph.codegen.kernels.vmath import Expr, bits_as, clamp, const_like, convert, named, splat
from qgraph.codegen.spec import KernelSpec
from qgraph.formats import e2m1, e4m3
from qgraph.formats.activations import BLOCK, INT8_MAX, SMALLEST_NORMAL

_ABS, _SIGN = 0x7FFFFFFF, -(1 << 31)
_EXPONENT = 0x7F800000
_E4M3_MIN_NORMAL = 2.0**-6


def magnitude_bits(x: Expr) -> Expr:
    """|x| as int32 bits. These order as the magnitudes do, NaN above infinity, so that an integer maximum
    keeps a NaN."""
    bits = bits_as(x, "int32")
    return T.bitwise_and(bits, const_like(bits, _ABS))


def _f32_bits(value: float) -> int:
    import numpy as np

    return int(np.float32(value).view(np.int32))


def _round_to_mantissa(v: Expr, mantissa: int, smallest_normal: float) -> Expr:
    """v >= 0 rounded to a float of `mantissa` stored bits, ties to even; below `smallest_normal` the spacing
    stays what it is there. NaN propagates.

    With p = 2^floor(log2 v) the spacing is p / 2^mantissa. Adding 1.5 * 2^(23 - mantissa) p puts the sum
    where one unit in the last place of float32 is that spacing, and the addition itself rounds.
    """
    bits = bits_as(v, "int32")
    exponent = T.bitwise_and(bits, const_like(bits, _EXPONENT))
    p = bits_as(T.max(exponent, const_like(bits, _f32_bits(smallest_normal))), "float32")
    magic = named(p * const_like(v, 1.5 * 2.0 ** (23 - mantissa)))
    return named(v + magic) - magic


def round_e4m3(v: Expr) -> Expr:
    """float32 v >= 2^-9 or NaN as the nearest E4M3 number, beyond 448 as 448, in float32."""
    return _round_to_mantissa(named(clamp(v, e4m3.SMALLEST, e4m3.MAX)), 3, _E4M3_MIN_NORMAL)


def round_e2m1(r: Expr) -> Expr:
    """float32 as the nearest E2M1 number, beyond 6 as 6, in float32; a zero keeps its sign. NaN as some
    number: the scale of its block is NaN."""
    bits = named(bits_as(r, "int32"))
    held = T.min(T.bitwise_and(bits, const_like(bits, _ABS)), const_like(bits, _f32_bits(e2m1.MAX)))
    rounded = _round_to_mantissa(named(bits_as(held, "float32")), 1, 1.0)
    sign = T.bitwise_and(bits, const_like(bits, _SIGN))
    return bits_as(T.bitwise_or(bits_as(named(rounded), "int32"), sign), "float32")


@kernel("dynamic_nvfp4")
def dynamic_nvfp4(spec: KernelSpec, isa: Isa, symbol: str) -> Any:
    """y = E2M1(x / s) s by blocks of 16 along a row, the last one shorter: s = E4M3(max|x| / (6 a)) a.

    Arguments: y [rows, n], x [rows, n], global_scale a [1], n. Block: 1 row. See
    `qgraph.formats.activations.dynamic_nvfp4`.
    """
    lanes = isa.lanes
    with function(symbol, [(name, "float32") for name in ("y", "x", "global_scale")], ["n"]) as f:
        x, y, n = f.buffers["x"], f.buffers["y"], f.scalars["n"]
        a = named(f.buffers["global_scale"][index(0)])
        top = named(a * splat(e2m1.MAX, "float32", 1))
        with B.serial(f.scalars["begin"], f.scalars["end"]) as row:
            base = B.bind(row * n)

            def block(start: Expr, count: Expr | None) -> None:
                at = [base + start + index(u) for u in range(0, BLOCK, lanes)]
                left = [None if count is None else count - index(u) for u in range(0, BLOCK, lanes)]
                parts = [
                    named(load(x, i, lanes) if c is None else load_first(x, i, c, lanes))
                    for i, c in zip(at, left, strict=True)
                ]
                largest = named(magnitude_bits(parts[0]))
                for part in parts[1:]:
                    largest = named(T.max(largest, magnitude_bits(part)))
                amax = named(bits_as(reduce_lanes(T.max, largest), "float32"))
                scale = named(round_e4m3(amax / top) * a)
                s = named(T.broadcast(scale, lanes))
                for part, i, c in zip(parts, at, left, strict=True):
                    value = named(round_e2m1(part / s)) * s
                    if c is None:
                        store(y, value, i)
                    else:
                        store_first(y, value, i, c, lanes)

            each_vector(n, BLOCK, block)
    return f.result


@kernel("dynamic_int8")
def dynamic_int8(spec: KernelSpec, isa: Isa, symbol: str) -> Any:
    """y = round(x / s) s by rows, to even, s = max(max|row| / 127, 2^-126).

    Arguments: y [rows, n], x [rows, n], n. Block: 1 row. See `qgraph.formats.activations.dynamic_int8`.
    """
    lanes = isa.lanes
    with function(symbol, [("y", "float32"), ("x", "float32")], ["n"]) as f:
        x, y, n = f.buffers["x"], f.buffers["y"], f.scalars["n"]
        with B.serial(f.scalars["begin"], f.scalars["end"]) as row:
            base = B.bind(row * n)
            s = int8_scale(x, base, n, lanes)

            def finish(start: Expr, count: Expr | None) -> None:
                wide = T.broadcast(s, lanes)
                q = round_even(load(x, base + start, lanes, count) / wide)
                store(y, q * wide, base + start, count)

            each_vector(n, lanes, finish)
    return f.result


@kernel("store_int8")
def store_int8(spec: KernelSpec, isa: Isa, symbol: str) -> Any:
    """Rows as int8 codes and a scale each: codes[i] scale is what `dynamic_int8` makes of x[i], but for the
    sign of zeros. A row that is NaN there has scale NaN, or infinity and codes 0.

    Arguments: codes i8, scale f32, x f32, n, H, S: rows are [batch, H, S], strides of x xs_b, xs_h, xs_s, of
    codes cs_b, cs_h, of scale ss_b, ss_h. The rows of a head lie one behind the other in codes and in scale.
    Block: 1 row.
    """
    lanes = isa.lanes
    pointers = [("codes", "int8"), ("scale", "float32"), ("x", "float32")]
    strides = ["xs_b", "xs_h", "xs_s", "cs_b", "cs_h", "ss_b", "ss_h"]
    with function(symbol, pointers, ["n", "H", "S", *strides]) as f:
        x, codes, n, v = f.buffers["x"], f.buffers["codes"], f.scalars["n"], f.scalars
        with B.serial(v["begin"], v["end"]) as row:
            i_s, head = B.bind(T.truncmod(row, v["S"])), B.bind(T.truncdiv(row, v["S"]))
            i_h, i_b = B.bind(T.truncmod(head, v["H"])), B.bind(T.truncdiv(head, v["H"]))
            base = B.bind(i_b * v["xs_b"] + i_h * v["xs_h"] + i_s * v["xs_s"])
            to = B.bind(i_b * v["cs_b"] + i_h * v["cs_h"] + i_s * n)
            s = int8_scale(x, base, n, lanes)
            B.buffer_store(f.buffers["scale"], s, [i_b * v["ss_b"] + i_h * v["ss_h"] + i_s])

            def finish(start: Expr, count: Expr | None) -> None:
                q = int8_codes(load(x, base + start, lanes, count), T.broadcast(s, lanes))
                store(codes, convert(q, "int8"), to + start, count)

            each_vector(n, lanes, finish)
    return f.result


def int8_scale(x: Any, base: Expr, n: Expr, lanes: int) -> Expr:
    """max(max|row| / 127, 2^-126) of the row of n elements at `base`; NaN where an element is."""
    return int8_scale_of(
        accumulate(
            n,
            splat(0, "int32", lanes),
            T.max,
            lambda start, count: magnitude_bits(named(load(x, base + start, lanes, count))),
        )
    )


def int8_scale_of(largest: Expr) -> Expr:
    """The same of the bits of a row's largest magnitude."""
    # Named, or TVM's simplifier would multiply by 1 / 127 in place of the division.
    top = named(splat(INT8_MAX, "float32", 1))
    ratio = named(named(bits_as(largest, "float32")) / top)
    # A maximum that keeps NaN: TIR's gives its second operand when unordered.
    return named(T.max(splat(SMALLEST_NORMAL, "float32", 1), ratio))


def int8_codes(x: Expr, scale: Expr) -> Expr:
    """round(x / scale), a NaN as 0: float32 in -127 .. 127, as `scale` is that of the row."""
    q = named(round_even(x / scale))
    bits = named(magnitude_bits(q))
    return named(T.Select(bits > const_like(bits, _EXPONENT), const_like(q, 0.0), q))


def round_even(x: Expr) -> Expr:
    """The nearest integer, ties to even; a zero keeps its sign."""
    return named(T.nearbyint(named(x)))
