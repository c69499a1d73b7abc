"""Operands and references shared by the tests of products with int8 activations."""

from __future__ import annotations

from typing import Any

import numpy as np
from group_cases import packed, random_weight
from kernel_harness import Kernel, aligned, compile_kernel
from matmul_cases import make_weight

from qgraph.codegen.bf16_rows import ROWS, row_words
from qgraph.codegen.int8_input import Int8Input, int8_input
from qgraph.codegen.isa import Isa
from qgraph.codegen.packing import pack_nvfp4_n16k8
from qgraph.codegen.spec import KernelSpec
from qgraph.codegen.tiles import has_tiles
from qgraph.formats import FORMATS
from qgraph.formats.activations import dynamic_int8

FORMATS_A8 = [name for name in FORMATS if int8_input(name)]


def input_of(weight_format: str) -> Int8Input:
    found = int8_input(weight_format)
    assert found is not None
    return found


def quantize_spec(k: int, wanted: Int8Input) -> KernelSpec:
    params = {"fields": wanted.fields, "block": wanted.block, "factor": wanted.factor}
    return KernelSpec.make("quantize_int8", k=k, **params)


def quantized(x: np.ndarray, wanted: Int8Input) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the kernel gives for rows without NaN and infinities, input by input."""
    M, K = x.shape
    scale = np.maximum(np.abs(x).max(axis=1) / np.float32(127), np.float32(2.0**-126))
    blocks, word = -(-K // wanted.block), 4 * wanted.fields
    q = np.zeros((M, blocks * wanted.block), np.int8)
    q[:, :K] = np.rint(x / scale[:, None])
    codes = np.empty_like(q)
    for k in range(q.shape[1]):
        byte, field = divmod(k % word, wanted.fields)
        codes[:, k - k % word + 4 * field + byte] = q[:, k]
    sums = q.reshape(M, blocks, -1).sum(axis=2, dtype=np.int32) * np.int32(wanted.factor)
    return codes, scale, sums


class Int8MatMul:
    """One kernel with its operands: `run` returns y, `reference` the float64 answer."""

    def __init__(
        self, isa: Isa, weight_format: str, K: int, N: int, weight: Any = None, **params: Any
    ) -> None:
        self.K, self.N, self.input = K, N, input_of(weight_format)
        self.spec = make_spec(weight_format, K, N, **params)
        self.isa = isa
        self.kernel: Kernel = compile_kernel(self.spec, isa)
        if weight_format == "nvfp4":
            weight = weight or make_weight(K, N)
            self.packed = [*pack_nvfp4_n16k8(weight.codes, weight.block_scale), weight.global_scale]
            self.value = weight.value
        else:
            weight = weight or random_weight(weight_format, K, N)
            self.packed = packed(weight, "2bit" if weight_format == "ternary" else "")
            self.value = weight.dequantize()
        self.operands = [aligned(a) for a in self.packed]
        for a in self.operands:
            a.flags.writeable = False

    def inputs(self, M: int) -> np.ndarray:
        return np.random.default_rng(M).standard_normal((M, self.K)).astype(np.float32)

    def quantize(self, x: np.ndarray, **how: Any) -> list[np.ndarray]:
        """Codes, scales and block sums by the kernel."""
        blocks = -(-self.K // self.input.block)
        out = [
            np.full((self.room_rows(len(x)), self.room), 99, np.int8),
            np.full(len(x), -7, np.float32),
            np.full((len(x), blocks), 99, np.int32),
        ]
        compile_kernel(quantize_spec(self.K, self.input), self.isa)(*out, x, len(x), blocks=len(x), **how)
        return out

    @property
    def tiles(self) -> bool:
        """Whether codes are bfloat16 in whole tiles, of many rows."""
        return self.input == int8_input("nvfp4") and has_tiles(self.spec, self.isa)

    @property
    def room(self) -> int:
        """Bytes that the codes of a row take."""
        plain = -(-self.K // self.input.block) * self.input.block
        return max(plain, 4 * row_words(self.K, 1)) if self.tiles else plain

    def room_rows(self, M: int) -> int:
        return -(-M // ROWS) * ROWS if self.tiles else M

    def run(self, x: np.ndarray, *extra: np.ndarray, **how: Any) -> np.ndarray:
        y = np.full((len(x), self.N), np.nan, np.float32)
        blocks = -(-len(x) // self.spec["m_block"]) * -(-self.N // self.spec["n_block"])
        self.kernel(y, *self.quantize(x), *self.operands, *extra, len(x), blocks=blocks, **how)
        return y

    def reference(self, x: np.ndarray) -> np.ndarray:
        return dynamic_int8(x).astype(np.float64) @ self.value.astype(np.float64)


def make_spec(weight_format: str, K: int, N: int, **params: Any) -> KernelSpec:
    given: dict[str, Any] = {"n_block": 32, "m_block": 128, "epilogue": ()}
    given |= {} if weight_format == "nvfp4" else {"block": FORMATS[weight_format].block}
    return KernelSpec.make(f"{FORMATS[weight_format].kernel}_a8", k=K, n=N, **(given | params))
