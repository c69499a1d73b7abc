"""Normalisation over the last axis: layer_norm (and RMSNorm) and softmax. One block is one row.

Every sum runs over vectors in a fixed order, so a row's result depends on nothing but the row.
"""

from __future__ import annotations

import math
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels import kernel
from qgraph.codegen.kernels.function import function
from qgraph.codegen.kernels.loops import accumulate, each_vector, index, keep, load, store
from qgraph.codegen.kernels.vmath import Expr, named, splat, vexp_nonpositive, vlog
from qgraph.codegen.spec import KernelSpec


def _f32(value: float) -> Expr:
    return splat(value, "float32", 1)


@kernel("layer_norm")
def layer_norm(spec: KernelSpec, isa: Isa, symbol: str) -> Any:
    """y = (x - mean) / sqrt(variance + eps) * scale [+ bias]; with rms, y = x / sqrt(mean(x^2) + eps) * scale
    [+ bias].

    Parameters: n (row length, >= 1), eps, rms, bias (bools). float32 throughout, mean and variance in two
    passes.
    Arguments: y [rows, n], x [rows, n], scale [n], [bias [n],] rows. Block: 1 row.
    """
    n, lanes = index(spec["n"]), isa.lanes
    names = ["y", "x", "scale", *(["bias"] if spec["bias"] else [])]
    zero = splat(0.0, "float32", lanes)

    def vector(scalar: Expr) -> Expr:
        return T.broadcast(scalar, lanes)

    with function(symbol, [(name, "float32") for name in names], ["rows"]) as f:
        x, y, scale = f.buffers["x"], f.buffers["y"], f.buffers["scale"]
        with B.serial(f.scalars["begin"], f.scalars["end"]) as row:
            base = B.bind(row * n)

            def mean(term: Any) -> Expr:
                return named(accumulate(n, zero, lambda a, b: a + b, term) / _f32(spec["n"]))

            def centred(start: Expr, count: Expr | None, mu: Expr | None) -> Expr:
                value = load(x, base + start, lanes, count)
                return named(value if mu is None else keep(value - vector(mu), count, zero))

            def square(start: Expr, count: Expr | None, mu: Expr | None) -> Expr:
                d = centred(start, count, mu)
                return d * d

            mu = None if spec["rms"] else mean(lambda s, c: load(x, base + s, lanes, c))
            power = mean(lambda s, c: square(s, c, mu))
            inverse = named(_f32(1.0) / T.sqrt(power + _f32(spec["eps"])))

            def finish(start: Expr, count: Expr | None) -> None:
                value = centred(start, count, mu) * vector(inverse) * load(scale, start, lanes, count)
                if spec["bias"]:
                    value = value + load(f.buffers["bias"], start, lanes, count)
                store(y, value, base + start, count)

            each_vector(n, lanes, finish)
    return f.result


@kernel("softmax")
def softmax(spec: KernelSpec, isa: Isa, symbol: str) -> Any:
    """y = e^(x - max) / sum e^(x - max); with log, x - max - log(sum e^(x - max)). Rows of n >= 0 float32.

    Parameters: log (bool). Arguments: y [rows, n], x [rows, n], n. Block: 1 row.
    A row of -inf alone, or with a NaN or +inf, is NaN.
    """
    lanes = isa.lanes
    lowest, zero = splat(-math.inf, "float32", lanes), splat(0.0, "float32", lanes)

    with function(symbol, [("y", "float32"), ("x", "float32")], ["n"]) as f:
        x, y, n = f.buffers["x"], f.buffers["y"], f.scalars["n"]
        with B.serial(f.scalars["begin"], f.scalars["end"]) as row:
            base = B.bind(row * n)
            # max need not keep NaN: a NaN reaches the sum through its own exponential.
            top = accumulate(n, lowest, T.max, lambda s, c: keep(load(x, base + s, lanes, c), c, lowest))

            def shifted(start: Expr, count: Expr | None) -> Expr:
                return named(load(x, base + start, lanes, count) - T.broadcast(top, lanes))

            def exponential(start: Expr, count: Expr | None) -> Expr:
                e = named(keep(vexp_nonpositive(shifted(start, count)), count, zero))
                if not spec["log"]:
                    store(y, e, base + start, count)
                return e

            total = accumulate(n, zero, lambda a, b: a + b, exponential)
            last = named(vlog(total) if spec["log"] else _f32(1.0) / total)

            def finish(start: Expr, count: Expr | None) -> None:
                if spec["log"]:
                    value = shifted(start, count) - T.broadcast(last, lanes)
                else:
                    value = load(y, base + start, lanes, count) * T.broadcast(last, lanes)
                store(y, value, base + start, count)

            each_vector(n, lanes, finish)
    return f.result
