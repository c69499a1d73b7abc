"""Normalisation over the last axis. A block of threads does one row."""

from __future__ import annotations

import math
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.cuda.kernels import CudaKernel, kernel
from qgraph.codegen.cuda.kernels.frame import device_function, strided
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.vmath import Expr, const_like, named, vexp_nonpositive, vlog
from qgraph.codegen.spec import KernelSpec

_THREADS = 256


def _total(f: Any, op: str, size: Expr, start: float, term: Any) -> Expr:
    """op of term(i) for all i of [0, size), in all threads."""
    acc = B.alloc_buffer((1,), "float32", scope="local")
    B.buffer_store(acc, T.float32(start), [0])

    def add(i: Expr) -> None:
        value = named(term(i))
        B.buffer_store(acc, acc[0] + value if op == "sum" else T.max(value, acc[0]), [0])

    strided(f, size, add)
    return f.reduce(op, acc[0])


@kernel("layer_norm")
def layer_norm(spec: KernelSpec, symbol: str) -> CudaKernel:
    """Two passes, as on the CPU: the mean, then the variance of what is left."""
    n = index(spec["n"])
    names = ["y", "x", "scale", *(["bias"] if spec["bias"] else [])]
    with device_function(symbol, [(name, "float32") for name in names], ["rows"], _THREADS) as f:
        x, y = f.buffers["x"], f.buffers["y"]
        base = B.bind(f.block * spec["n"])
        size = T.float32(float(spec["n"]))
        mean = T.float32(0) if spec["rms"] else named(_total(f, "sum", n, 0.0, lambda i: x[base + i]) / size)

        def centred(i: Expr) -> Expr:
            return x[base + i] if spec["rms"] else x[base + i] - mean

        def square(i: Expr) -> Expr:
            d = named(centred(i))
            return d * d

        power = named(_total(f, "sum", n, 0.0, square) / size)
        inverse = named(T.float32(1) / T.sqrt(power + T.float32(spec["eps"])))

        def finish(i: Expr) -> None:
            value = centred(i) * inverse * f.buffers["scale"][i]
            if spec["bias"]:
                value = value + f.buffers["bias"][i]
            B.buffer_store(y, value, [base + i])

        strided(f, n, finish)
    return CudaKernel(f.result, _THREADS)


@kernel("softmax")
def softmax(spec: KernelSpec, symbol: str) -> CudaKernel:
    """Exponentials are kept in y between the two passes."""
    with device_function(symbol, [("y", "float32"), ("x", "float32")], ["n"], _THREADS) as f:
        x, y, n = f.buffers["x"], f.buffers["y"], f.scalars["n"]
        base = B.bind(f.block * n)
        top = _total(f, "max", n, -math.inf, lambda i: x[base + i])

        def exponential(i: Expr) -> Expr:
            e = named(vexp_nonpositive(named(x[base + i] - top)))
            if not spec["log"]:
                B.buffer_store(y, e, [base + i])
            return e

        total = _total(f, "sum", n, 0.0, exponential)
        last = named(vlog(total) if spec["log"] else const_like(total, 1.0) / total)
        scaled = (
            (lambda i: named(x[base + i] - top) - last) if spec["log"] else (lambda i: y[base + i] * last)
        )
        strided(f, n, lambda i: B.buffer_store(y, scaled(i), [base + i]))
    return CudaKernel(f.result, _THREADS)
