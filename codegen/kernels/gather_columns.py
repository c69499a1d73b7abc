"""Lookups in the weight of a linear layer: columns picked by index, from the layout that products read."""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.isa import Isa
from qgraph.codegen.kernels import kernel
from qgraph.codegen.kernels.function import Function, function
from qgraph.codegen.kernels.gather import fail_row, position_of
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.ops import STORAGE
from qgraph.codegen.kernels.vector import lanes_at
from qgraph.codegen.kernels.vmath import Expr, named
from qgraph.codegen.kernels.weights import Columns, Reader
from qgraph.codegen.kernels.weights_group import open_reader
from qgraph.codegen.packing import LANES
from qgraph.codegen.spec import KernelSpec
from qgraph.formats.group import GROUP_FORMATS
from qgraph.formats.nvfp4 import NVFP4


def _gather_columns(weight: str, spec: KernelSpec, isa: Isa, symbol: str) -> Any:
    """y[i, :] = column indices[i] of a weight [k, n], dequantized: `gather_columns_f32`, `_nvfp4` and so on.

    An embedding tied to a linear layer: vectors of neighbouring columns are decoded, and all but one number
    of each dropped, which is little work for the few rows that a run looks up.

    Parameters: k, n, index (i64 | i32); of a group format block, and of ternary packing, as of its product.
    Arguments: y f32 [m, k], the weight's as in its product, indices [m], status i32 [1]. Block: 1 of m.
    """
    K, N = spec["k"], spec["n"]
    reader = open_reader(weight, spec, isa)
    names = [f"weight{i}" for i in range(len(reader.operands))]
    pointers = [
        ("y", "float32"),
        *((name, operand.dtype) for name, operand in zip(names, reader.operands, strict=True)),
        ("indices", STORAGE[spec["index"]]),
        ("status", "int32"),
    ]
    with function(symbol, pointers, []) as f:
        weights = [
            B.decl_buffer(operand.shape, operand.dtype, data=f.buffers[name].data)
            for name, operand in zip(names, reader.operands, strict=True)
        ]
        picked = B.alloc_buffer((reader.unit, isa.lanes), "float32", scope="local")
        with B.serial(f.scalars["begin"], f.scalars["end"]) as row:
            position, in_range = position_of(f.buffers["indices"], row, index(N))
            with B.If(in_range):
                with B.Then():
                    _decode_column(f, isa, reader, weights, picked, row, position, K)
                with B.Else():
                    fail_row(f, isa, row, index(K))
    return f.result


def _decode_column(
    f: Function, isa: Isa, reader: Reader, weights: list[Any], picked: Any, row: Expr, n: Expr, K: int
) -> None:
    """y[row, :] = column n."""
    lanes = isa.lanes
    lane = named(T.truncmod(n, index(LANES)))
    at = Columns(T.truncdiv(n, index(LANES)), lanes_at(T.truncdiv(lane, index(lanes)) * lanes, lanes))
    own = named(T.truncmod(lane, index(lanes)))

    def decode_unit(kb: Expr, unit: Expr, count: int) -> None:
        scale = named(reader.scale(weights, at, kb))
        for i, weight in enumerate(reader.raw(weights, at, kb, unit, count)):
            value = reader.scaled(weight, scale)
            if reader.has_offset:
                value = value + reader.offset(weights, at, kb)
            B.buffer_store(picked, value, [index(i), lanes_at(index(0), lanes)])
        start = row * K + kb * reader.block + unit * reader.unit
        with B.serial(index(count)) as i:
            B.buffer_store(f.buffers["y"], picked[i, own], [start + i])

    def decode_block(kb: Expr, size: int) -> None:
        if size >= reader.unit:
            with B.serial(index(size // reader.unit)) as u:
                decode_unit(kb, u, reader.unit)
        if size % reader.unit:
            decode_unit(kb, index(size // reader.unit), size % reader.unit)

    if reader.block <= K:
        with B.serial(index(K // reader.block)) as kb:
            decode_block(kb, reader.block)
    if K % reader.block:
        decode_block(index(K // reader.block), K % reader.block)


kernel("gather_columns_f32")(partial(_gather_columns, "f32"))
for _format in (NVFP4, *GROUP_FORMATS):
    kernel(f"gather_columns_{_format.suffix}")(partial(_gather_columns, _format.name))
