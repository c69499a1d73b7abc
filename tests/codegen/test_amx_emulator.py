"""The instructions of AMX against numpy: those of the CPU where it has them, else of the emulator."""

from __future__ import annotations

import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import amx
import numpy as np
import pytest
from kernel_harness import Kernel
from tvm import tirx

from qgraph.codegen.kernels.amx import configure, multiply, release
from qgraph.codegen.kernels.function import function
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.support import support_object
from qgraph.codegen.link import link
from qgraph.codegen.spec import KernelSpec
from qgraph.codegen.tvm_backend import compile_object

pytestmark = amx.required
SIGNS = {"tdpbssd": "bb", "tdpbsud": "bB", "tdpbusd": "Bb", "tdpbuud": "BB"}  # of left and right: b is int8


@cache
def product(kind: str, rows: int, depth: int, strides: tuple[int, int, int] = (64, 64, 64)) -> Kernel:
    """c [rows, 16] += a [rows, depth] b [depth / 4, 64], one tile each, in rows of so many bytes."""
    spec = KernelSpec.make("probe", kind=kind, rows=rows, depth=depth, strides=strides)
    with function(spec.symbol, [("c", "int32"), ("a", "int8"), ("b", "int8")], []) as f:
        configure(index(rows), depth)
        c, a, b = ((f.buffers[n], index(0), s) for n, s in zip("cab", strides, strict=True))
        multiply(kind, [[c]], lambda step: step([a], [b]), resume=tirx.IntImm("bool", 1))
        release()
    data = compile_object({spec.symbol: f.result}, amx.ISA)
    return Kernel(spec, amx.ISA, link({spec.symbol: data}, [spec.symbol], support_object(amx.ISA)))


def run(kind: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c + a b: a [rows, depth] bytes, b [depth / 4, 64] bytes, c [rows, 16] of four."""
    rows, depth = a.shape
    left = np.full((rows, 64), 0x7F, np.uint8)
    left[:, :depth] = a.view(np.uint8)
    out = c.copy()
    product(kind, rows, depth)(out, left, np.ascontiguousarray(b), blocks=1)
    return out


@pytest.mark.parametrize("kind", SIGNS)
def test_products_of_bytes(kind: str) -> None:
    rng = np.random.default_rng(0)
    for rows, depth in ((16, 64), (16, 32), (5, 64), (1, 4)):
        a, b = rng.integers(0, 256, (rows, depth), np.uint8), rng.integers(0, 256, (depth // 4, 64), np.uint8)
        c = rng.integers(-(2**31), 2**31, (rows, 16), np.int32)
        left = a.view(SIGNS[kind][0]).astype(np.int64)
        right = b.view(SIGNS[kind][1]).astype(np.int64).reshape(-1, 16, 4).transpose(0, 2, 1).reshape(-1, 16)
        want = (c + left @ right).astype(np.int32)  # sums wrap around
        np.testing.assert_array_equal(run(kind, a, b, c), want)


def bits(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16, truncated: two bytes each."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def value(halves: np.ndarray) -> np.ndarray:
    return (halves.astype(np.uint32) << 16).view(np.float32)


def flushed(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float32)
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def reference(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Of bfloat16 bits a [rows, 2 k], b [k, 32]: in float64, where a product and a sum are exact, rounded to
    float32 after each."""
    left, right = flushed(value(a)).astype(np.float64), flushed(value(b)).astype(np.float64)
    sums = np.zeros((2, len(a), 16), np.float32)
    for k in range(b.shape[0]):
        for odd in range(2):
            sums[odd] = flushed(sums[odd] + left[:, 2 * k + odd, None] * right[None, k, odd::2])
    return flushed(flushed(c) + flushed(sums[0] + sums[1]))


def test_products_of_bfloat16() -> None:
    rng = np.random.default_rng(0)
    for rows, depth in ((16, 64), (16, 32), (5, 64), (1, 4)):
        a = bits(rng.standard_normal((rows, depth // 2)))
        b = bits(rng.standard_normal((depth // 4, 32)))
        c = rng.standard_normal((rows, 16)).astype(np.float32)
        got = run("tdpbf16ps", a.view(np.uint8), b.view(np.uint8), c)
        np.testing.assert_array_equal(got, reference(a, b, c))


def test_bfloat16_that_is_not_normal() -> None:
    """Subnormal operands, sums and results are zeros; an infinity stays in its row, and a NaN."""
    special = np.float32([1e-39, 2.0**-126, 2.0**-80, 2.0**-64, np.inf, np.nan, 1, -np.inf])
    a = np.ones((8, 4), np.float32)
    a[:, 1] = special
    b = np.full((2, 32), 2.0**-63, np.float32)
    b[0, 2:4], b[:, 4] = 0, 3e38
    c = np.full((8, 16), 1e-40, np.float32)
    halves = bits(a), bits(b)
    with np.errstate(all="ignore"):
        want = reference(*halves, c)
    got = run("tdpbf16ps", *(h.view(np.uint8) for h in halves), c)
    np.testing.assert_array_equal(got, want)


def test_rows_lie_where_the_stride_says() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(-128, 128, (3, 100), np.int8), rng.integers(-128, 128, (8, 80), np.int8)
    c = rng.integers(-9, 9, (3, 20), np.int32)
    want = c.copy()
    right = b[:, :64].astype(np.int32).reshape(-1, 16, 4).transpose(0, 2, 1).reshape(-1, 16)
    want[:, :16] += a[:, :32].astype(np.int32) @ right
    product("tdpbssd", 3, 32, (80, 100, 80))(c, a, b, blocks=1)
    np.testing.assert_array_equal(c, want)


_FAULT = """
import ctypes, mmap, sys
sys.path.insert(0, {folder!r})
import amx
code = bytes.fromhex({code!r}) + b"\\xc3"
page = mmap.mmap(-1, 4096, prot=7)
page.write(code)
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("c4e27b49c0", "before ldtilecfg"),  # tilezero tmm0
        ("0f0b", ""),  # ud2: not an instruction of AMX
    ],
)
@pytest.mark.skipif(amx.NATIVE, reason="of the emulator")
def test_what_a_cpu_refuses_ends_the_process(code: str, message: str) -> None:
    program = _FAULT.format(folder=str(Path(__file__).parent), code=code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -(signal.SIGABRT if message else signal.SIGILL) and message in done.stderr
