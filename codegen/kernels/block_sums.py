"""Sums of blocks of the last axis, which weights with an offset a block are multiplied by (matmul.py)."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as B

from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels import kernel
from qgraph.codegen.kernels.function import function
from qgraph.codegen.kernels.loops import accumulate, index, load
from qgraph.codegen.kernels.vector import f32
from qgraph.codegen.kernels.vmath import Expr
from qgraph.codegen.spec import KernelSpec


@kernel("block_sums")
def block_sums(spec: KernelSpec, isa: Isa, symbol: str) -> Any:
    """y[m, b] = sum of x[m, block b : block (b + 1)], the last one as far as there is.

    Spec: k, block. Arguments: y f32 [M, ceil(k/block)], x f32 [M, k]. Block: 1 row. The order of a sum is
    fixed by k and block; a NaN or an infinity makes its sum one of the two.
    """
    k, block, lanes = spec["k"], spec["block"], isa.lanes
    blocks = -(-k // block)
    with function(symbol, [("y", "float32"), ("x", "float32")], []) as f:
        x, y = f.buffers["x"], f.buffers["y"]

        def add(row: Expr, b: Expr, size: int) -> None:
            start = row * k + b * block

            def term(at: Expr, count: Expr | None) -> Expr:
                return load(x, start + at, lanes, count)

            total = accumulate(index(size), f32(0, lanes), lambda p, q: p + q, term)
            B.buffer_store(y, total, [row * blocks + b])

        with B.serial(f.scalars["begin"], f.scalars["end"]) as row:
            with B.serial(index(k // block)) as b:
                add(row, b, block)
            if k % block:
                add(row, index(k // block), k % block)
    return f.result
