"""Float32 activations as integers of three signed bytes, for products with them in integers
(matmul_digits.py). One block is one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.digits import DIGITS, FEW_ROWS, DigitRows, many_digits
from qgraph.codegen.int8_input import Int8Input
from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels import kernel
from qgraph.codegen.kernels.function import UNBOUNDED, Function, function
from qgraph.codegen.kernels.loops import index, load
from qgraph.codegen.kernels.quantize_int8 import byte_order
from qgraph.codegen.kernels.vector import lanes_at, load_first, reduce_lanes
from qgraph.codegen.kernels.vmath import Expr, bits_as, const_like, convert, named, splat
from qgraph.codegen.packing import LANES
from qgraph.codegen.spec import KernelSpec

_ROUNDS_UP = 0x020000  # what takes mantissas of 1.984 and up to the next exponent: 2^22 of those is too much
_UP = 22  # the exponent that a block's largest input gets, of three digits
_PEAKS = {1: 127, 2: 127 * 257}  # what it gets of fewer: the largest number that they can stand for
_LEAST, _MOST = 23, 227  # bounds of that input's own exponent, biased

Body = Callable[[Expr, Expr], None]


@kernel("split_digits")
def split_digits(spec: KernelSpec, isa: Isa, symbol: str) -> Any:
    """Rows as integers q = d + 256 e + 65536 f, digits in -128 .. 127, with a scale a block: x = scale q.

    The scale is a power of two, at most 1.01 2^-22 of the largest magnitude of the block, and q is rounded to
    nearest: |x - scale q| <= 2^-23 max |x|. A block below 2^-104 has the scale 2^-126.

    With fewer digits the scale is such that a block's largest magnitude becomes 127, or 32639 of two digits:
    |x - scale q| <= 2^-8 max |x|, or 2^-16.

    Spec: k, and fields, block, offset of an `Int8Input`; digits, where more than FEW_ROWS rows get fewer than
    three, or parts, of bfloat16 (split_bf16.py). Arguments: digits i32 [M, words], as `DigitRows`
    (codegen/digits.py) says, digits of padding 0; x f32 [M, k]; M. A row with NaN, an infinity or a number of
    2^101 and up has the flag 0, and blocks that mean nothing. Block: 1 row.
    """
    many = many_digits(spec, isa)
    with function(symbol, [("digits", "int32"), ("x", "float32")], ["M"]) as f:
        if many == DIGITS:
            _split(spec, f, DIGITS)
        else:
            few = f.scalars["M"] <= FEW_ROWS
            with B.If(few), B.Then():
                _split(spec, f, DIGITS)
            with B.If(T.Not(few)), B.Then():
                _split(spec, f, many)
    return f.result


def _split(spec: KernelSpec, f: Function, count: int) -> None:
    """Emits the body, for so many digits."""
    k = spec["k"]
    rows = DigitRows(Int8Input(spec["fields"], spec["block"], spec["offset"]), k, count)
    block, lowest = rows.input.block, 0x808080 >> 8 * (DIGITS - count)
    words, x, every = f.buffers["digits"], f.buffers["x"], lanes_at(index(0), LANES)
    bytes_ = B.decl_buffer((UNBOUNDED,), "int8", data=words.data)
    order = byte_order(rows.input.fields)

    def each(place: Expr, size: int, body: Body) -> None:
        """body(at, inputs) for every vector of the `size` inputs from `place`, where `at` is 0."""
        if full := size // LANES:
            with B.serial(index(full)) as v:
                body(v * LANES, load(x, place + v * LANES, LANES))
        if rest := size % LANES:
            at = index(full * LANES)
            body(at, load_first(x, place + at, index(rest), LANES))

    def one(row: Expr, b: Expr, size: int, flag: Any) -> None:
        """Block b of a row, of which there are `size` inputs."""
        place, to = B.bind(row * k + b * block), B.bind(row * rows.words + b * rows.record)
        largest = B.alloc_buffer((LANES,), "int32", scope="local")
        B.buffer_store(largest, splat(0, "int32", LANES), [every])

        def seek(at: Expr, value: Expr) -> None:
            # As integers, of which those of NaN are above those of infinity, and these above the rest.
            magnitude = bits_as(value, "int32") & splat(0x7FFFFFFF, "int32", LANES)
            B.buffer_store(largest, T.max(largest[every], magnitude), [every])

        each(place, size, seek)
        top = named(reduce_lanes(T.max, named(largest[every])))
        exponent = named(T.shift_right(top + T.int32(_ROUNDS_UP), T.int32(23)))
        fits = named(T.cast(exponent <= T.int32(_MOST), "int32"))
        B.buffer_store(flag, flag[0] & fits, [0])
        bounded = named(T.max(T.min(exponent, T.int32(_MOST)), T.int32(_LEAST)))
        if count == DIGITS:
            scale, factor = _power(bounded - T.int32(_UP)), _power(T.int32(254 + _UP) - bounded)
        else:
            # A block that is 0, or nearly so, or cannot be split, gets what keeps both finite.
            fitting = T.max(T.min(top, T.int32((_MOST + 1) << 23)), T.int32(_LEAST << 23))
            top = named(T.reinterpret("float32", fitting))
            peak = T.float32(_PEAKS[count])
            scale, factor = top / peak, peak / top
        scale, up = named(scale), named(T.broadcast(named(factor), LANES))
        kept = named(T.broadcast(T.int32(0) - fits, LANES))
        sums = B.alloc_buffer((count, LANES), "int32", scope="local")
        for d in range(count):
            B.buffer_store(sums, splat(0, "int32", LANES), [index(d), every])

        def write(at: Expr, value: Expr) -> None:
            # What cannot be split is taken for 0: its conversion to an integer is not defined.
            finite = T.reinterpret(f"float32x{LANES}", bits_as(value, "int32") & kept)
            q = convert(T.nearbyint(finite * up), "int32")
            digits = named((q + const_like(q, lowest)) ^ const_like(q, lowest))
            for d in range(count):
                shift = const_like(digits, 8 * (count - 1 - d))
                digit = named(convert(T.shift_right(digits, shift), "int8"))
                here = [index(d), every]
                B.buffer_store(sums, sums[here] + convert(digit, "int32"), here)
                start = to * 4 + d * block + at
                B.buffer_store(bytes_, T.Shuffle([digit], order), [lanes_at(start, LANES)])

        each(place, size, write)
        for d in range(count):
            for at in range(-(-size // LANES) * LANES, block, LANES):
                start = to * 4 + d * block + at
                B.buffer_store(bytes_, splat(0, "int8", LANES), [lanes_at(start, LANES)])
        *first, least = (
            named(reduce_lanes(lambda p, q: p + q, named(sums[index(d), every]))) for d in range(count)
        )
        factor = T.int32(rows.input.factor)
        high = named(first[0] * factor) if count == DIGITS else T.int32(0)
        low = named((first[-1] * 256 + least if first else least) * factor)
        total = T.cast(low, "float32")
        if count == DIGITS:
            total = T.fma(T.cast(high, "float32"), T.float32(65536), total)
        total = total * scale
        extra = {rows.HIGH: high, rows.LOW: low}
        extra |= {rows.SCALE: T.reinterpret("int32", scale), rows.TOTAL: T.reinterpret("int32", total)}
        for name, value in extra.items():
            B.buffer_store(words, value, [to + rows.extra + name])

    with B.serial(f.scalars["begin"], f.scalars["end"]) as row:
        flag = B.alloc_buffer((1,), "int32", scope="local")
        B.buffer_store(flag, T.int32(1), [0])
        if k >= block:
            with B.serial(index(k // block)) as b:
                one(row, b, block, flag)
        if k % block:
            one(row, index(k // block), k % block, flag)
        B.buffer_store(words, flag[0], [row * rows.words + rows.flag])


def _power(biased: Expr) -> Expr:
    """The power of two with this exponent, float32."""
    return T.reinterpret("float32", T.shift_left(biased, T.int32(23)))
