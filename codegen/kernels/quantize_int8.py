"""Activations as int8 codes, for products in integers (matmul_int8.py). One block is one row."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels import kernel
from qgraph.codegen.kernels.dynamic_quantize import int8_codes, int8_scale
from qgraph.codegen.kernels.function import function
from qgraph.codegen.kernels.loops import index, load
from qgraph.codegen.kernels.vector import lanes_at, load_first, reduce_lanes
from qgraph.codegen.kernels.vmath import Expr, convert, named, splat
from qgraph.codegen.packing import LANES
from qgraph.codegen.spec import KernelSpec


@kernel("quantize_int8")
def quantize_int8(spec: KernelSpec, isa: Isa, symbol: str) -> Any:
    """Rows as int8 codes with a scale: scale[m] times the code of an input is what `dynamic_int8` makes of
    it, but for the sign of zeros. A row that is NaN there has codes 0 and scale NaN or infinity.

    Spec: k, and fields, block, factor of an `Int8Input` (codegen/int8_input.py), in whose order codes are.
    Arguments: codes i8 [M, B block], B = ceil(k/block), 0 beyond k, scale f32 [M], block_sums i32 [M, B]:
    factor times the sum of a block's codes; x f32 [M, k]; M. Block: 1 row.
    """
    k, block = spec["k"], spec["block"]
    blocks, whole = -(-k // block), k - k % LANES
    order = byte_order(spec["fields"])
    pointers = [("codes", "int8"), ("scale", "float32"), ("block_sums", "int32"), ("x", "float32")]
    with function(symbol, pointers, ["M"]) as f:
        x, codes, sums = f.buffers["x"], f.buffers["codes"], f.buffers["block_sums"]
        with B.serial(f.scalars["begin"], f.scalars["end"]) as row:
            base, to = B.bind(row * k), B.bind(row * (blocks * block))
            s = int8_scale(x, base, index(k), isa.lanes)
            B.buffer_store(f.buffers["scale"], s, [row])
            wide = named(T.broadcast(s, LANES))
            total = B.alloc_buffer((LANES,), "int32", scope="local")
            every = lanes_at(index(0), LANES)

            def vector(start: Expr, count: int | None) -> None:
                part = load(x, base + start, LANES) if count is None else _first(x, base + start, count)
                q = named(convert(int8_codes(named(part), wide), "int32"))
                B.buffer_store(total, total[every] + q, [every])
                B.buffer_store(codes, T.Shuffle([convert(q, "int8")], order), [lanes_at(to + start, LANES)])

            def finish(b: Expr) -> None:
                value = named(reduce_lanes(lambda p, q: p + q, named(total[every])))
                B.buffer_store(sums, value * T.int32(spec["factor"]), [row * blocks + b])

            def clear() -> None:
                B.buffer_store(total, splat(0, "int32", LANES), [every])

            if k >= block:
                with B.serial(index(k // block)) as b:
                    clear()
                    with B.serial(index(block // LANES)) as v:
                        vector(b * block + v * LANES, None)
                    finish(b)
            if k % block:
                start = k // block * block
                clear()
                if whole > start:
                    with B.serial(index((whole - start) // LANES)) as v:
                        vector(start + v * LANES, None)
                if whole < k:
                    vector(index(whole), k - whole)
                padded = -(-k // LANES) * LANES
                if padded < blocks * block:
                    with B.serial(index((blocks * block - padded) // LANES)) as v:
                        zeros = splat(0, "int8", LANES)
                        B.buffer_store(codes, zeros, [lanes_at(to + padded + v * LANES, LANES)])
                finish(index(k // block))
    return f.result


def byte_order(fields: int) -> list[int]:
    """The order of an `Int8Input`, of vectors of 16 inputs on every ISA: so many that the longest order is a
    shuffle within one."""
    words = range(0, LANES, 4 * fields)
    return [start + fields * q + field for start in words for field in range(fields) for q in range(4)]


def _first(x: Any, start: Expr, count: int) -> Expr:
    return load_first(x, start, index(count), LANES)
