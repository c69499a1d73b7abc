"""Operands and references shared by the tests of matmul kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from kernel_harness import Kernel, aligned, compile_kernel

from qgraph.codegen.bf16_rows import PARTS, ROWS
from qgraph.codegen.digits import DigitRows, digit_rows
from qgraph.codegen.isa import Isa
from qgraph.codegen.packing import pack_f32_n16, pack_nvfp4_n16k8
from qgraph.codegen.spec import KernelSpec

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclass
class Weight:
    """A random NVFP4 weight and its float32 value [K, N]."""

    codes: np.ndarray
    block_scale: np.ndarray  # E4M3 bits
    global_scale: np.ndarray

    @property
    def value(self) -> np.ndarray:
        scale = self.block_scale.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * self.global_scale[0]
        return E2M1[self.codes] * np.repeat(scale, 16, axis=0)[: self.codes.shape[0]]


def make_weight(K: int, N: int, low: int = 0, high: int = 0x7F) -> Weight:
    """Codes over all 16 values, scales over E4M3 bits [low, high), by default all finite ones >= 0."""
    rng = np.random.default_rng(1000 * K + N)
    codes = rng.integers(0, 16, (K, N), np.uint8)
    return Weight(codes, rng.integers(low, high, (-(-K // 16), N), np.uint8), np.array([2.5e-3], np.float32))


def gelu_erf(x: np.ndarray) -> np.ndarray:
    from math import erf

    return x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))


ACTIVATIONS = {
    "gelu_erf": gelu_erf,
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


class MatMul:
    """One matmul kernel with its operands: `run` returns y, `reference` the float64 answer."""

    def __init__(
        self,
        isa: Isa,
        op: str,
        weight: Weight,
        n_block: int = 32,
        m_block: int = 128,
        epilogue: tuple[str, ...] = (),
        **params: int,
    ) -> None:
        self.K, self.N = weight.codes.shape
        self.params = params
        self.weight, self.epilogue = weight, epilogue
        self.n_block, self.m_block = n_block, m_block
        blocks = {"n_block": n_block, "m_block": m_block}
        spec = KernelSpec.make(op, k=self.K, n=self.N, epilogue=epilogue, **blocks, **params)
        self.kernel: Kernel = compile_kernel(spec, isa)
        if op == "matmul_nvfp4":
            words, scales = pack_nvfp4_n16k8(weight.codes, weight.block_scale)
            self.operands = [aligned(words), aligned(scales), weight.global_scale]
        else:
            self.operands = [aligned(pack_f32_n16(weight.value))]
        rng = np.random.default_rng(7)
        self.bias = rng.standard_normal(self.N).astype(np.float32)
        for a in (*self.operands, self.bias):
            a.flags.writeable = False

    def inputs(self, M: int) -> tuple[np.ndarray, np.ndarray]:
        """x [M, K] and a residual [M, N]."""
        rng = np.random.default_rng(M)
        x = rng.standard_normal((M, self.K)).astype(np.float32)
        return x, rng.standard_normal((M, self.N)).astype(np.float32)

    def run(self, x: np.ndarray, residual: np.ndarray, **how: object) -> np.ndarray:
        M = x.shape[0]
        y = np.full((M, self.N), np.nan, np.float32)
        isa, op = self.kernel.isa, self.kernel.spec.op
        digits = digits_of(isa, "nvfp4", x, fewer=self.params) if op == "matmul_nvfp4" else []
        args = [y, x, *digits, *self.operands]
        args += [self.bias] if "bias" in self.epilogue else []
        args += [residual] if "residual" in self.epilogue else []
        args += [factor_of(residual)] if "factor" in self.epilogue else []
        blocks = -(-M // self.m_block) * -(-self.N // self.n_block)
        self.kernel(*args, M, blocks=blocks, **how)  # type: ignore[arg-type]
        return y

    def reference(self, x: np.ndarray, residual: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            y = x.astype(np.float64) @ self.weight.value.astype(np.float64)
            for name in self.epilogue:
                if name == "bias":
                    y = y + self.bias
                elif name == "residual":
                    y = y + residual
                elif name == "factor":
                    y = y * factor_of(residual)
                else:
                    y = ACTIVATIONS[name](y)
        return y


def factor_of(residual: np.ndarray) -> np.ndarray:
    """Another operand of the same shape, for products that are multiplied by one."""
    return residual[::-1] + np.float32(1)


def digits_of(
    isa: Isa,
    weight_format: str,
    x: np.ndarray,
    packing: str = "",
    block: int = 0,
    fewer: Mapping[str, int] | None = None,
    **how: Any,
) -> list[np.ndarray]:
    """The digits that the kernel of a format takes behind x [M, K], by their kernel; nothing where it takes
    none. `fewer` is {"digits": ..} where many rows have fewer."""
    M, K = x.shape
    rows = digit_rows(weight_format, packing, K, block)
    if rows is None:
        return []
    params = {"fields": rows.input.fields, "block": rows.input.block, "offset": rows.input.offset}
    digits = np.full(-(-M // ROWS) * ROWS * rows.room((fewer or {}).get("parts", PARTS)), -7, np.int32)
    kernel = compile_kernel(KernelSpec.make("split_digits", k=K, **params, **(fewer or {})), isa)
    kernel(digits, x, M, blocks=M, **how)
    return [digits if isa.base else digits[: M * rows.words].reshape(M, rows.words)]


def compact(digits: np.ndarray, rows: DigitRows) -> np.ndarray:
    """The rows of `digits_of`, which has room for three digits, where they have fewer: i32 [M, words]."""
    return digits.reshape(-1)[: len(digits) * rows.words].reshape(len(digits), rows.words)


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Relative error in the 2-norm."""
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))
