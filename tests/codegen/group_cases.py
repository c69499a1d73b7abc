"""Operands and references shared by the tests of group-quantized weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from kernel_harness import Kernel, aligned, compile_kernel
from matmul_cases import digits_of

from qgraph.codegen.isa import Isa
from qgraph.codegen.packing_group import code_layout, pack_blocks, pack_codes, pack_nibbles
from qgraph.codegen.spec import KernelSpec
from qgraph.formats import FORMATS, QTensor
from qgraph.formats.group import GROUP_FORMATS

# (format, packing), and how tests are named
CASES = [(f.name, p) for f in GROUP_FORMATS for p in (("2bit", "base3") if f.name == "ternary" else ("",))]
NAMES = [f"{name}-{packing}".strip("-") for name, packing in CASES]


def random_weight(weight_format: str, K: int, N: int, scale: tuple[float, float] = (0.01, 0.1)) -> QTensor:
    """Every code is as likely as any other; scales are uniform in `scale`, means of either sign."""
    spec = FORMATS[weight_format]
    rng = np.random.default_rng(1000 * K + N)
    blocks, levels = (spec.blocks(K), N), len(spec.values)
    offset: np.ndarray | None = None
    if spec.offset == "zero_point":
        offset = rng.integers(0, levels, blocks, np.uint8)
    elif spec.offset == "mean":
        offset = (rng.standard_normal(blocks) * scale[1]).astype(np.float16)
    codes = rng.integers(0, levels, (K, N), np.uint8)
    return QTensor(
        weight_format, (K, N), codes, rng.uniform(*scale, blocks).astype(np.float16), block_offset=offset
    )


def packed(q: QTensor, packing: str) -> list[np.ndarray]:
    """The arrays that the kernel of `q` takes."""
    arrays = [pack_codes(q.format, q.codes, code_layout(q.format, packing)), pack_blocks(q.block_scale)]
    if q.block_offset is not None:
        pack = pack_nibbles if FORMATS[q.format].offset == "zero_point" else pack_blocks
        arrays.append(pack(q.block_offset))
    return arrays


def make_spec(weight_format: str, packing: str, K: int, N: int, **params: Any) -> KernelSpec:
    given = {"n_block": 32, "m_block": 128, "epilogue": (), "block": FORMATS[weight_format].block}
    given |= {"packing": packing} if packing else {}
    return KernelSpec.make(FORMATS[weight_format].kernel, k=K, n=N, **(given | params))


class GroupMatMul:
    """One kernel with its operands: `run` returns y, `reference` the float64 answer."""

    def __init__(self, isa: Isa, q: QTensor, packing: str, **params: int) -> None:
        self.isa, self.q, self.format, self.packing = isa, q, FORMATS[q.format], packing
        self.K, self.N = q.shape
        self.params = params
        self.kernel: Kernel = compile_kernel(make_spec(q.format, packing, self.K, self.N, **params), isa)
        self.operands = [aligned(a) for a in packed(q, packing)]
        for a in self.operands:
            a.flags.writeable = False

    def inputs(self, M: int) -> np.ndarray:
        return np.random.default_rng(M).standard_normal((M, self.K)).astype(np.float32)

    def run(self, x: np.ndarray, **how: Any) -> np.ndarray:
        M = len(x)
        guard = {k: how[k] for k in how if k == "guard"}
        digits = digits_of(self.isa, self.format.name, x, self.packing, fewer=self.params, **guard)
        sums = []
        if self.format.offset == "mean" and not digits:
            sums = [block_sums(self.isa, x, self.format.block, **guard)]
        y = np.full((M, self.N), np.nan, np.float32)
        self.kernel(y, x, *digits, *self.operands, *sums, M, blocks=-(-M // 128) * -(-self.N // 32), **how)
        return y

    def reference(self, x: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return x.astype(np.float64) @ self.q.dequantize().astype(np.float64)


def block_sums(isa: Isa, x: np.ndarray, block: int, **how: Any) -> np.ndarray:
    """What the kernel gives: float32 [M, ceil(K / block)]."""
    M, K = x.shape
    sums = np.full((M, -(-K // block)), np.nan, np.float32)
    compile_kernel(KernelSpec.make("block_sums", k=K, block=block), isa)(sums, x, blocks=M, **how)
    return sums
