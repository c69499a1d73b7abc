"""Reduction of one axis of [outer, n, inner]. One block is one outer index."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B
from tvm.tirx import EQ

from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels import kernel
from qgraph.codegen.kernels.function import function
from qgraph.codegen.kernels.loops import ACCUMULATORS, accumulate, each_vector, index, keep, load, store
from qgraph.codegen.kernels.ops import STORAGE, int_div
from qgraph.codegen.kernels.vmath import Expr, convert, is_nan, lanes_of, let, named, splat
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import UnsupportedError


def first_nan(either: Callable[[Expr, Expr], Expr]) -> Callable[[Expr, Expr], Expr]:
    """TIR's min or max, so that it keeps a NaN."""
    # TIR's min and max give their second operand when unordered: keep a NaN in the first.
    return lambda a, b: T.Select(is_nan(a), a, either(a, b))


def bounds_of(dtype: str) -> tuple[int | float, int | float]:
    """Smallest and largest value; of floats, the infinities."""
    if dtype == "f32":
        return -math.inf, math.inf
    if dtype in ("u8", "bool"):
        return 0, 255
    bits = int(dtype[1:])
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def check_reduce(op: str, dtype: str) -> None:
    """UnsupportedError for what `reduce` does not do."""
    ok = {"f32": True, "i64": op != "l2", "i32": op != "l2"}.get(dtype, op in ("max", "min"))
    if not ok or dtype not in STORAGE:
        raise UnsupportedError(f"reduce kernel: no '{op}' of {dtype}")


@kernel("reduce")
def reduce(spec: KernelSpec, isa: Isa, symbol: str) -> Any:
    """y[o, i] = op over k of x[o, k, i], in the type of x.

    Parameters: op (sum mean max min prod sumsq l2), dtype: f32; i64 and i32 except l2; u8, i8 and bool for
    max and min.
    Arguments: y [outer, inner], x [outer, n, inner], n, inner. Block: 1 outer.
    n = 0 gives 0, of prod 1, of max and min the lowest and highest value (f32: infinities), of mean NaN
    (integers: 0). Integer sums wrap, an integer mean truncates; max and min propagate NaN. The order of a sum
    is fixed by n and inner.
    """
    op, dtype = spec["op"], spec["dtype"]
    check_reduce(op, dtype)
    floating, element, lanes = dtype == "f32", STORAGE[dtype], isa.lanes
    lowest, highest = bounds_of(dtype)
    neutral = {"max": lowest, "min": highest, "prod": 1}.get(op, 0)
    init = splat(neutral, element, lanes)
    combine: Callable[[Expr, Expr], Expr] = {
        "max": first_nan(T.max) if floating else T.max,
        "min": first_nan(T.min) if floating else T.min,
        "prod": lambda a, b: a * b,
    }.get(op, lambda a, b: a + b)

    with function(symbol, [("y", element), ("x", element)], ["n", "inner"]) as f:
        x, y, n, inner = f.buffers["x"], f.buffers["y"], f.scalars["n"], f.scalars["inner"]

        def term(value: Expr) -> Expr:
            return let(value, lambda v: v * v) if op in ("sumsq", "l2") else value

        def result(value: Expr) -> Expr:
            if op == "l2":
                return T.sqrt(value)
            if op != "mean":
                return value
            size = convert(n, element)
            size = size if lanes_of(value) == 1 else T.broadcast(size, lanes)
            return value / size if floating else int_div(value, size)

        with B.serial(f.scalars["begin"], f.scalars["end"]) as outer, B.If(EQ(inner, index(1))):
            with B.Then():
                base = B.bind(outer * n)

                def row_term(start: Expr, count: Expr | None) -> Expr:
                    return keep(term(load(x, base + start, lanes, count)), count, init)

                total = accumulate(n, init, combine, row_term)
                B.buffer_store(y, result(total), [outer])
            with B.Else():
                first = B.bind(outer * n * inner)

                def columns(start: Expr, vectors: int, count: Expr | None) -> None:
                    """Reduce `vectors` vectors of columns from `start`."""
                    acc = B.alloc_buffer((vectors * lanes,), element, scope="local")
                    at = [T.ramp(index(u * lanes), 1, lanes) for u in range(vectors)]
                    for u in range(vectors):
                        B.buffer_store(acc, init, [at[u]])
                    with B.serial(n) as k:
                        for u in range(vectors):
                            value = load(x, first + k * inner + start + u * lanes, lanes, count)
                            B.buffer_store(acc, combine(acc[at[u]], named(term(value))), [at[u]])
                    for u in range(vectors):
                        value = result(named(acc[at[u]]))
                        store(y, value, outer * inner + start + u * lanes, count)

                wide = ACCUMULATORS * lanes
                with B.serial(T.truncdiv(inner, index(wide))) as i:
                    columns(i * wide, ACCUMULATORS, None)
                done = B.bind(inner - T.truncmod(inner, index(wide)))
                each_vector(inner - done, lanes, lambda s, c: columns(done + s, 1, c))
    return f.result
