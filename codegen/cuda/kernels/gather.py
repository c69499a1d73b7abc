"""Gather: rows picked by index. A block of threads does one row of the output.

An index that is out of range sets status[0] to 1 and leaves the row zero, as on the CPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B
from tvm.tirx import EQ

from qgraph.codegen.cuda.kernels import CudaKernel, kernel
from qgraph.codegen.cuda.kernels.frame import Frame, device_function, strided
from qgraph.codegen.cuda.kernels.weights import OCTET, e2m1_value, e4m3_value, open_weight
from qgraph.codegen.kernels.gather import gather_pointers, position_of, table_pointers, tuple_position
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.ops import STORAGE
from qgraph.codegen.kernels.vmath import Expr, named, splat
from qgraph.codegen.packing import GROUP, LANES, WORD
from qgraph.codegen.spec import KernelSpec
from qgraph.formats.group import GROUP_FORMATS
from qgraph.formats.nvfp4 import NVFP4

_THREADS = 128


def _rows(f: Frame, inner: Expr, in_range: Expr, value: Any) -> None:
    """y[block, i] = value(i), or zeros and a status of 1."""
    y = f.buffers["y"]
    with B.If(in_range):
        with B.Then():
            strided(f, inner, lambda i: B.buffer_store(y, value(i), [f.block * inner + i]))
        with B.Else():
            strided(f, inner, lambda i: B.buffer_store(y, splat(0, str(y.dtype), 1), [f.block * inner + i]))
            with B.If(EQ(f.thread, 0)), B.Then():
                B.buffer_store(f.buffers["status"], T.int32(1), [0])


@kernel("gather")
def gather(spec: KernelSpec, symbol: str) -> CudaKernel:
    with device_function(symbol, gather_pointers(spec), ["n", "m", "inner"], _THREADS) as f:
        n, m, inner = (f.scalars[name] for name in ("n", "m", "inner"))
        position, in_range = position_of(f.buffers["indices"], T.truncmod(f.block, m), n)
        source = B.bind(T.truncdiv(f.block, m) * n + position)
        _rows(f, inner, in_range, lambda i: f.buffers["data"][source * inner + i])
    return CudaKernel(f.result, _THREADS)


@kernel("gather_nd")
def gather_nd(spec: KernelSpec, symbol: str) -> CudaKernel:
    k = spec["k"]
    with device_function(
        symbol, gather_pointers(spec), ["m", "inner", *(f"d{t}" for t in range(k))], _THREADS
    ) as f:
        m, inner = f.scalars["m"], f.scalars["inner"]
        source, in_range = tuple_position(f, f.block, m, k)
        at = B.bind(source)
        _rows(f, inner, in_range, lambda i: f.buffers["data"][at * inner + i])
    return CudaKernel(f.result, _THREADS)


@kernel("gather_nvfp4")
def gather_nvfp4(spec: KernelSpec, symbol: str) -> CudaKernel:
    h = spec["h"]
    blocks = -(-h // GROUP)
    with device_function(symbol, table_pointers(spec), ["V"], _THREADS) as f:
        position, in_range = position_of(f.buffers["indices"], f.block, f.scalars["V"])

        def value(i: Expr) -> Expr:
            word = f.buffers["codes"][position * (blocks * GROUP // WORD) + T.truncdiv(i, index(WORD))]
            shift = T.Cast("uint32", T.truncmod(i, index(WORD)) * 4)
            scale = e4m3_value(f.buffers["block_scale"][position * blocks + T.truncdiv(i, index(GROUP))])
            scale = named(scale * f.buffers["global_scale"][0])
            return e2m1_value(T.shift_right(word, shift)) * scale

        _rows(f, index(h), in_range, value)
    return CudaKernel(f.result, _THREADS)


def _gather_columns(weight_format: str, spec: KernelSpec, symbol: str) -> CudaKernel:
    """A thread decodes an octet of the column at a time."""
    K, N = spec["k"], spec["n"]
    weight = open_weight(weight_format, spec)
    names = [f"weight{i}" for i in range(len(weight.operands))]
    pointers = [
        ("y", "float32"),
        *zip(names, weight.operands, strict=True),
        ("indices", STORAGE[spec["index"]]),
        ("status", "int32"),
    ]
    with device_function(symbol, pointers, [], _THREADS) as f:
        w = [f.buffers[name] for name in names]
        position, in_range = position_of(f.buffers["indices"], f.block, index(N))
        tile, lane = B.bind(T.truncdiv(position, index(LANES))), B.bind(T.truncmod(position, index(LANES)))
        with B.If(in_range):
            with B.Then():

                def octet(o: Expr) -> None:
                    values = weight.octet(w, tile, lane, o, 1)[0]
                    # As DequantizeLinear does: the scale in full first.
                    scale = weight.scales(w, tile, lane, o, 1)[0] if weight.has_scale else None
                    overall = weight.overall(w)
                    scale = scale if scale is None or overall is None else named(scale * overall)
                    offset = weight.offsets(w, tile, lane, o, 1)[0] if weight.has_offset else None
                    for i, level in enumerate(values):
                        value = level if scale is None else named(level * scale)
                        value = value if offset is None else value + offset
                        with B.If(o * OCTET + i < index(K)), B.Then():
                            B.buffer_store(f.buffers["y"], value, [f.block * K + o * OCTET + i])

                strided(f, index(-(-K // OCTET)), octet)
            with B.Else():
                strided(
                    f, index(K), lambda i: B.buffer_store(f.buffers["y"], T.float32(0), [f.block * K + i])
                )
                with B.If(EQ(f.thread, 0)), B.Then():
                    B.buffer_store(f.buffers["status"], T.int32(1), [0])
    return CudaKernel(f.result, _THREADS)


kernel("gather_columns_f32")(partial(_gather_columns, "f32"))
for _format in (NVFP4, *GROUP_FORMATS):
    kernel(f"gather_columns_{_format.suffix}")(partial(_gather_columns, _format.name))
