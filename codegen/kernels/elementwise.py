"""Elementwise kernels: one output, any number of strided inputs, an expression between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels import kernel, loops, ops
from qgraph.codegen.kernels.function import function
from qgraph.codegen.kernels.ops import STORAGE, Value
from qgraph.codegen.kernels.vmath import Expr, named
from qgraph.codegen.spec import ELEMENTWISE_BLOCK, KernelSpec
from qgraph.errors import UnsupportedError

_MAX_ARGUMENTS = 32


class _Operand:
    """The output or one input: a flat buffer, its strides and the offset of the current row."""

    def __init__(self, dtype: str, inner: int | str, buffer: Any, strides: list[Expr]) -> None:
        self.dtype, self.inner, self.buffer = dtype, inner, buffer
        self.outer = strides[:-1] if inner == "s" else strides
        self.inner_stride = strides[-1] if inner == "s" else loops.index(int(inner))
        self.row: Expr = loops.index(0)

    def enter_row(self, index: list[Expr]) -> None:
        offset: Expr = loops.index(0)
        for i, stride in zip(index, self.outer, strict=True):
            offset = offset + i * stride
        self.row = B.bind(offset)

    def load(self, j: Expr, lanes: int, count: Expr | None) -> Expr:
        """`lanes` elements from element j of the row, or the first `count` of them."""
        if lanes > 1 and self.inner == 1:
            return loops.load(self.buffer, self.row + j, lanes, count)
        scalar = self.buffer[self.row + j * self.inner_stride]
        return scalar if lanes == 1 else T.broadcast(scalar, lanes)

    def store(self, value: Expr, j: Expr, lanes: int, count: Expr | None) -> None:
        if lanes > 1:
            loops.store(self.buffer, value, self.row + j, count)
        else:
            B.buffer_store(self.buffer, value, [self.row + j * self.inner_stride])


class Expression:
    """Emits an expression tree, each distinct node once, at `lanes` elements from element j of the current
    row.
    """

    def __init__(
        self, load: Callable[[int], Value], index: list[Expr], args: list[Expr], j: Expr, lanes: int
    ) -> None:
        self.load, self.index, self.args, self.j, self.lanes = load, index, args, j, lanes
        self.done: dict[tuple[Any, ...], int] = {}  # node over numbers of nodes -> number
        self.values: list[Value] = []

    def _splat(self, scalar: Expr) -> Expr:
        return scalar if self.lanes == 1 else T.broadcast(scalar, self.lanes)

    def _bind(self, value: Value) -> Value:
        # Float constants are bound too: TVM's simplifier would take 0 * x for 0 and x + 0 for x.
        if isinstance(value.expr, tirx.Var) or (value.const is not None and value.dtype != "f32"):
            return value
        return Value(value.dtype, named(value.expr), value.const)

    def _iota(self, axis: int) -> Expr:
        if axis < len(self.index):
            return self._splat(self.index[axis])
        return self.j if self.lanes == 1 else T.ramp(self.j, 1, self.lanes)

    def number(self, node: tuple[Any, ...]) -> int:
        """The number of `node`, emitting what is new."""
        kind = node[0]
        if kind in ("in", "const", "arg", "iota"):
            key: tuple[Any, ...] = tuple(map(repr, node))  # 1, 1.0 and True are different constants
            make = {
                "in": lambda: self.load(node[1]),
                "const": lambda: ops.constant(node[1], node[2], self.lanes),
                "arg": lambda: Value("i64", self._splat(self.args[node[1]])),
                "iota": lambda: Value("i64", self._iota(node[1])),
            }[kind]
        elif kind == "cast":
            operand = self.number(node[2])
            key = ("cast", node[1], operand)
            make = lambda: ops.cast(self.values[operand], node[1])
        else:
            operands = [self.number(e) for e in node[1:]]
            key = (kind, *operands)
            make = lambda: ops.apply(kind, *(self.values[i] for i in operands))
        if key not in self.done:
            self.values.append(self._bind(make()))
            self.done[key] = len(self.values) - 1
        return self.done[key]

    def value(self, node: tuple[Any, ...]) -> Value:
        return self.values[self.number(node)]


@kernel("elementwise")
def elementwise(spec: KernelSpec, isa: Isa, symbol: str) -> Any:
    """out[i0, ..] = expr(in0[i0, ..], in1[i0, ..], .., i0, ..) over strided operands of one shape.

    Parameters:
        rank: number of dims, >= 1.
        inputs, out: dtypes of the inputs and of the output.
        in_inner, out_inner: innermost stride of each: 0 or 1 at compile time, "s" at run time.
        args: number of extra int64 scalars.
        expr: the expression, nested tuples: ("in", i), ("const", value, dtype), ("arg", j), ("iota", axis),
            ("cast", dtype, e) or (operator of `ops.OPERATORS`, e, ..).

    Arguments: out, in0 .., d0 .., strides of out, of in0, .., arg0 ... Strides are in elements; an operand
    has `rank` of them if its innermost is "s", else the outer rank - 1. Operands must not overlap the output.
    Block: rank 1, `ELEMENTWISE_BLOCK` elements; otherwise one row, an index of the outer dims in row-major
    order.

    Rows with inner strides 0 and 1 only are computed in vectors of `isa.lanes` and a masked vector at the
    end, so an element's result does not depend on its position; other rows element by element.
    """
    rank, dtypes = spec["rank"], [spec["out"], *spec["inputs"]]
    inners = [spec["out_inner"], *spec["in_inner"]]
    if any(i not in (0, 1, "s") for i in inners) or rank < 1:
        raise UnsupportedError(f"elementwise kernel: cannot build rank {rank} with inner strides {inners}")
    names = ["out", *(f"in{i}" for i in range(len(dtypes) - 1))]
    strides = [
        [f"{name}_s{i}" for i in range(rank if inner == "s" else rank - 1)]
        for name, inner in zip(names, inners, strict=True)
    ]
    dims, args = [f"d{i}" for i in range(rank)], [f"arg{i}" for i in range(spec["args"])]
    scalars = [*dims, *(s for operand in strides for s in operand), *args]
    arguments = len(names) + len(scalars) + 2
    if arguments > _MAX_ARGUMENTS:
        raise UnsupportedError(f"elementwise kernel of {arguments} arguments: at most {_MAX_ARGUMENTS}")

    with function(symbol, [(n, STORAGE[d]) for n, d in zip(names, dtypes, strict=True)], scalars) as f:
        begin, end = f.scalars["begin"], f.scalars["end"]
        operands = [
            _Operand(d, inner, f.buffers[n], [f.scalars[s] for s in own])
            for n, d, inner, own in zip(names, dtypes, inners, strides, strict=True)
        ]
        out, inputs = operands[0], operands[1:]
        sizes = [f.scalars[d] for d in dims]
        lanes = isa.lanes if inners[0] == 1 and "s" not in inners else 1

        def emit(j: Expr, index: list[Expr], count: Expr | None) -> None:
            def load(i: int) -> Value:
                return ops.from_memory(inputs[i].dtype, inputs[i].load(j, lanes, count))

            result = Expression(load, index, [f.scalars[a] for a in args], j, lanes).value(spec["expr"])
            if result.dtype != out.dtype:
                raise UnsupportedError(
                    f"elementwise kernel: the expression is {result.dtype}, the output {out.dtype}: cast it"
                )
            out.store(result.expr, j, lanes, count)

        def row(start: Expr, size: Expr, index: list[Expr]) -> None:
            """Elements [start, start + size) of the current row."""
            if lanes == 1:
                with B.serial(size) as i:
                    emit(start + i, index, None)
            else:
                loops.each_vector(size, lanes, lambda at, count: emit(start + at, index, count))

        if rank == 1:
            with B.serial(begin, end) as block:
                start = B.bind(block * ELEMENTWISE_BLOCK)
                row(start, B.bind(T.min(loops.index(ELEMENTWISE_BLOCK), sizes[0] - start)), [])
        else:
            with B.If(begin < end), B.Then():  # an empty range may come with an empty dim: no division then
                odometer = B.alloc_buffer((rank - 1,), "int64", scope="local")
                rest = begin
                for axis in reversed(range(1, rank - 1)):
                    B.buffer_store(odometer, T.truncmod(rest, sizes[axis]), [axis])
                    rest = B.bind(T.truncdiv(rest, sizes[axis]))
                B.buffer_store(odometer, rest, [0])
                with B.serial(begin, end):
                    index = [B.bind(odometer[axis]) for axis in range(rank - 1)]
                    for operand in operands:
                        operand.enter_row(index)
                    row(loops.index(0), sizes[-1], index)
                    _advance(odometer, sizes, rank - 2)
    return f.result


def _advance(odometer: Any, sizes: list[Expr], axis: int) -> None:
    """Step to the next index in row-major order."""
    B.buffer_store(odometer, odometer[axis] + 1, [axis])
    if axis > 0:
        with B.If(tirx.EQ(odometer[axis], sizes[axis])), B.Then():
            B.buffer_store(odometer, loops.index(0), [axis])
            _advance(odometer, sizes, axis - 1)
