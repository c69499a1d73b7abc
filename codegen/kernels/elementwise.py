"""Elementwise kernels: one output, any number of strided inputs, an expression between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.ir import PointerType, PrimType
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels import kernel, ops
from qgraph.codegen.kernels.ops import STORAGE, Value
from qgraph.codegen.kernels.vmath import named
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import UnsupportedError

BLOCK = 4096  # elements of one block of a rank 1 kernel
_MAX_ARGUMENTS = 32
_UNBOUNDED = 1 << 48  # extent of a flat buffer whose size the kernel does not need


class _Operand:
    """The output or one input: a flat buffer, its strides and the offset of the current row."""

    def __init__(self, dtype: str, inner: int | str, buffer: Any, strides: list[Any]) -> None:
        if inner not in (0, 1, "s"):
            raise UnsupportedError(f"elementwise kernel: inner stride {inner!r} is none of 0, 1 and 's'")
        self.dtype, self.inner, self.buffer = dtype, inner, buffer
        self.outer = strides[:-1] if inner == "s" else strides
        self.inner_stride = strides[-1] if inner == "s" else tirx.IntImm("int64", inner)
        self.row: Any = tirx.IntImm("int64", 0)

    def enter_row(self, index: list[Any]) -> None:
        offset: Any = tirx.IntImm("int64", 0)
        for i, stride in zip(index, self.outer, strict=True):
            offset = offset + i * stride
        self.row = B.bind(offset)

    def at(self, j: Any, lanes: int) -> Any:
        """The index of `lanes` elements from element j of the row."""
        if lanes > 1 and self.inner == 1:
            return T.ramp(self.row + j, 1, lanes)
        return self.row + j * self.inner_stride

    def load(self, j: Any, lanes: int, mask: Any | None) -> Any:
        if lanes == 1:
            return self.buffer[self.at(j, 1)]
        if self.inner == 0:
            return T.broadcast(self.buffer[self.row], lanes)
        if mask is None:
            return self.buffer[self.at(j, lanes)]
        return T.masked_load(f"{STORAGE[self.dtype]}x{lanes}", self.buffer, self.at(j, lanes), mask)

    def store(self, value: Any, j: Any, lanes: int, mask: Any | None) -> None:
        if mask is None:
            B.buffer_store(self.buffer, value, [self.at(j, lanes)])
        else:
            B.evaluate(T.masked_store(self.buffer, value, self.at(j, lanes), mask))


class _Expression:
    """Emits an expression tree, each distinct node once, at `lanes` elements from element j of the current row."""

    def __init__(
        self, load: Callable[[int], Value], index: list[Any], args: list[Any], j: Any, lanes: int
    ) -> None:
        self.load, self.index, self.args, self.j, self.lanes = load, index, args, j, lanes
        self.done: dict[tuple[Any, ...], int] = {}  # node over numbers of nodes -> number
        self.values: list[Value] = []

    def _splat(self, scalar: Any) -> Any:
        return scalar if self.lanes == 1 else T.broadcast(scalar, self.lanes)

    def _bind(self, value: Value) -> Value:
        if value.const is not None or isinstance(value.expr, tirx.Var):
            return value
        return Value(value.dtype, named(value.expr))

    def _iota(self, axis: int) -> Any:
        if axis < len(self.index):
            return self._splat(self.index[axis])
        return self.j if self.lanes == 1 else T.ramp(self.j, 1, self.lanes)

    def number(self, node: tuple[Any, ...]) -> int:
        """The number of `node`, emitting what is new."""
        kind = node[0]
        if kind in ("in", "const", "arg", "iota"):
            key = tuple(map(repr, node))  # 1, 1.0 and True are different constants
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

    Arguments: out, in0 .., d0 .., strides of out, of in0, .., arg0 ... Strides are in elements; an operand has `rank`
    of them if its innermost is "s", else the outer rank - 1. Operands must not overlap the output.
    Block: rank 1, `BLOCK` elements; otherwise one row, an index of the outer dims in row-major order.

    Rows with inner strides 0 and 1 only are computed in vectors of `isa.lanes` and a masked vector at the end, so an
    element's result does not depend on its position; other rows element by element.
    """
    rank, dtypes, inners = (
        spec["rank"],
        [spec["out"], *spec["inputs"]],
        [spec["out_inner"], *spec["in_inner"]],
    )
    count = len(dtypes) + rank + sum(rank if i == "s" else rank - 1 for i in inners) + spec["args"] + 2
    if count > _MAX_ARGUMENTS:
        raise UnsupportedError(f"elementwise kernel of {count} arguments: at most {_MAX_ARGUMENTS}")

    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name(symbol)
        B.func_attr({"global_symbol": symbol, "tirx.noalias": True})
        names = ["out", *(f"in{i}" for i in range(len(dtypes) - 1))]
        pointers = [
            B.arg(n, tirx.Var(n, PointerType(PrimType(STORAGE[d]))))
            for n, d in zip(names, dtypes, strict=True)
        ]

        def scalar(name: str) -> Any:
            return B.arg(name, tirx.Var(name, "int64"))

        dims = [scalar(f"d{i}") for i in range(rank)]
        strides = [
            [scalar(f"{name}_s{i}") for i in range(rank if inner == "s" else rank - 1)]
            for name, inner in zip(names, inners, strict=True)
        ]
        args = [scalar(f"arg{i}") for i in range(spec["args"])]
        begin, end = scalar("begin"), scalar("end")
        operands = [
            _Operand(d, inner, B.decl_buffer((_UNBOUNDED,), STORAGE[d], data=p), s)
            for d, inner, p, s in zip(dtypes, inners, pointers, strides, strict=True)
        ]
        out, inputs = operands[0], operands[1:]
        vector = inners[0] == 1 and "s" not in inners

        def emit(j: Any, lanes: int, index: list[Any], mask: Any | None) -> None:
            def load(i: int) -> Value:
                loaded = B.bind(inputs[i].load(j, lanes, mask))
                return ops.from_memory(inputs[i].dtype, loaded)

            result = _Expression(load, index, args, j, lanes).value(spec["expr"])
            if result.dtype != out.dtype:
                raise UnsupportedError(
                    f"elementwise kernel: the expression is {result.dtype}, the output {out.dtype}: cast it"
                )
            out.store(result.expr, j, lanes, mask)

        def row(start: Any, size: Any, index: list[Any]) -> None:
            """Elements [start, start + size) of the current row."""
            if not vector:
                with B.serial(size) as i:
                    emit(start + i, 1, index, None)
                return
            lanes = isa.lanes
            with B.serial(T.truncdiv(size, lanes)) as i:
                emit(start + i * lanes, lanes, index, None)
            rest = B.bind(T.truncmod(size, lanes))
            with B.If(rest > 0), B.Then():
                mask = T.ramp(T.int32(0), 1, lanes) < T.broadcast(T.cast(rest, "int32"), lanes)
                emit(start + size - rest, lanes, index, mask)

        if rank == 1:
            with B.serial(begin, end) as block:
                start = B.bind(block * BLOCK)
                row(start, B.bind(T.min(T.int64(BLOCK), dims[0] - start)), [])
        else:
            with B.If(begin < end), B.Then():  # an empty range may come with an empty dim: no division then
                odometer = B.alloc_buffer((rank - 1,), "int64", scope="local")
                rest = begin
                for axis in reversed(range(1, rank - 1)):
                    B.buffer_store(odometer, T.truncmod(rest, dims[axis]), [axis])
                    rest = B.bind(T.truncdiv(rest, dims[axis]))
                B.buffer_store(odometer, rest, [0])
                with B.serial(begin, end):
                    index = [B.bind(odometer[axis]) for axis in range(rank - 1)]
                    for operand in operands:
                        operand.enter_row(index)
                    row(tirx.IntImm("int64", 0), dims[-1], index)
                    _advance(odometer, dims, rank - 2)
    return builder.get()


def _advance(odometer: Any, dims: list[Any], axis: int) -> None:
    """Step to the next index in row-major order."""
    B.buffer_store(odometer, odometer[axis] + 1, [axis])
    if axis > 0:
        with B.If(odometer[axis] == dims[axis]), B.Then():
            B.buffer_store(odometer, tirx.IntImm("int64", 0), [axis])
            _advance(odometer, dims, axis - 1)
