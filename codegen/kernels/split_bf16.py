"""Activations as bfloat16 for products in tiles (codegen/bf16_rows.py): the forms of split_digits.py and
quantize_int8.py where the weights are NVFP4. One block is one row."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.bf16_rows import INPUTS, ROWS, WORDS, parts_of
from qgraph.codegen.digits import FEW_ROWS
from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels import TILED, kernel
from qgraph.codegen.kernels.dynamic_quantize import int8_codes, int8_scale
from qgraph.codegen.kernels.function import Function, function
from qgraph.codegen.kernels.loops import index, load
from qgraph.codegen.kernels.tiled import call_base, flat
from qgraph.codegen.kernels.vector import lanes_at, load_first
from qgraph.codegen.kernels.vmath import Expr, bits_as, const_like, named
from qgraph.codegen.packing import LANES
from qgraph.codegen.spec import KernelSpec

_INFINITY, _NAN, _LARGEST = 0x7F800000, 0x7FC00000, 0x7F7F0000  # the last is bfloat16's
_UPPER, _MAGNITUDE = -0x10000, 0x7FFFFFFF  # of int32


@kernel("split_digits", TILED)
def split_parts(spec: KernelSpec, isa: Isa, symbol: str) -> Any:
    """Rows as parts of bfloat16, of more than FEW_ROWS rows; fewer are split into digits.

    Three parts add up to the input itself; two to within 2^-16 of it, one to within 2^-9, relative to it. The
    last is rounded to nearest, and where that is infinity to the largest bfloat16; an infinity, or NaN, is
    the first part, and the others are 0. Spec, arguments: those of `split_digits`.
    """
    parts, pointers = parts_of(spec), [("digits", "int32"), ("x", "float32")]
    with function(symbol, pointers, ["M"]) as f:
        x = f.buffers["x"]

        def split(values: list[Expr]) -> list[list[Expr]]:
            return [list(of) for of in zip(*(_parts(value, parts) for value in values), strict=True)]

        _each_row(spec, f, pointers, parts, lambda row: (x, split))
    return f.result


@kernel("quantize_int8", TILED)
def quantize_bf16(spec: KernelSpec, isa: Isa, symbol: str) -> Any:
    """The codes of `quantize_int8`, of more than FEW_ROWS rows, as bfloat16, which they are exactly, in one
    part; block sums are not written. Spec, arguments: those of `quantize_int8`."""
    pointers = [("codes", "int8"), ("scale", "float32"), ("block_sums", "int32"), ("x", "float32")]
    with function(symbol, pointers, ["M"]) as f:
        x, k = f.buffers["x"], spec["k"]

        def scaled(row: Expr) -> tuple[Any, Any]:
            s = int8_scale(x, row * k, index(k), isa.lanes)
            B.buffer_store(f.buffers["scale"], s, [row])
            wide = named(T.broadcast(s, LANES))
            return x, lambda values: [[bits_as(int8_codes(named(v), wide), "int32") for v in values]]

        _each_row(spec, f, pointers, 1, scaled)
    return f.result


def _each_row(
    spec: KernelSpec, f: Function, pointers: list[tuple[str, str]], parts: int, open_row: Any
) -> None:
    """Emits the body: open_row(row) gives what is read and a function from the vectors of two times 16 inputs
    to those of each part, as the int32 bits of float32."""
    k, M, begin, end = spec["k"], *(f.scalars[name] for name in ("M", "begin", "end"))
    out = flat(f.buffers[pointers[0][0]], "int32")
    with B.If(M <= FEW_ROWS), B.Then():
        call_base(spec, f, [name for name, _ in pointers], [M, begin, end])
    with B.If(M > FEW_ROWS), B.Then(), B.serial(begin, end) as row:
        x, split = open_row(row)
        tile, steps = T.truncdiv(row, index(ROWS)), -(-k // INPUTS)
        first = B.bind((tile * (steps * parts * ROWS) + T.truncmod(row, index(ROWS))) * WORDS)

        def put(block: Expr, halves: list[Expr]) -> None:
            for part, (low, high) in enumerate(split(halves)):
                words = bits_as(low, "uint32") >> const_like(bits_as(low, "uint32"), 16)
                words = bits_as(words, "int32") | (high & const_like(high, _UPPER))
                at = first + (block * parts + part) * (ROWS * WORDS)
                B.buffer_store(out, words, [lanes_at(at, LANES)])

        if full := k // INPUTS:
            with B.serial(index(full)) as block:
                start = row * k + block * INPUTS
                put(block, [named(load(x, start + half * LANES, LANES)) for half in range(2)])
        if k % INPUTS:
            start, left = row * k + full * INPUTS, [k % INPUTS, k % INPUTS - LANES]
            put(
                index(full),
                [
                    named(load_first(x, start + half * LANES, index(max(n, 0)), LANES))
                    for half, n in enumerate(left)
                ],
            )


def _parts(x: Expr, count: int) -> list[Expr]:
    """int32 bits of float32 lanes, whose upper halves are the parts of x; all but the last are truncated."""
    found = []
    bits = named(bits_as(x, "int32"))
    for _ in range(count - 1):
        magnitude = bits & const_like(bits, _MAGNITUDE)
        # A NaN must not lose the bits that make it one.
        top = named(T.Select(magnitude > const_like(bits, _INFINITY), const_like(bits, _NAN), bits))
        found.append(top)
        kept = bits_as(top & const_like(bits, _UPPER), "float32")
        rest = bits_as(named(bits_as(bits, "float32") - kept), "int32")
        special = named(bits & const_like(bits, _MAGNITUDE)) >= const_like(bits, _INFINITY)
        bits = named(T.Select(special, const_like(bits, 0), rest))
    magnitude = named(bits & const_like(bits, _MAGNITUDE))
    up = ((magnitude >> const_like(bits, 16)) & const_like(bits, 1)) + const_like(bits, 0x7FFF)
    rounded = named(T.min(magnitude + up, const_like(bits, _LARGEST | 0xFFFF)))
    rounded = named(T.Select(magnitude < const_like(bits, _INFINITY), rounded, magnitude))
    nan = named(T.Select(magnitude > const_like(bits, _INFINITY), const_like(bits, _NAN), rounded))
    return [*found, named(nan | (bits & const_like(bits, -0x80000000)))]
