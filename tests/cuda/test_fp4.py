"""Products of NVFP4 by NVFP4 on the emulated GPU, and the instruction for them where there is one."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from emulator import Kernel, emulate
from matmul_cases import E2M1, make_weight

from qgraph.codegen.cuda.arch import CudaArch
from qgraph.codegen.cuda.kernels import build_kernel
from qgraph.codegen.cuda.text import cuda_text
from qgraph.codegen.cuda.toolkit import find_compiler
from qgraph.codegen.packing import pack_nvfp4_n16k8
from qgraph.codegen.spec import CUDA_MANY_COLUMNS, CUDA_MANY_ROWS, KernelSpec
from qgraph.errors import UnsupportedError
from qgraph.formats.activations import dynamic_nvfp4

SHAPES = [(1, 1), (37, 19), (300, 130)]
GLOBAL = np.array([0.01], np.float32)


def _product(K: int, N: int) -> KernelSpec:
    params: dict[str, Any] = {"rows": "many", "activations": "nvfp4", "epilogue": ()}
    return KernelSpec.make("matmul_nvfp4", k=K, n=N, **params)


def _rounding(K: int) -> KernelSpec:
    return KernelSpec.make("quantize_nvfp4", k=K)


@pytest.fixture(scope="module")
def kernels() -> dict[str, Kernel]:
    return emulate([make for K, N in SHAPES for make in (_product(K, N), _rounding(K))])


def _rounded(kernels: dict[str, Kernel], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes as words, scales as E4M3 bits."""
    M, K = x.shape
    blocks = -(-K // 16)
    codes, scales = np.full((M, 2 * blocks), 0xAAAAAAAA, np.uint32), np.full((M, blocks), 0xAA, np.uint8)
    kernels[_rounding(K).symbol](codes, scales, x, GLOBAL, blocks=M)
    return codes, scales


def _value(codes: np.ndarray, scales: np.ndarray, K: int) -> np.ndarray:
    nibbles = (codes[:, :, None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
    s = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * GLOBAL[0]
    return (E2M1[nibbles.reshape(len(codes), -1)] * np.repeat(s, 16, 1))[:, :K]


@pytest.mark.parametrize(("K", "N"), SHAPES)
def test_codes_are_what_is_rounded_to(kernels: dict[str, Kernel], K: int, N: int) -> None:
    x = np.random.default_rng(K).standard_normal((5, K)).astype(np.float32)
    x[1] = 0
    x[2] *= 1e-6
    x[3] *= 1e6
    codes, scales = _rounded(kernels, x)
    np.testing.assert_array_equal(_value(codes, scales, K), dynamic_nvfp4(x, GLOBAL[0]))
    tail = codes.reshape(5, -1)[:, -(-K // 8) :]
    assert not tail.any()  # words beyond the inputs


@pytest.mark.parametrize("M", [1, 9, 130])
@pytest.mark.parametrize(("K", "N"), SHAPES)
def test_product(kernels: dict[str, Kernel], K: int, N: int, M: int) -> None:
    weight = make_weight(K, N)
    words, block_scale = pack_nvfp4_n16k8(weight.codes, weight.block_scale)
    x = np.random.default_rng(M).standard_normal((M, K)).astype(np.float32)
    if M == 9:
        x[3, K // 2] = np.nan
    codes, scales = _rounded(kernels, x)
    y = np.full((M, N), np.nan, np.float32)
    blocks = -(-M // CUDA_MANY_ROWS) * -(-N // CUDA_MANY_COLUMNS)
    args = (y, codes, scales, GLOBAL, words, block_scale, weight.global_scale, M)
    kernels[_product(K, N).symbol](*args, blocks=blocks)
    rounded = dynamic_nvfp4(x, GLOBAL[0]).astype(np.float64)
    want = rounded @ weight.value.astype(np.float64)
    terms = np.abs(rounded) @ np.abs(weight.value).astype(np.float64)
    good = np.isfinite(rounded).all(1)
    assert np.isnan(y[~good]).all()
    assert np.max(np.abs(y - want)[good] / (terms[good] + 1e-30)) < 1e-6


def test_blackwell_has_an_instruction_for_it() -> None:
    try:
        compiler = find_compiler()
    except UnsupportedError as error:
        pytest.skip(str(error))
    spec = _product(300, 130)
    text = cuda_text({spec.symbol: build_kernel(spec).function})
    for number, wanted in (("120a", True), ("90a", False)):
        arch = CudaArch("ptx", f"compute_{number}", "")
        if not compiler.supports(arch):
            pytest.skip(f"{compiler.name} does not know {number}")
        ptx = compiler.compile(text, arch)
        assert (b"kind::mxf4nvf4.block_scale" in ptx) == wanted
        machine = CudaArch("cubin", f"sm_{number}", "")
        assert compiler.compile(text, machine).startswith(b"\x7fELF")
