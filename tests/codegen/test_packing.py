"""Weight layouts: element addresses as FORMAT.md states them, exact round trips, zero padding."""

from __future__ import annotations

import numpy as np
import pytest

from qgraph.codegen.packing import (
    pack_f32_n16,
    pack_nvfp4_n16k8,
    pack_nvfp4_rows,
    unpack_f32_n16,
    unpack_nvfp4_n16k8,
    unpack_nvfp4_rows,
)
from qgraph.errors import QGraphError

SHAPES = [(1, 1), (8, 16), (16, 16), (15, 17), (17, 15), (24, 33), (100, 3), (384, 48)]


def _nvfp4(K: int, N: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(K * 1000 + N)
    return rng.integers(0, 16, (K, N), np.uint8), rng.integers(0, 127, (-(-K // 16), N), np.uint8)


@pytest.mark.parametrize(("K", "N"), SHAPES)
def test_nvfp4_elements_are_where_the_format_says(K: int, N: int) -> None:
    codes, scale = _nvfp4(K, N)
    words, scales = pack_nvfp4_n16k8(codes, scale)
    tiles, blocks = -(-N // 16), -(-K // 16)
    assert words.shape == (tiles, 2 * blocks, 16)
    assert words.dtype == np.uint32
    assert scales.shape == (tiles, blocks, 16)
    assert scales.dtype == np.uint8
    for n in range(16 * tiles):
        for k in range(16 * blocks):
            got = words[n // 16, k // 8, n % 16] >> 4 * (k % 8) & 15
            assert got == (codes[k, n] if k < K and n < N else 0)
        for b in range(blocks):
            assert scales[n // 16, b, n % 16] == (scale[b, n] if n < N else 0)


@pytest.mark.parametrize(("K", "N"), SHAPES)
def test_nvfp4_round_trip(K: int, N: int) -> None:
    codes, scale = _nvfp4(K, N)
    words, scales = pack_nvfp4_n16k8(codes, scale)
    assert words.flags.c_contiguous
    assert scales.flags.c_contiguous
    got_codes, got_scale = unpack_nvfp4_n16k8(words, scales, (K, N))
    np.testing.assert_array_equal(got_codes, codes)
    np.testing.assert_array_equal(got_scale, scale)


@pytest.mark.parametrize(("H", "V"), SHAPES)
def test_nvfp4_rows(H: int, V: int) -> None:
    """Two columns a byte, rows of whole blocks; and back."""
    codes, scale = (np.ascontiguousarray(part.T) for part in _nvfp4(H, V))
    words, scales = pack_nvfp4_rows(codes, scale)
    blocks = -(-H // 16)
    assert words.shape == (V, 2 * blocks) and words.dtype == np.uint32 and words.flags.c_contiguous
    in_bytes = words.astype("<u4").view(np.uint8)
    assert in_bytes.shape == (V, 8 * blocks)
    for v in range(V):
        for h in range(16 * blocks):
            code = codes[v, h] if h < H else 0
            assert in_bytes[v, h // 2] >> 4 * (h % 2) & 15 == words[v, h // 8] >> 4 * (h % 8) & 15 == code
    got_codes, got_scale = unpack_nvfp4_rows(words, scales, H)
    np.testing.assert_array_equal(got_codes, codes)
    np.testing.assert_array_equal(got_scale, scale)


@pytest.mark.parametrize(("K", "N"), SHAPES)
def test_f32_round_trip_and_address(K: int, N: int) -> None:
    weight = np.random.default_rng(K + N).standard_normal((K, N)).astype(np.float32)
    packed = pack_f32_n16(weight)
    assert packed.shape == (-(-N // 16), K, 16)
    assert packed.flags.c_contiguous
    np.testing.assert_array_equal(unpack_f32_n16(packed, N), weight)
    assert packed[(N - 1) // 16, K - 1, (N - 1) % 16] == weight[K - 1, N - 1]
    assert not packed[-1, :, (N - 1) % 16 + 1 :].any()


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(QGraphError, match="block_scale"):
        pack_nvfp4_n16k8(np.zeros((17, 4), np.uint8), np.zeros((1, 4), np.uint8))
    with pytest.raises(QGraphError, match="not an E2M1 code"):
        pack_nvfp4_n16k8(np.full((16, 4), 16, np.uint8), np.zeros((1, 4), np.uint8))
    with pytest.raises(QGraphError, match="block_scale"):
        pack_nvfp4_rows(np.zeros((4, 17), np.uint8), np.zeros((4, 1), np.uint8))
    with pytest.raises(QGraphError, match="not an E2M1 code"):
        pack_nvfp4_rows(np.full((4, 16), 16, np.uint8), np.zeros((4, 1), np.uint8))
