"""Weight layouts that kernels read (runtime/FORMAT.md, "Weight layouts"): packers and their exact inverses.

Those of matrix products put 16 output columns side by side ("n16"), whatever the vector width of the
machine: a tile is one register of AVX-512, two of AVX2, four of NEON. A table that rows are picked from stays
row by row. Padding is zero.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qgraph.errors import QGraphError

LANES = 16  # output columns of a tile
GROUP = 16  # inputs that share one block scale
WORD = 8  # codes in one u32


def _ceildiv(a: int, b: int) -> int:
    return -(-a // b)


def _pad(a: npt.NDArray, rows: int, columns: int) -> npt.NDArray:
    return np.pad(a, ((0, rows - a.shape[0]), (0, columns - a.shape[1])))


def _check_nvfp4(codes: npt.NDArray, block_scale: npt.NDArray, scales: tuple[int, int]) -> None:
    if block_scale.shape != scales:
        raise QGraphError(f"block_scale is {block_scale.shape}, codes {codes.shape} need {scales}")
    if codes.size and codes.max() > 15:
        raise QGraphError(f"code {codes.max()} is not an E2M1 code (0..15)")


def pack_nvfp4_n16k8(
    codes: npt.NDArray[np.uint8], block_scale: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
    """Pack an NVFP4 weight into layout `nvfp4_n16k8`, for any K, N >= 1.

    Args:
        codes: E2M1 codes 0..15, [K, N].
        block_scale: E4M3 bits, [ceil(K/16), N].

    Returns:
        words u32 [ceil(N/16), 2*ceil(K/16), 16], where code of (k, n) is in bits 4(k%8)..4(k%8)+3 of
        [n//16, k//8, n%16]; scales u8 [ceil(N/16), ceil(K/16), 16].

    Raises:
        QGraphError: block_scale has another shape, or a code is above 15.
    """
    K, N = codes.shape
    blocks, tiles = _ceildiv(K, GROUP), _ceildiv(N, LANES)
    _check_nvfp4(codes, block_scale, (blocks, N))
    nibbles = _pad(codes, blocks * GROUP, tiles * LANES).reshape(2 * blocks, WORD, tiles, LANES)
    words = np.zeros((tiles, 2 * blocks, LANES), np.uint32)
    for j in range(WORD):
        words |= nibbles[:, j].transpose(1, 0, 2).astype(np.uint32) << np.uint32(4 * j)
    scales = _pad(block_scale, blocks, tiles * LANES).reshape(blocks, tiles, LANES).transpose(1, 0, 2)
    return words, np.ascontiguousarray(scales)


def unpack_nvfp4_n16k8(
    words: npt.NDArray[np.uint32], scales: npt.NDArray[np.uint8], shape: tuple[int, int]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Inverse of `pack_nvfp4_n16k8` for a weight of `shape` (K, N): (codes, block_scale)."""
    K, N = shape
    tiles, rows, _ = words.shape
    shifts = 4 * np.arange(WORD, dtype=np.uint32)
    nibbles = (words[:, :, None, :] >> shifts[:, None]) & np.uint32(15)  # [tile, row, j, lane]
    codes = nibbles.transpose(1, 2, 0, 3).reshape(rows * WORD, tiles * LANES).astype(np.uint8)
    block_scale = scales.transpose(1, 0, 2).reshape(-1, tiles * LANES)
    return np.ascontiguousarray(codes[:K, :N]), np.ascontiguousarray(block_scale[:, :N])


def pack_nvfp4_rows(
    codes: npt.NDArray[np.uint8], block_scale: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
    """Pack an NVFP4 table into layout `nvfp4_rows`, for any V, H >= 1. Blocks run along H.

    Args:
        codes: E2M1 codes 0..15, [V, H].
        block_scale: E4M3 bits, [V, ceil(H/16)].

    Returns:
        words u32 [V, 2*ceil(H/16)], where code of (v, h) is in bits 4(h%8)..4(h%8)+3 of [v, h//8]; scales u8
        [V, ceil(H/16)], as given.

    Raises:
        QGraphError: block_scale has another shape, or a code is above 15.
    """
    V, H = codes.shape
    blocks = _ceildiv(H, GROUP)
    _check_nvfp4(codes, block_scale, (V, blocks))
    nibbles = _pad(codes, V, blocks * GROUP).reshape(V, 2 * blocks, WORD)
    words = np.zeros((V, 2 * blocks), np.uint32)
    for j in range(WORD):
        words |= nibbles[:, :, j].astype(np.uint32) << np.uint32(4 * j)
    return words, np.ascontiguousarray(block_scale)


def unpack_nvfp4_rows(
    words: npt.NDArray[np.uint32], scales: npt.NDArray[np.uint8], columns: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Inverse of `pack_nvfp4_rows` for a table of `columns`: (codes, block_scale)."""
    shifts = 4 * np.arange(WORD, dtype=np.uint32)
    nibbles = (words[:, :, None] >> shifts) & np.uint32(15)
    return np.ascontiguousarray(nibbles.reshape(len(words), -1)[:, :columns].astype(np.uint8)), scales


def pack_f32_n16(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Pack a float32 weight [K, N] into layout `f32_n16`: [ceil(N/16), K, 16], [n//16, k, n%16] = W[k, n]."""
    K, N = weight.shape
    tiles = _ceildiv(N, LANES)
    return np.ascontiguousarray(_pad(weight, K, tiles * LANES).reshape(K, tiles, LANES).transpose(1, 0, 2))


def unpack_f32_n16(packed: npt.NDArray[np.float32], columns: int) -> npt.NDArray[np.float32]:
    """Inverse of `pack_f32_n16` for a weight of `columns` outputs: [K, N]."""
    tiles, K, _ = packed.shape
    return np.ascontiguousarray(packed.transpose(1, 0, 2).reshape(K, tiles * LANES)[:, :columns])
