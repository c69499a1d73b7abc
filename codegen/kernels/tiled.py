"""The frame of products that are done in tiles (AMX), matmul_tiles.py and matmul_bf16.py.

Block b of the grid is chunk b // panels of `m_block` rows and panel b % panels of `n_block` columns, as of
every product. A call with few rows is passed on to the kernel that this one is a form of.

The panels that a call has of a chunk are done one after the other for a slab of inputs, then for the next: of
the activations so much is read again and again that a core's own cache has room for it. Until the last slab
y has the sums so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.digits import FEW_ROWS
from qgraph.codegen.kernels.amx import ROWS, Rows, configure, release
from qgraph.codegen.kernels.epilogue import Result, epilogue_pointers
from qgraph.codegen.kernels.function import UNBOUNDED, Function, function
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.vmath import Expr
from qgraph.codegen.kernels.weights import Operand
from qgraph.codegen.packing import LANES
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import QGraphError

CHUNK = 128  # rows that share decoded weights: their sums lie on the stack


class Product(Protocol):
    """Emits the sums of products of a kernel.

    Attributes:
        depth: bytes of a row of a tile of activations.
        padded: whether there is memory for whole tiles of activations, beyond row M - 1, too.
        slabs: of the inputs.
    """

    depth: int
    padded: bool
    slabs: int

    def usable(self, row: Expr) -> Expr | None:
        """Whether (bool) a row can be done in tiles; None is always."""

    def open(self, rows: Rows, slab: Expr) -> None:
        """What is done before the panels of a slab."""

    def chunk(self, rows: Rows, panel: Expr, slab: Expr) -> None:
        """Adds the share of a slab to up to CHUNK rows of a panel in y, of the first stores it; without
        epilogue."""


Open = Callable[[Function, list[Any], Result], Product]


def tiled_matmul(
    spec: KernelSpec,
    symbol: str,
    arguments: Sequence[tuple[str, str]],
    operands: Sequence[Operand],
    start: Open,
) -> Any:
    """The kernel of `spec` for tiles.

    Args:
        arguments: what the kernel takes of the activations, between y and the weight.
        operands: the weight's.
        start: makes the product of the function, the weight's buffers and the result.
    """
    N, n_block, m_block = spec["n"], spec["n_block"], spec["m_block"]
    result = Result(N, n_block, LANES, spec["epilogue"])
    if min(spec["k"], N, m_block) < 1 or n_block < LANES or n_block % LANES or not result.known:
        raise QGraphError(f"{spec.op}: cannot build {dict(spec.params)}")
    names = [f"weight{i}" for i in range(len(operands))]
    pointers = [
        ("y", "float32"),
        *arguments,
        *((name, operand.dtype) for name, operand in zip(names, operands, strict=True)),
        *epilogue_pointers(spec["epilogue"]),
    ]
    panels = -(-N // n_block)
    with function(symbol, pointers, ["M"]) as f:
        M, begin, end = (f.scalars[name] for name in ("M", "begin", "end"))

        def pass_on(first: Expr, last: Expr) -> None:
            """Blocks first .. last - 1 by the kernel that this is a form of."""
            call_base(spec, f, [name for name, _ in pointers], [M, first, last])

        with B.If(M <= FEW_ROWS), B.Then():
            pass_on(begin, end)
        with B.If(M > FEW_ROWS), B.Then():
            weights = [
                B.decl_buffer(operand.shape, operand.dtype, data=f.buffers[name].data)
                for name, operand in zip(names, operands, strict=True)
            ]
            product = start(f, weights, result)
            size, limit = B.bind(T.min(M, index(ROWS))), M
            if product.padded:
                size, limit = index(ROWS), B.bind(T.truncdiv(M + (ROWS - 1), index(ROWS)) * ROWS)
            configure(size, product.depth)
            first = B.bind(T.truncdiv(begin, index(panels)))
            with B.serial(T.truncdiv(end + (panels - 1), index(panels)) - first) as i:
                m0, before = B.bind((first + i) * m_block), B.bind((first + i) * panels)
                rows = B.bind(T.min(index(m_block), M - m0))
                left = B.bind(T.max(begin - before, index(0)))
                count = B.bind(T.min(end - before, index(panels)) - left)

                def chunks() -> None:
                    with B.serial(T.truncdiv(rows + (CHUNK - 1), index(CHUNK))) as c:
                        here = Rows(
                            B.bind(m0 + c * CHUNK), B.bind(T.min(rows - c * CHUNK, index(CHUNK))), limit, size
                        )
                        with B.serial(index(product.slabs)) as slab:
                            product.open(here, slab)
                            with B.serial(count) as p:
                                panel = B.bind(left + p)
                                product.chunk(here, panel, slab)
                                with B.If(slab == product.slabs - 1), B.Then():
                                    result.finish(f.buffers["y"], f.buffers, here.m0, here.count, panel)

                if product.usable(m0) is None:
                    chunks()
                else:
                    usable = B.alloc_buffer((1,), "int32")
                    B.buffer_store(usable, T.int32(1), [index(0)])
                    with B.serial(rows) as r, B.If(T.Not(product.usable(m0 + r))), B.Then():
                        B.buffer_store(usable, T.int32(0), [index(0)])
                    with B.If(usable[index(0)] == 0), B.Then():
                        pass_on(before + left, before + left + count)
                    with B.If(usable[index(0)] != 0), B.Then():
                        chunks()
            release()
    return f.result


def call_base(spec: KernelSpec, f: Function, pointers: Sequence[str], scalars: Sequence[Expr]) -> None:
    """Emits a call of the kernel of `spec` that has no tiles; the linker finds it in the same image."""
    data = [f.buffers[name].data for name in pointers]
    B.evaluate(T.call_extern("void", spec.symbol, *data, *scalars))


def flat(buffer: Any, dtype: str = "") -> Any:
    """The same memory by the number of the element."""
    return B.decl_buffer((UNBOUNDED,), dtype or buffer.dtype, data=buffer.data)
