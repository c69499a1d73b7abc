"""One thread of the matmul kernels beside numpy's float32 matmul, for every ISA this machine runs.

    python benchmarks/kernels_cpu.py [--shapes 1x4096x4096,128x384x1536] [--repeat 40] [--isa x86-64-v3]
        [--kernels matmul_f32,matmul_ternary]

All take turns. A figure is the median CPU time of a call (time descheduled on a busy machine is not in it).
Weights are cold: calls go around copies of them that exceed the last-level cache. GB/s counts the bytes of
weights and scales; the ratio is numpy's time over the kernel's. Kernels are timed with the splitting of rows
into digits, or the sums of blocks, that they take, which in a model several layers share.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # before numpy is imported

import numpy as np  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "codegen")]

from kernel_harness import aligned, compile_kernel, native_isas  # noqa: E402

from qgraph.codegen.digits import DigitRows  # noqa: E402
from qgraph.codegen.int8_input import Int8Input, int8_input  # noqa: E402
from qgraph.codegen.isa import Isa  # noqa: E402
from qgraph.codegen.packing import pack_f32_n16, pack_nvfp4_n16k8  # noqa: E402
from qgraph.codegen.packing_group import (  # noqa: E402
    code_layout,
    pack_blocks,
    pack_codes,
    pack_nibbles,
)
from qgraph.codegen.spec import KernelSpec  # noqa: E402
from qgraph.formats.group import GROUP_FORMATS, TERNARY, BlockFormat  # noqa: E402

SHAPES = (
    "1x384x384,1x4096x4096,2x4096x4096,4x4096x4096,8x384x1536,"
    "128x384x384,128x1536x384,128x384x1536,128x4096x4096"
)
N_BLOCK, M_BLOCK = 32, 128

Call = Callable[[], None]


@dataclass(frozen=True)
class Packed:
    """A kernel with a random weight in its layout."""

    op: str
    weights: list[np.ndarray]
    params: dict[str, Any] = field(default_factory=dict)
    sums: bool = False
    digits: Int8Input | None = None


def packed_weights(K: int, N: int, rng: np.random.Generator) -> dict[str, Packed]:
    """What is measured, by name."""
    codes, scale = rng.integers(0, 16, (K, N), np.uint8), rng.integers(0x20, 0x40, (-(-K // 16), N), np.uint8)
    found = {
        "matmul_f32": Packed("matmul_f32", [pack_f32_n16(rng.standard_normal((K, N)).astype(np.float32))]),
        "matmul_nvfp4": Packed(
            "matmul_nvfp4",
            [*pack_nvfp4_n16k8(codes, scale), np.ones(1, np.float32)],
            digits=int8_input("nvfp4"),
        ),
        "matmul_ternary base3": packed_group(TERNARY, K, N, rng, "base3"),
    }
    for spec in GROUP_FORMATS:
        found[spec.kernel] = packed_group(spec, K, N, rng, "2bit")
    return found


def packed_group(spec: BlockFormat, K: int, N: int, rng: np.random.Generator, packing: str) -> Packed:
    blocks = spec.blocks(K)
    codes = rng.integers(0, len(spec.values), (K, N), np.uint8)
    weights = [pack_codes(spec.name, codes, code_layout(spec.name, packing))]
    weights.append(pack_blocks((rng.random((blocks, N)) + 0.5).astype(np.float16)))
    if spec.offset == "zero_point":
        weights.append(pack_nibbles(rng.integers(0, len(spec.values), (blocks, N), np.uint8)))
    elif spec.offset == "mean":
        weights.append(pack_blocks(rng.standard_normal((blocks, N)).astype(np.float16)))
    params = {"block": spec.block} | ({"packing": packing} if spec is TERNARY else {})
    digits = None if spec is TERNARY and packing == "base3" else int8_input(spec.name)
    return Packed(spec.kernel, weights, params, spec.offset == "mean" and digits is None, digits)


def kernel_call(
    packed: Packed, isa: Isa, y: np.ndarray, x: np.ndarray, weights: list[np.ndarray]
) -> tuple[Call, float, int]:
    """(a call of the kernel, seconds to compile it, bytes of its image)."""
    (M, K), N = x.shape, y.shape[1]
    spec = KernelSpec.make(
        packed.op, k=K, n=N, n_block=N_BLOCK, m_block=M_BLOCK, epilogue=(), **packed.params
    )
    start = time.perf_counter()
    kernel = compile_kernel(spec, isa)
    seconds = time.perf_counter() - start
    before: Call = lambda: None  # noqa: E731
    alive = list(weights)
    if packed.digits is not None:
        rows = DigitRows(packed.digits, K)
        digits = aligned(np.zeros((M, rows.words), np.int32))
        wanted = {name: getattr(packed.digits, name) for name in ("fields", "block", "offset")}
        splitter, operands = compile_kernel(KernelSpec.make("split_digits", k=K, **wanted), isa).bind(
            digits, x, M
        )
        before = lambda: splitter(*operands, 0, M)  # noqa: E731
        alive.insert(0, digits)
    if packed.sums:
        sums = aligned(np.zeros((M, -(-K // packed.params["block"])), np.float32))
        add = compile_kernel(KernelSpec.make("block_sums", k=K, block=packed.params["block"]), isa)
        adder, operands = add.bind(sums, x)
        before = lambda: adder(*operands, 0, M)  # noqa: E731
        alive.append(sums)
    function, values = kernel.bind(y, x, *alive, M)
    blocks = -(-M // M_BLOCK) * -(-N // N_BLOCK)

    def call(alive: list[np.ndarray] = alive) -> None:  # `values` are bare addresses
        before()
        function(*values, 0, blocks)

    return call, seconds, len(kernel.image.code)


def cold(weights: list[np.ndarray], bytes_wanted: int) -> list[list[np.ndarray]]:
    """Copies of `weights`, together larger than `bytes_wanted`."""
    size = sum(w.nbytes for w in weights)
    return [[aligned(w) for w in weights] for _ in range(max(2, -(-bytes_wanted // size)))]


def measure(candidates: dict[str, list[Call]], repeat: int) -> dict[str, float]:
    """Median CPU seconds of a call; each candidate goes around its calls, and they take turns."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(repeat + 2):
        for name, calls in candidates.items():
            start = time.thread_time()
            calls[i % len(calls)]()
            if i >= 2:
                times[name].append(time.thread_time() - start)
    return {name: median(t) for name, t in times.items()}


def bench(
    shape: tuple[int, int, int], isas: tuple[Isa, ...], repeat: int, cache: int, wanted: set[str]
) -> None:
    M, K, N = shape
    rng = np.random.default_rng(0)
    x = aligned(rng.standard_normal((M, K)).astype(np.float32))
    weight = rng.standard_normal((K, N)).astype(np.float32)
    packed = {name: p for name, p in packed_weights(K, N, rng).items() if not wanted or p.op in wanted}
    out = aligned(np.zeros((M, N), np.float32))  # one for all: the first touch of a page is slow
    copies = [w[0] for w in cold([weight], cache)]
    candidates: dict[str, list[Call]] = {"numpy": [lambda w=w: np.matmul(x, w, out=out) for w in copies]}
    facts: dict[str, tuple[int, float, int]] = {"numpy": (weight.nbytes, 0.0, 0)}
    for name, case in packed.items():
        for isa in isas:
            calls = [kernel_call(case, isa, out, x, w) for w in cold(case.weights, cache)]
            candidates[f"{name} {isa.name}"] = [c[0] for c in calls]
            facts[f"{name} {isa.name}"] = (sum(w.nbytes for w in case.weights), calls[0][1], calls[0][2])
    seconds = measure(candidates, repeat)
    for name, t in seconds.items():
        size, compiled, image = facts[name]
        print(
            f"{M:4}x{K}x{N:<5} {name:30} {t * 1e6:9.1f} us {2 * M * K * N / t / 1e9:7.1f} GFLOP/s "
            f"{size / t / 1e9:6.1f} GB/s  x{seconds['numpy'] / t:5.2f}"
            + (f"  compile {compiled:.2f} s, {image} bytes" if image else "")
        )
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default=SHAPES, help="MxKxN,... (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=30, help="timed calls of each (default: %(default)s)")
    parser.add_argument(
        "--cache", type=int, default=96, help="MiB of weights to go around (default: %(default)s)"
    )
    parser.add_argument("--isa", choices=[i.name for i in native_isas()], help="only this one")
    parser.add_argument("--kernels", default="", help="only these (default: all)")
    args = parser.parse_args()
    isas = tuple(i for i in native_isas() if args.isa in (None, i.name))
    for shape in args.shapes.split(","):
        M, K, N = map(int, shape.split("x"))
        bench((M, K, N), isas, args.repeat, args.cache << 20, set(filter(None, args.kernels.split(","))))


if __name__ == "__main__":
    main()
