"""Round to nearest, in NVFP4 and MXFP4: bit for bit the formulas, block by block, rounding by ml_dtypes."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from weights import awkward

from qgraph.solvers import SOLVERS

SHAPES = [(1, 1), (16, 3), (17, 5), (3, 7), (64, 33), (100, 20)]


def naive_rtn(W: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """(codes, block scale bits, a) of NVFP4."""
    K, N = W.shape
    amax = np.abs(W).max()
    a = np.float32(float(amax) / (6 * 448)) if amax else np.float32(1)
    codes = np.zeros((K, N), np.uint8)
    scale = np.zeros((-(-K // 16), N), np.uint8)
    for b in range(len(scale)):
        for n in range(N):
            w = W[16 * b : 16 * b + 16, n]
            largest = np.abs(w).max()
            d = np.minimum(largest / (np.float32(6) * a), np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
            if largest == 0:
                d = np.float32(1).astype(ml_dtypes.float8_e4m3fn)
            elif d == 0:
                d = np.float32(2**-9).astype(ml_dtypes.float8_e4m3fn)
            s = np.float32(d) * a
            codes[16 * b : 16 * b + 16, n] = (w / s).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
            scale[b, n] = d.view(np.uint8)
    return codes, scale, a


def naive_mxfp4(W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes, block scale bits) of MXFP4."""
    K, N = W.shape
    codes = np.zeros((K, N), np.uint8)
    scale = np.zeros((-(-K // 32), N), np.uint8)
    for b in range(len(scale)):
        for n in range(N):
            w = W[32 * b : 32 * b + 32, n]
            largest = float(np.abs(w).max())
            exponent = max(math.frexp(largest)[1] - 1 - 2, -127) if largest else 0
            codes[32 * b : 32 * b + 32, n] = (
                (w / np.float32(2.0**exponent)).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
            )
            scale[b, n] = exponent + 127
    return codes, scale


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-38, 1e-6, 1.0, 1e37])
def test_nvfp4_is_the_formula(shape: tuple[int, int], scale: float):
    W = (np.random.default_rng(0).standard_normal(shape) * scale).astype(np.float32)
    if scale == 1e-38:
        W[0, 0] = 1e-30  # keeps `a` normal: the smallest blocks then fall below E4M3's range
    q = SOLVERS["rtn"](W)
    codes, block_scale, a = naive_rtn(W)
    assert q.global_scale == a
    assert np.array_equal(q.block_scale.view(np.uint8), block_scale)
    assert np.array_equal(q.codes, codes)


def test_nvfp4_of_awkward_blocks_is_the_formula():
    W = awkward()
    q = SOLVERS["rtn"](W)
    codes, block_scale, _ = naive_rtn(W)
    assert np.array_equal(q.block_scale.view(np.uint8), block_scale)
    assert np.array_equal(q.codes, codes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-6, 1.0, 1e37])
def test_mxfp4_is_the_formula(shape: tuple[int, int], scale: float):
    W = (np.random.default_rng(1).standard_normal(shape) * scale).astype(np.float32)
    q = SOLVERS["mxfp4-rtn"](W)
    codes, block_scale = naive_mxfp4(W)
    assert q.format == "mxfp4" and q.global_scale == 1
    assert np.array_equal(q.block_scale.view(np.uint8), block_scale)
    assert np.array_equal(q.codes, codes)


def test_mxfp4_of_awkward_blocks_is_the_formula():
    W = awkward()
    q = SOLVERS["mxfp4-rtn"](W)
    codes, block_scale = naive_mxfp4(W)
    assert np.array_equal(q.block_scale.view(np.uint8), block_scale)
    assert np.array_equal(q.codes, codes)


def test_mxfp4_saturates_what_its_power_of_two_leaves_above_6():
    W = np.zeros((32, 1), np.float32)
    W[0], W[1] = 7.99, 1
    q = SOLVERS["mxfp4-rtn"](W)
    assert q.block_scale.astype(np.float32)[0, 0] == 1 and q.dequantize()[0, 0] == 6
