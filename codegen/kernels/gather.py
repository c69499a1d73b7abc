"""Gather: rows of a tensor picked by index. One block is one row of the output.

An index counts from the end when negative. One that is out of range sets status[0] to 1 and leaves the row
zero; nothing outside of the buffers is read.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels import kernel
from qgraph.codegen.kernels.decode import e2m1, e4m3
from qgraph.codegen.kernels.function import Function, function
from qgraph.codegen.kernels.loops import each_vector, index, load, store
from qgraph.codegen.kernels.ops import STORAGE
from qgraph.codegen.kernels.vmath import Expr, named, splat
from qgraph.codegen.packing import GROUP, WORD
from qgraph.codegen.spec import KernelSpec


def gather_pointers(spec: KernelSpec) -> list[tuple[str, str]]:
    data = STORAGE[spec["dtype"]]
    return [("y", data), ("data", data), ("indices", STORAGE[spec["index"]]), ("status", "int32")]


def table_pointers(spec: KernelSpec) -> list[tuple[str, str]]:
    """Of `gather_nvfp4`."""
    return [
        ("y", "float32"),
        ("codes", "uint32"),
        ("block_scale", "uint8"),
        ("global_scale", "float32"),
        ("indices", STORAGE[spec["index"]]),
        ("status", "int32"),
    ]


def tuple_position(f: Any, row: Expr, m: Expr, k: int) -> tuple[Expr, Expr]:
    """Of `gather_nd`, for row `row` of the output: (the row of data, whether all indices are in range)."""
    source, in_range = B.bind(T.truncdiv(row, m)), None
    for t in range(k):
        size = f.scalars[f"d{t}"]
        position, inside = position_of(f.buffers["indices"], row * k + t, size)
        source = source * size + position
        in_range = inside if in_range is None else T.And(in_range, inside)
    return source, in_range


def position_of(indices: Any, at: Expr, size: Expr) -> tuple[Expr, Expr]:
    """(indices[at] from the start of an axis of `size`, whether it is in range)."""
    given = B.bind(T.Cast("int64", indices[at]))
    position = named(T.Select(given < 0, given + size, given))
    return position, T.And(position >= 0, position < size)


def _copy_row(f: Function, isa: Isa, row: Expr, inner: Expr, source: Expr, in_range: Expr) -> None:
    """y[row, :] = data[source, :], or zeros and a status of 1."""
    y, data = f.buffers["y"], f.buffers["data"]
    lanes = isa.lanes

    def copy(start: Expr, count: Expr | None) -> None:
        store(y, load(data, source * inner + start, lanes, count), row * inner + start, count)

    with B.If(in_range):
        with B.Then():
            each_vector(inner, lanes, copy)
        with B.Else():
            fail_row(f, isa, row, inner)


def fail_row(f: Function, isa: Isa, row: Expr, inner: Expr) -> None:
    """y[row, :] = 0, and a status of 1."""
    y, lanes = f.buffers["y"], isa.lanes

    def clear(start: Expr, count: Expr | None) -> None:
        store(y, splat(0, str(y.dtype), lanes), row * inner + start, count)

    B.buffer_store(f.buffers["status"], T.int32(1), [index(0)])
    each_vector(inner, lanes, clear)


@kernel("gather")
def gather(spec: KernelSpec, isa: Isa, symbol: str) -> Any:
    """y[o, i, :] = data[o, indices[i], :].

    Parameters: dtype, index (i64 | i32).
    Arguments: y [outer, m, inner], data [outer, n, inner], indices [m], status i32 [1], n, m, inner.
    Block: 1 of outer * m.
    """
    with function(symbol, gather_pointers(spec), ["n", "m", "inner"]) as f:
        n, m, inner = (f.scalars[name] for name in ("n", "m", "inner"))
        with B.serial(f.scalars["begin"], f.scalars["end"]) as row:
            position, in_range = position_of(f.buffers["indices"], T.truncmod(row, m), n)
            _copy_row(f, isa, row, inner, T.truncdiv(row, m) * n + position, in_range)
    return f.result


@kernel("gather_nd")
def gather_nd(spec: KernelSpec, isa: Isa, symbol: str) -> Any:
    """y[b, i, :] = data[b, indices[b, i, 0], .., indices[b, i, k - 1], :].

    Parameters: dtype, index (i64 | i32), k (length of an index tuple, >= 1).
    Arguments: y [batch, m, inner], data [batch, d0, .., d{k-1}, inner], indices [batch, m, k], status i32
    [1], m, inner, d0, .., d{k-1}. Block: 1 of batch * m.
    """
    k = spec["k"]
    with function(symbol, gather_pointers(spec), ["m", "inner", *(f"d{t}" for t in range(k))]) as f:
        m, inner = f.scalars["m"], f.scalars["inner"]
        with B.serial(f.scalars["begin"], f.scalars["end"]) as row:
            source, in_range = tuple_position(f, row, m, k)
            _copy_row(f, isa, row, inner, source, in_range)
    return f.result


@kernel("gather_nvfp4")
def gather_nvfp4(spec: KernelSpec, isa: Isa, symbol: str) -> Any:
    """y[i, :] = row indices[i] of an NVFP4 table in layout `nvfp4_rows`, to the bit as DequantizeLinear gives
    it.

    Parameters: h (columns of the table, >= 1), index (i64 | i32).
    Arguments: y f32 [m, h], codes u32, block_scale u8, global_scale f32 [1], indices [m], status i32 [1], V
    (rows of the table). Block: 1 of m.
    """
    h = spec["h"]
    with (
        function(symbol, table_pointers(spec), ["V"]) as f,
        B.serial(f.scalars["begin"], f.scalars["end"]) as row,
    ):
        position, in_range = position_of(f.buffers["indices"], row, f.scalars["V"])
        with B.If(in_range):
            with B.Then():
                _decode_row(f, isa, row, position, h)
            with B.Else():
                fail_row(f, isa, row, index(h))
    return f.result


def _decode_row(f: Function, isa: Isa, row: Expr, source: Expr, h: int) -> None:
    """y[row, :] = the values of row `source` of the table."""
    lanes, codes = isa.lanes, f.buffers["codes"]

    def decode_block(b: Expr, size: int) -> None:
        at = source * -(-h // GROUP) + b
        scale = e4m3(T.broadcast(f.buffers["block_scale"][at], lanes), isa)
        scale = named(scale * T.broadcast(f.buffers["global_scale"][0], lanes))
        for start in range(0, size, lanes):
            word = at * (GROUP // WORD) + start // WORD
            shared = min(lanes, WORD)  # lanes that read the same word
            copies = [T.broadcast(codes[word + i], shared) for i in range(lanes // shared)]
            shifts = [T.uint32(4 * (c % WORD)) for c in range(start, start + lanes)]
            every = list(range(lanes))
            shifted = named(T.shift_right(T.Shuffle(copies, every), T.Shuffle(shifts, every)))
            count = None if start + lanes <= size else index(size - start)
            store(f.buffers["y"], e2m1(shifted, isa) * scale, row * h + b * GROUP + start, count)

    if h >= GROUP:
        with B.serial(index(h // GROUP)) as b:
            decode_block(b, GROUP)
    if h % GROUP:
        decode_block(index(h // GROUP), h % GROUP)
