"""Four Over Six against its formula, one block at a time in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from weights import awkward, block_errors

from qgraph.formats import QTensor
from qgraph.solvers import SOLVERS


def candidates(W: np.ndarray, a: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """(scale, squared error) of each block with its largest weight at 6 and at 4: [2, blocks, N]."""
    K, N = W.shape
    scale, error = np.zeros((2, 2, -(-K // 16), N))
    for i, code in enumerate((6, 4)):
        for b in range(-(-K // 16)):
            for n in range(N):
                w = W[16 * b : 16 * b + 16, n]
                largest = np.abs(w).max()
                d = (largest / (np.float32(code) * a)).astype(ml_dtypes.float8_e4m3fn)
                d = np.float32(1) if largest == 0 else np.maximum(np.float32(d), np.float32(2**-9))
                s = d * a
                q = (w / s).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
                scale[i, b, n], error[i, b, n] = d, ((w - q * s) ** 2).sum()
    return scale, error


def assert_better_of_two(W: np.ndarray, q: QTensor) -> None:
    scale, error = candidates(W, q.global_scale)
    chosen = q.block_scale.astype(np.float64)
    assert ((chosen == scale[0]) | (chosen == scale[1])).all()
    norm = np.sqrt(
        np.array([(W[k : k + 16].astype(np.float64) ** 2).sum(axis=0) for k in range(0, len(W), 16)])
    )
    assert (np.sqrt(block_errors(W, q)) <= np.sqrt(error.min(axis=0)) + 2e-7 * norm).all()


@pytest.mark.parametrize("shape", [(1, 1), (17, 5), (3, 7), (64, 33), (100, 20)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e37])
def test_every_block_has_the_better_of_two_scales(shape: tuple[int, int], scale: float):
    W = (np.random.default_rng(0).standard_normal(shape) * scale).astype(np.float32)
    q = SOLVERS["four-over-six"](W)
    assert q.global_scale == np.float32(float(np.abs(W).max()) / (6 * 256))
    assert_better_of_two(W, q)


def test_awkward_blocks():
    W = awkward()
    assert_better_of_two(W, SOLVERS["four-over-six"](W))


def test_both_scales_are_used():
    """6, 4 and 0.5 are codes as they stand; 6, 4.5 and 3 are 1.5 times 4, 3 and 2."""
    W = np.zeros((16, 2), np.float32)
    W[:3, 0] = 6, 4, 0.5
    W[:3, 1] = 6, 4.5, 3
    q = SOLVERS["four-over-six"](W)
    assert np.array_equal(q.dequantize(), W)
    assert q.block_scale.astype(np.float32).tolist() == [[256, 384]]
