"""Reduction of one axis of [outer, n, inner]. A block of threads does one outer index."""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B
from tvm.tirx import EQ

from qgraph.codegen.cuda.kernels import CudaKernel, kernel
from qgraph.codegen.cuda.kernels.frame import device_function, strided
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.ops import STORAGE, int_div
from qgraph.codegen.kernels.reduce import bounds_of, check_reduce, first_nan
from qgraph.codegen.kernels.vmath import Expr, convert, named, splat
from qgraph.codegen.spec import KernelSpec

_THREADS = 256


@kernel("reduce")
def reduce(spec: KernelSpec, symbol: str) -> CudaKernel:
    """Where inner is 1 all threads share the axis, else each has columns of its own."""
    op, dtype = spec["op"], spec["dtype"]
    check_reduce(op, dtype)
    floating, element = dtype == "f32", STORAGE[dtype]
    lowest, highest = bounds_of(dtype)
    neutral = splat({"max": lowest, "min": highest, "prod": 1}.get(op, 0), element, 1)

    def combine(a: Expr, b: Expr) -> Expr:
        if op in ("max", "min"):
            either = T.max if op == "max" else T.min
            return first_nan(either)(a, b) if floating else either(a, b)
        return a * b if op == "prod" else a + b

    together = {"max": "max", "min": "min", "prod": "prod"}.get(op, "sum")

    with device_function(symbol, [("y", element), ("x", element)], ["n", "inner"], _THREADS) as f:
        x, y, n, inner = f.buffers["x"], f.buffers["y"], f.scalars["n"], f.scalars["inner"]
        acc = B.alloc_buffer((1,), element, scope="local")

        def add(at: Expr) -> None:
            value = named(x[at])
            if op in ("sumsq", "l2"):
                value = named(value * value)
            B.buffer_store(acc, combine(named(acc[0]), value), [0])

        def result(value: Expr) -> Expr:
            if op == "l2":
                return T.sqrt(value)
            if op != "mean":
                return value
            size = convert(n, element)
            return value / size if floating else int_div(value, size)

        with B.If(EQ(inner, index(1))):
            with B.Then():
                B.buffer_store(acc, neutral, [0])
                strided(f, n, lambda i: add(f.block * n + i))
                total = f.reduce(together, acc[0])
                with B.If(EQ(f.thread, 0)), B.Then():
                    B.buffer_store(y, result(total), [f.block])
            with B.Else():

                def column(i: Expr) -> None:
                    B.buffer_store(acc, neutral, [0])
                    with B.serial(n) as k:
                        add((f.block * n + k) * inner + i)
                    B.buffer_store(y, result(named(acc[0])), [f.block * inner + i])

                strided(f, inner, column)
    return CudaKernel(f.result, _THREADS)
