"""Planes of 2, 4 and 8 bits hold exactly what a weight is, in the bytes that ONNX Runtime documents."""

from __future__ import annotations

import numpy as np
import pytest
from lowbit_models import dense, random_weight, relative_error

from qgraph.export.nbits import Plane, means, planes
from qgraph.passes.lowbit_weights import FORMS

SHAPES = [(256, 8), (200, 33), (40, 5), (7, 1)]


def fields(packed: np.ndarray, bits: int) -> np.ndarray:
    """Bytes [.., n] -> fields [.., n * 8 / bits], one at a time, the first in the low bits."""
    found = [(packed.astype(int) >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(found, axis=-1).reshape(*packed.shape[:-1], -1)


def decode(plane: Plane) -> np.ndarray:
    """float64 [K, N] of the bytes of a plane."""
    K, N = plane.fields.shape
    B = plane.packed()
    blocks = -(-K // plane.block)
    assert B.dtype == np.uint8 and B.shape == (N, blocks, plane.block * plane.bits // 8)
    levels = fields(B, plane.bits)
    zero = np.full((N, blocks), 1 << (plane.bits - 1))
    if plane.zero_point is not None:
        packed = plane.packed_zero_points()
        assert packed.shape == (N, -(-blocks * plane.bits // 8))
        zero = fields(packed, plane.bits)[:, :blocks]
    W = (levels - zero[..., None]) * plane.scale.T.astype(np.float64)[..., None]
    return W.reshape(N, -1)[:, :K].T


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("format", FORMS)
def test_planes_add_up_to_the_weight(format: str, wide: bool) -> None:
    for K, N in SHAPES:
        q = random_weight(format, K, N, seed=K)
        found = planes(q, wide)
        assert all(plane.bits == 4 for plane in found) or not wide
        W = sum(decode(plane) for plane in found)
        if (M := means(q)) is not None:
            W = W + np.repeat(M.astype(np.float64), found[0].block, axis=0)[:K]
        # The scale of NVFP4 is a product rounded to float32, a mean a sum.
        assert relative_error(W, dense(q)) < (1e-7 if format in ("nvfp4", "int2", "int3") else 1e-15)


def test_as_few_planes_as_can_be() -> None:
    narrow = {"nvfp4": [8], "int8": [8], "ternary": [2], "int2": [2]}
    for format in FORMS:
        q = random_weight(format, 64, 4)
        wide = [4, 4] if format in ("nvfp4", "int8") else [4]
        assert [plane.bits for plane in planes(q, True)] == wide
        assert [plane.bits for plane in planes(q, False)] == narrow.get(format, [4])


def test_planes_of_nvfp4_share_their_scales() -> None:
    near, far = planes(random_weight("nvfp4", 64, 4), True)
    assert near.scale is far.scale
