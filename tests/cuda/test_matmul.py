"""Products by packed weights on the emulated GPU against float64, at awkward shapes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from emulator import Kernel, emulate
from group_cases import CASES, packed, random_weight
from matmul_cases import ACTIVATIONS, make_weight

from qgraph.codegen.packing import pack_f32_n16, pack_nvfp4_n16k8
from qgraph.codegen.spec import CUDA_FEW_COLUMNS, CUDA_MANY_COLUMNS, CUDA_MANY_ROWS, CUDA_TILE, KernelSpec
from qgraph.formats import FORMATS

SHAPES = [(1, 1), (300, 130)]
WEIGHTS = [("f32", ""), ("nvfp4", ""), *CASES]
NAMES = [f"{name}-{packing}".strip("-") for name, packing in WEIGHTS]
ROWS = {"one": (1,), "few": (2, 8), "many": (9, 130)}
EPILOGUE = ("bias", "gelu_erf", "residual", "factor")
WITH_EPILOGUE = ("f32", "nvfp4")  # which share it with the others


def _operands(name: str, packing: str, K: int, N: int) -> tuple[list[np.ndarray], np.ndarray]:
    """What the kernel takes, and the weight [K, N]."""
    if name == "f32":
        W = np.random.default_rng(K + N).standard_normal((K, N)).astype(np.float32)
        return [pack_f32_n16(W)], W
    if name == "nvfp4":
        weight = make_weight(K, N)
        words, scales = pack_nvfp4_n16k8(weight.codes, weight.block_scale)
        return [words, scales, weight.global_scale], weight.value
    q = random_weight(name, K, N)
    return packed(q, packing), q.dequantize()


def _spec(name: str, packing: str, K: int, N: int, rows: str, **params: Any) -> KernelSpec:
    op = {"f32": "matmul_f32"}.get(name) or FORMATS[name].kernel
    given: dict[str, Any] = {"epilogue": (), "rows": rows}
    if name not in ("f32", "nvfp4"):
        given |= {"block": FORMATS[name].block}
    if packing:
        given |= {"packing": packing}
    if rows == "many" and name != "f32":
        given |= {"parts": 2}
    return KernelSpec.make(op, k=K, n=N, **(given | params))


def _specs(name: str, packing: str) -> list[KernelSpec]:
    every = [_spec(name, packing, K, N, rows) for K, N in SHAPES for rows in ROWS]
    if name in WITH_EPILOGUE:
        every += [_spec(name, packing, 37, 19, rows, epilogue=EPILOGUE) for rows in ROWS]
    return [*every, *([_spec(name, packing, 256, 48, "many", parts=1)] if name != "f32" else [])]


@cache
def _kernels(name: str, packing: str) -> dict[str, Kernel]:
    return emulate(_specs(name, packing))


def _blocks(spec: KernelSpec, M: int) -> int:
    if spec["rows"] != "many":
        return -(-spec["n"] // (16 if spec.op == "matmul_f32" else CUDA_FEW_COLUMNS))
    rows, columns = (CUDA_TILE, CUDA_TILE) if spec.op == "matmul_f32" else (CUDA_MANY_ROWS, CUDA_MANY_COLUMNS)
    return -(-M // rows) * -(-spec["n"] // columns)


def _run(spec: KernelSpec, kernels: dict[str, Kernel], x: np.ndarray, operands: list[Any]) -> np.ndarray:
    y = np.full((len(x), spec["n"]), np.nan, np.float32)
    kernels[spec.symbol](y, x, *operands, len(x), blocks=_blocks(spec, len(x)))
    return y


def _inputs(M: int, K: int) -> np.ndarray:
    return np.random.default_rng(M).standard_normal((M, K)).astype(np.float32)


def _error(got: np.ndarray, x: np.ndarray, W: np.ndarray) -> float:
    """The largest error, in parts of what the terms of a sum add up to in magnitude."""
    x, W = x.astype(np.float64), W.astype(np.float64)
    return float(np.max(np.abs(got - x @ W) / (np.abs(x) @ np.abs(W) + 1e-30)))


@pytest.mark.parametrize(("name", "packing"), WEIGHTS, ids=NAMES)
def test_any_rows_and_shapes(name: str, packing: str) -> None:
    kernels = _kernels(name, packing)
    for K, N in SHAPES:
        operands, W = _operands(name, packing, K, N)
        for rows, counts in ROWS.items():
            for M in counts:
                x = _inputs(M, K)
                got = _run(_spec(name, packing, K, N, rows), kernels, x, operands)
                # Two bfloat16 numbers hold an activation to 2^-17.
                limit = 1e-5 if rows == "many" and name != "f32" else 1e-6
                assert _error(got, x, W) < limit, (K, N, M)


@pytest.mark.parametrize("name", WITH_EPILOGUE)
def test_epilogue(name: str, packing: str = "") -> None:
    K, N = 37, 19
    operands, W = _operands(name, packing, K, N)
    bias = np.random.default_rng(0).standard_normal(N).astype(np.float32)
    for rows, counts in ROWS.items():
        M = counts[-1]
        x, residual, factor = _inputs(M, K), *_inputs(M + 1, M * N)[:2].reshape(2, M, N)
        spec = _spec(name, packing, K, N, rows, epilogue=EPILOGUE)
        got = _run(spec, _kernels(name, packing), x, [*operands, bias, residual, factor])
        want = ACTIVATIONS["gelu_erf"](x.astype(np.float64) @ W + bias)
        want = (want + residual) * factor
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize(("name", "packing"), WEIGHTS[1:], ids=NAMES[1:])
def test_one_part_is_the_product_of_activations_rounded_to_bfloat16(name: str, packing: str) -> None:
    import ml_dtypes

    operands, W = _operands(name, packing, 256, 48)
    x = _inputs(33, 256)
    got = _run(_spec(name, packing, 256, 48, "many", parts=1), _kernels(name, packing), x, operands)
    rounded = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    if name not in FORMATS or FORMATS[name].offset != "mean":
        assert _error(got, rounded, W) < 1e-6
        return
    # The share of means goes by the sums of a block's inputs as they are.
    means = np.repeat(random_weight(name, 256, 48).block_offset, FORMATS[name].block, 0)[:256]
    assert _error(got - (x - rounded).astype(np.float64) @ means.astype(np.float64), rounded, W) < 1e-6


@pytest.mark.parametrize(("name", "packing"), WEIGHTS, ids=NAMES)
def test_a_row_stays_by_itself(name: str, packing: str) -> None:
    """An infinity or NaN in one row leaves the others to the bit as they are, and comes out of its own."""
    K, N = 300, 130
    operands, W = _operands(name, packing, K, N)
    for rows, M in (("few", 8), ("many", 9)):
        spec, kernels = _spec(name, packing, K, N, rows), _kernels(name, packing)
        x = _inputs(M, K)
        clean = _run(spec, kernels, x, operands)
        x[1, 7], x[4, 299] = np.inf, np.nan
        got = _run(spec, kernels, x, operands)
        others = [i for i in range(M) if i not in (1, 4)]
        np.testing.assert_array_equal(got[others], clean[others])
        assert np.isnan(got[4]).all()
        with np.errstate(invalid="ignore"):
            want = np.inf * np.sign(W[7])
        certain = np.isfinite(W[7]) & (W[7] != 0)
        # Where a format has a mean, its share of the sum is infinite by itself, and may be of the other sign.
        if FORMATS.get(name) is None or FORMATS[name].offset != "mean":
            np.testing.assert_array_equal(got[1][certain], want[certain])
        assert not np.isfinite(got[1]).any() or not certain.all()


def test_few_rows_do_not_depend_on_their_number() -> None:
    operands, _ = _operands("nvfp4", "", 300, 130)
    kernels = _kernels("nvfp4", "")
    x = _inputs(8, 300)
    few = _run(_spec("nvfp4", "", 300, 130, "few"), kernels, x, operands)
    for i in range(8):
        one = _run(_spec("nvfp4", "", 300, 130, "one"), kernels, x[i : i + 1].copy(), operands)
        np.testing.assert_array_equal(one[0], few[i])
