"""Elementwise kernels: one thread an element."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.cuda.kernels import CudaKernel, kernel
from qgraph.codegen.cuda.kernels.frame import device_function
from qgraph.codegen.kernels import ops
from qgraph.codegen.kernels.elementwise import Expression
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.ops import STORAGE, Value
from qgraph.codegen.kernels.vmath import Expr
from qgraph.codegen.spec import CUDA_ELEMENTWISE_BLOCK, KernelSpec
from qgraph.errors import QGraphError

_THREADS = 256


@kernel("elementwise")
def elementwise(spec: KernelSpec, symbol: str) -> CudaKernel:
    """Block: `CUDA_ELEMENTWISE_BLOCK` elements of all, in row-major order, whatever the rank."""
    rank, dtypes = spec["rank"], [spec["out"], *spec["inputs"]]
    inners = [spec["out_inner"], *spec["in_inner"]]
    names = ["out", *(f"in{i}" for i in range(len(dtypes) - 1))]
    strides = [
        [f"{name}_s{i}" for i in range(rank if inner == "s" else rank - 1)]
        for name, inner in zip(names, inners, strict=True)
    ]
    dims, args = [f"d{i}" for i in range(rank)], [f"arg{i}" for i in range(spec["args"])]
    scalars = [*dims, *(s for operand in strides for s in operand), *args]
    pointers = [(n, STORAGE[d]) for n, d in zip(names, dtypes, strict=True)]
    with device_function(symbol, pointers, scalars, _THREADS) as f:
        sizes = [f.scalars[d] for d in dims]
        total: Any = index(1)
        for size in sizes:
            total = total * size
        total = B.bind(total)

        def offset(operand: int, position: list[Expr]) -> Expr:
            own = [f.scalars[s] for s in strides[operand]]
            if inners[operand] != "s":
                own.append(index(int(inners[operand])))
            at: Expr = index(0)
            for i, stride in zip(position, own, strict=True):
                at = at + i * stride
            return at

        first = B.bind(f.block * CUDA_ELEMENTWISE_BLOCK + T.Cast("int64", f.thread))
        with B.serial(index(CUDA_ELEMENTWISE_BLOCK // _THREADS)) as i:
            flat = B.bind(first + i * _THREADS)
            with B.If(flat < total), B.Then():
                position: list[Expr] = []
                rest = flat
                for size in reversed(sizes[1:]):
                    position.insert(0, B.bind(T.truncmod(rest, size)))
                    rest = B.bind(T.truncdiv(rest, size))
                position.insert(0, rest)

                def load(k: int) -> Value:
                    item = f.buffers[names[k + 1]][offset(k + 1, position)]
                    return ops.from_memory(dtypes[k + 1], item)

                expression = Expression(load, position, [f.scalars[a] for a in args], position[-1], 1)
                result = expression.value(spec["expr"])
                if result.dtype != spec["out"]:
                    raise QGraphError(
                        f"elementwise kernel: the expression is {result.dtype}, not {spec['out']}"
                    )
                B.buffer_store(f.buffers["out"], result.expr, [offset(0, position)])
    return CudaKernel(f.result, _THREADS)
