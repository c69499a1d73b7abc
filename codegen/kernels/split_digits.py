"""Float32 activations as integers of three signed bytes, for products with them in integers
(matmul_digits.py). One block is one row."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels import kernel
from qgraph.codegen.kernels.function import function
from qgraph.codegen.kernels.loops import index, load
from qgraph.codegen.kernels.quantize_int8 import byte_order
from qgraph.codegen.kernels.vector import lanes_at, load_first, reduce_lanes
from qgraph.codegen.kernels.vmath import Expr, bits_as, const_like, convert, named, splat
from qgraph.codegen.packing import LANES
from qgraph.codegen.spec import KernelSpec

DIGITS = 3  # signed bytes: the numbers of 24 bits from -0x808080 to 0x7F7F7F
_BALANCED = 0x808080  # a digit's lowest value in every digit
_ABOVE = 0x020000  # takes what would round beyond 0x7F7F7F to the next exponent, as mantissas are 1.984 and up
_UP = 22  # a block's largest input is scaled to an exponent of this, or by _ABOVE of 21
_LEAST, _MOST = 23, 227  # biased exponents of it: below, the scale is that of the least; above, it is too large


@kernel("split_digits")
def split_digits(spec: KernelSpec, isa: Isa, symbol: str) -> Any:
    """Blocks of rows as integers q of 24 bits with a scale, a power of two: x = scale q, rounded to nearest.

    The scale is a 2^-22 part of a block's largest magnitude, so |x - scale q| <= 2^-23 max |x|, and what is
    within a factor of two of the largest is exact but for its last bit. Blocks below 2^-104 have the scale
    2^-126. The digits of q are d0 + 2^8 d1 + 2^16 d2, of -128 .. 127.

    Spec: k, and fields, block, factor of an `Int8Input` (codegen/int8_input.py), in whose order digits are.
    Arguments: digits i8 [M, 3, B block], B = ceil(k/block), 0 beyond k, scale f32 [M, B], sums i32 [M, B, 3]:
    factor times the sum of a block's digits; whole i32 [M]: 1, or 0 for a row with a NaN, an infinity or
    a number of 2^100 and up, whose blocks are not to be used; x f32 [M, k]. Block: 1 row.
    """
    k, block = spec["k"], spec["block"]
    blocks = -(-k // block)
    order = byte_order(spec["fields"])
    pointers = [("digits", "int8"), ("scale", "float32"), ("sums", "int32"), ("whole", "int32"), ("x", "float32")]
    with function(symbol, pointers, []) as f:
        x, every = f.buffers["x"], lanes_at(index(0), LANES)
        with B.serial(f.scalars["begin"], f.scalars["end"]) as row:
            whole = B.alloc_buffer((1,), "int32", scope="local")
            B.buffer_store(whole, T.int32(1), [0])

            def each(b: Expr, size: int, body: Any) -> None:
                """body(place in the row, vector of inputs) for every vector of a block's first `size` inputs."""
                start, full = b * block, size // LANES
                if full:
                    with B.serial(index(full)) as v:
                        body(start + v * LANES, load(x, row * k + start + v * LANES, LANES))
                if rest := size % LANES:
                    at = start + full * LANES
                    body(at, load_first(x, row * k + at, index(rest), LANES))

            def one(b: Expr, size: int) -> None:
                largest = B.alloc_buffer((LANES,), "int32", scope="local")
                B.buffer_store(largest, splat(0, "int32", LANES), [every])

                def seek(at: Expr, value: Expr) -> None:
                    # As integers: so NaN is above infinity, and that above all numbers.
                    magnitude = bits_as(value, "int32") & splat(0x7FFFFFFF, "int32", LANES)
                    B.buffer_store(largest, T.max(largest[every], magnitude), [every])

                each(b, size, seek)
                top = named(reduce_lanes(T.max, named(largest[every])))
                exponent = named(T.shift_right(top + T.int32(_ABOVE), T.int32(23)))
                fits = named(T.cast(exponent <= T.int32(_MOST), "int32"))
                B.buffer_store(whole, whole[0] & fits, [0])
                bounded = named(T.max(T.min(exponent, T.int32(_MOST)), T.int32(_LEAST)))
                unit = T.reinterpret("float32", T.shift_left(bounded - T.int32(_UP), T.int32(23)))
                B.buffer_store(f.buffers["scale"], unit, [row * blocks + b])
                up = T.reinterpret("float32", T.shift_left(T.int32(254 + _UP) - bounded, T.int32(23)))
                wide, mask = named(T.broadcast(up, LANES)), named(T.broadcast(T.int32(0) - fits, LANES))
                total = B.alloc_buffer((DIGITS, LANES), "int32", scope="local")
                for d in range(DIGITS):
                    B.buffer_store(total, splat(0, "int32", LANES), [index(d), every])

                def write(at: Expr, value: Expr) -> None:
                    kept = T.reinterpret(f"float32x{LANES}", bits_as(value, "int32") & mask)
                    q = convert(T.nearbyint(kept * wide), "int32")
                    digits = named((q + const_like(q, _BALANCED)) ^ const_like(q, _BALANCED))
                    for d in range(DIGITS):
                        digit = named(convert(T.shift_right(digits, const_like(digits, 8 * d)), "int8"))
                        here = [index(d), every]
                        B.buffer_store(total, total[here] + convert(digit, "int32"), here)
                        to = (row * DIGITS + d) * (blocks * block) + at
                        B.buffer_store(f.buffers["digits"], T.Shuffle([digit], order), [lanes_at(to, LANES)])

                each(b, size, write)
                for d in range(DIGITS):
                    value = named(reduce_lanes(lambda p, q: p + q, named(total[index(d), every])))
                    at = (row * blocks + b) * DIGITS + d
                    B.buffer_store(f.buffers["sums"], value * T.int32(spec["factor"]), [at])

            if k >= block:
                with B.serial(index(k // block)) as b:
                    one(b, block)
            if rest := k % block:
                one(index(k // block), rest)
                padded = -(-k // LANES) * LANES
                for d in range(DIGITS):
                    for at in range(padded, blocks * block, LANES):
                        to = (row * DIGITS + d) * (blocks * block) + at
                        B.buffer_store(f.buffers["digits"], splat(0, "int8", LANES), [lanes_at(to, LANES)])
            B.buffer_store(f.buffers["whole"], whole[0], [row])
    return f.result
