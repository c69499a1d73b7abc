"""Activations rounded to low precision, bit for bit as on the CPU (codegen/kernels/dynamic_quantize.py). A
block of threads does one row."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B
from tvm.tirx import EQ

from qgraph.codegen.cuda.kernels import CudaKernel, kernel
from qgraph.codegen.cuda.kernels.frame import Frame, call, device_function, strided
from qgraph.codegen.kernels.dynamic_quantize import (
    int8_codes,
    int8_scale_of,
    magnitude_bits,
    round_e2m1,
    round_e4m3,
    round_even,
)
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.vmath import Expr, bits_as, convert, named, splat
from qgraph.codegen.packing import WORD
from qgraph.codegen.spec import KernelSpec
from qgraph.formats import e2m1
from qgraph.formats.activations import BLOCK

_THREADS = 128


@kernel("dynamic_nvfp4")
def dynamic_nvfp4(spec: KernelSpec, symbol: str) -> CudaKernel:
    """A thread does a block of 16."""
    pointers = [(name, "float32") for name in ("y", "x", "global_scale")]
    with device_function(symbol, pointers, ["n"], _THREADS) as f:
        x, y, n = f.buffers["x"], f.buffers["y"], f.scalars["n"]
        base = B.bind(f.block * n)
        a = named(f.buffers["global_scale"][0])
        top = named(a * splat(e2m1.MAX, "float32", 1))
        largest = B.alloc_buffer((1,), "int32", scope="local")

        def block(b: Expr) -> None:
            count = B.bind(T.min(n - b * BLOCK, index(BLOCK)))
            B.buffer_store(largest, T.int32(0), [0])
            with B.serial(count) as i:
                bits = named(magnitude_bits(named(x[base + b * BLOCK + i])))
                B.buffer_store(largest, T.max(largest[0], bits), [0])
            s = named(_e4m3_scale(named(largest[0]), top) * a)
            with B.serial(count) as i:
                at = B.bind(base + b * BLOCK + i)
                B.buffer_store(y, named(round_e2m1(named(x[at] / s))) * s, [at])

        strided(f, T.truncdiv(n + index(BLOCK - 1), index(BLOCK)), block)
    return CudaKernel(f.result, _THREADS)


def _e4m3_scale(largest: Expr, top: Expr) -> Expr:
    """The scale of a block without the global one, by the bits of its largest magnitude."""
    return named(round_e4m3(named(bits_as(largest, "float32") / top)))


@kernel("quantize_nvfp4")
def quantize_nvfp4(spec: KernelSpec, symbol: str) -> CudaKernel:
    """Rows as E2M1 codes and E4M3 scales: what they stand for is what `dynamic_nvfp4` makes of the rows, to
    the bit.

    Spec: k. Arguments: codes u32 [rows, 2 B], B = ceil(k/16), eight codes a word from bit 0 up, 0 beyond k;
    scales u8 [rows, B], E4M3 bits, of a block with a NaN NaN; x f32 [rows, k], global_scale f32 [1]. A thread
    does a block of 16."""
    K = spec["k"]
    blocks = -(-K // BLOCK)
    pointers = [("codes", "uint32"), ("scales", "uint8"), ("x", "float32"), ("global_scale", "float32")]
    with device_function(symbol, pointers, [], _THREADS) as f:
        x = f.buffers["x"]
        a = named(f.buffers["global_scale"][0])
        top = named(a * splat(e2m1.MAX, "float32", 1))
        largest = B.alloc_buffer((1,), "int32", scope="local")
        words = B.alloc_buffer((BLOCK // WORD,), "uint32", scope="local")

        def block(b: Expr) -> None:
            base = B.bind(f.block * K + b * BLOCK)
            count = B.bind(T.min(index(K) - b * BLOCK, index(BLOCK)))
            B.buffer_store(largest, T.int32(0), [0])
            with B.serial(count) as i:
                bits = named(magnitude_bits(named(x[base + i])))
                B.buffer_store(largest, T.max(largest[0], bits), [0])
            scale = _e4m3_scale(named(largest[0]), top)
            s = named(scale * a)
            for i in range(BLOCK // WORD):
                B.buffer_store(words, T.uint32(0), [i])
            for i in range(BLOCK):
                with B.If(index(i) < count), B.Then():
                    code = call("uint32", "qg_e2m1_code", named(round_e2m1(named(x[base + i] / s))))
                    placed = T.shift_left(code, T.uint32(4 * (i % WORD)))
                    B.buffer_store(words, T.bitwise_or(words[i // WORD], placed), [i // WORD])
            to = B.bind(f.block * blocks + b)
            for i in range(BLOCK // WORD):
                B.buffer_store(f.buffers["codes"], words[i], [to * (BLOCK // WORD) + i])
            B.buffer_store(f.buffers["scales"], call("uint8", "qg_e4m3_code", scale), [to])

        strided(f, index(blocks), block)
    return CudaKernel(f.result, _THREADS)


def _scale(f: Frame, x: Any, base: Expr, n: Expr) -> Expr:
    """That of the row of n at `base`, in all threads."""
    largest = B.alloc_buffer((1,), "int32", scope="local")
    B.buffer_store(largest, T.int32(0), [0])

    def look(i: Expr) -> None:
        B.buffer_store(largest, T.max(largest[0], named(magnitude_bits(named(x[base + i])))), [0])

    strided(f, n, look)
    return int8_scale_of(f.reduce("max", largest[0]))


@kernel("dynamic_int8")
def dynamic_int8(spec: KernelSpec, symbol: str) -> CudaKernel:
    with device_function(symbol, [("y", "float32"), ("x", "float32")], ["n"], _THREADS) as f:
        x, y, n = f.buffers["x"], f.buffers["y"], f.scalars["n"]
        base = B.bind(f.block * n)
        s = _scale(f, x, base, n)
        strided(f, n, lambda i: B.buffer_store(y, round_even(named(x[base + i] / s)) * s, [base + i]))
    return CudaKernel(f.result, _THREADS)


@kernel("store_int8")
def store_int8(spec: KernelSpec, symbol: str) -> CudaKernel:
    pointers = [("codes", "int8"), ("scale", "float32"), ("x", "float32")]
    strides = ["xs_b", "xs_h", "xs_s", "cs_b", "cs_h", "ss_b", "ss_h"]
    with device_function(symbol, pointers, ["n", "H", "S", *strides], _THREADS) as f:
        x, codes, n, v = f.buffers["x"], f.buffers["codes"], f.scalars["n"], f.scalars
        i_s, head = B.bind(T.truncmod(f.block, v["S"])), B.bind(T.truncdiv(f.block, v["S"]))
        i_h, i_b = B.bind(T.truncmod(head, v["H"])), B.bind(T.truncdiv(head, v["H"]))
        base = B.bind(i_b * v["xs_b"] + i_h * v["xs_h"] + i_s * v["xs_s"])
        to = B.bind(i_b * v["cs_b"] + i_h * v["cs_h"] + i_s * n)
        s = _scale(f, x, base, n)
        with B.If(EQ(f.thread, 0)), B.Then():
            B.buffer_store(f.buffers["scale"], s, [i_b * v["ss_b"] + i_h * v["ss_h"] + i_s])
        strided(
            f,
            n,
            lambda i: B.buffer_store(codes, convert(int8_codes(named(x[base + i]), s), "int8"), [to + i]),
        )
    return CudaKernel(f.result, _THREADS)
