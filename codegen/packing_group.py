"""Layouts of group-quantized weights (runtime/FORMAT.md, "Weight layouts"): packers, their exact inverses.

All put 16 output columns side by side, as packing.py does. Codes are levels counted from the lowest
(`QTensor.codes`); scales, means and zero points are [ceil(K / block), N]. Padding is zero.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qgraph.codegen.packing import LANES
from qgraph.errors import QGraphError
from qgraph.formats import FORMATS, group

Codes = npt.NDArray[np.uint8]
Trits = npt.NDArray[np.int8]
Words = npt.NDArray[np.uint32]

TRITS = 5  # digits of a base-3 byte: 3^5 = 243
# Of 32 3-bit codes those that three words of ten leave over: (code, word with its two low bits, shift of the
# middle word that brings down its high bit, and before that two bits that the low ones are xored with).
_LEFT = ((30, 0, 29), (31, 2, 28))
TERNARY_LAYOUTS = {"2bit": "n16b2", "base3": "n16t5"}


def code_layout(weight_format: str, packing: str = "2bit") -> str:
    """The layout of a group format's codes; `packing` says which of the two that ternary codes have."""
    if weight_format == "ternary":
        return TERNARY_LAYOUTS[packing]
    return f"n16b{FORMATS[weight_format].code_bits}"


def code_rows(layout: str, K: int, block: int) -> int:
    """Length of the second axis of packed codes: their rows of 16 lanes."""
    if layout == "n16t5":
        return K // block * -(-block // TRITS) + -(-(K % block) // TRITS)
    if layout == "n16b3":
        return 3 * -(-K // 32)
    return -(-K * int(layout[-1]) // 32)


def pack_codes(weight_format: str, codes: Codes, layout: str) -> Words | Trits:
    """Pack codes [K, N], K, N >= 1, of a group format.

    Returns:
        `n16b2`, `n16b4`, `n16b8`: u32 [ceil(N/16), ceil(K/w), 16], w = 32 / bits, where field k % w (from
        bit 0 up) of [n//16, k//w, n%16] is code (k, n): the level, or where the lowest value is negative the
        value itself in two's complement.
        `n16b3`: u32 [ceil(N/16), 3*ceil(K/32), 16], 32 codes in three words w: code 10 i + j, j < 10, in bits
        3j .. 3j+2 of w[i]; code 30 is w[0] >> 30 ^ w[1] >> 29, code 31 is w[2] >> 30 ^ w[1] >> 28 & 7.
        `n16t5`: i8 [ceil(N/16), rows, 16], five values t of -1, 0, 1 a byte: 81 t_0 + 27 t_1 + 9 t_2 + 3 t_3
        + t_4. Each block starts with a byte of its own, since its size is no multiple of 5.

    Raises:
        QGraphError: a code that the format does not have.
    """
    spec = FORMATS[weight_format]
    if codes.max() >= len(spec.values):
        raise QGraphError(f"code {codes.max()} is not a code of {weight_format} (0..{len(spec.values) - 1})")
    if layout == "n16t5":
        return _pack_trits(codes, spec.block)
    if layout == "n16b3":
        return _pack_threes(codes)
    return _pack_fields(group.to_fields(spec, codes, spec.code_bits), spec.code_bits)


def unpack_codes(weight_format: str, packed: npt.NDArray, layout: str, shape: tuple[int, int]) -> Codes:
    """Inverse of `pack_codes` for a weight of `shape` (K, N)."""
    spec = FORMATS[weight_format]
    if layout == "n16t5":
        return _unpack_trits(packed, spec.block, shape)
    if layout == "n16b3":
        return _unpack_threes(packed, shape)
    return group.from_fields(spec, _unpack_fields(packed, spec.code_bits, shape), spec.code_bits)


def pack_blocks(values: npt.NDArray) -> npt.NDArray:
    """Numbers of blocks [B, N] to `n16`: [ceil(N/16), B, 16], [n//16, b, n%16] = values[b, n]."""
    return np.ascontiguousarray(_tiles(values).transpose(1, 0, 2))


def unpack_blocks(packed: npt.NDArray, columns: int) -> npt.NDArray:
    """Inverse of `pack_blocks` for a weight of `columns` outputs."""
    return np.ascontiguousarray(packed.transpose(1, 0, 2).reshape(packed.shape[1], -1)[:, :columns])


def pack_nibbles(values: Codes) -> Codes:
    """Zero points [B, N] below 16 to `n16z4`: u8 [ceil(N/16), ceil(B/2), 16]; that of an even b in the low
    half of byte [n//16, b//2, n%16], of an odd one in the high half."""
    if values.size and values.max() > 15:
        raise QGraphError(f"zero point {values.max()} does not fit 4 bits")
    even = np.pad(values, ((0, len(values) % 2), (0, 0)))
    return pack_blocks(even[::2] | even[1::2] << np.uint8(4))


def unpack_nibbles(packed: Codes, shape: tuple[int, int]) -> Codes:
    """Inverse of `pack_nibbles` for zero points of `shape` (B, N)."""
    bytes_ = unpack_blocks(packed, shape[1])
    both = np.stack([bytes_ & np.uint8(15), bytes_ >> np.uint8(4)], axis=1)
    return np.ascontiguousarray(both.reshape(-1, shape[1])[: shape[0]])


def _tiles(a: npt.NDArray, rows: int | None = None) -> npt.NDArray:
    """[R, N] -> [rows, ceil(N/16), 16], zeros beyond."""
    rows = len(a) if rows is None else rows
    padded = np.pad(a, ((0, rows - a.shape[0]), (0, -a.shape[1] % LANES)))
    return padded.reshape(rows, -1, LANES)


def _pack_fields(fields: Codes, bits: int) -> Words:
    per = 32 // bits
    rows = -(-len(fields) // per)
    tiles = _tiles(fields, rows * per)
    words = np.zeros((tiles.shape[1], rows, LANES), np.uint32)
    for j in range(per):
        words |= tiles[j::per].transpose(1, 0, 2).astype(np.uint32) << np.uint32(bits * j)
    return words


def _unpack_fields(words: Words, bits: int, shape: tuple[int, int]) -> Codes:
    tiles, rows, _ = words.shape
    per = 32 // bits
    out = np.empty((rows, per, tiles, LANES), np.uint8)
    for j in range(per):
        out[:, j] = (words >> np.uint32(bits * j) & np.uint32((1 << bits) - 1)).transpose(1, 0, 2)
    return np.ascontiguousarray(out.reshape(rows * per, -1)[: shape[0], : shape[1]])


def _pack_threes(codes: Codes) -> Words:
    tiles = _tiles(codes, -(-len(codes) // 32) * 32).astype(np.uint32)
    code = tiles.reshape(-1, 32, *tiles.shape[1:]).transpose(2, 0, 1, 3)  # [tile, unit, k % 32, lane]
    w = np.zeros((*code.shape[:2], 3, LANES), np.uint32)
    for k in range(30):
        w[:, :, k // 10] |= code[:, :, k] << np.uint32(3 * (k % 10))
    w[:, :, 1] |= code[:, :, 30] >> np.uint32(2) << np.uint32(31)
    w[:, :, 1] |= code[:, :, 31] >> np.uint32(2) << np.uint32(30)
    for k, word, by in _LEFT:
        w[:, :, word] |= (code[:, :, k] ^ w[:, :, 1] >> np.uint32(by)) << np.uint32(30)
    return w.reshape(w.shape[0], -1, LANES)


def _unpack_threes(words: Words, shape: tuple[int, int]) -> Codes:
    w = words.reshape(words.shape[0], -1, 3, LANES)
    out = np.empty((w.shape[1], 32, w.shape[0], LANES), np.uint8)
    for k in range(30):
        out[:, k] = (w[:, :, k // 10] >> np.uint32(3 * (k % 10)) & np.uint32(7)).transpose(1, 0, 2)
    for k, word, by in _LEFT:
        code = w[:, :, word] >> np.uint32(30) ^ w[:, :, 1] >> np.uint32(by) & np.uint32(7)
        out[:, k] = code.transpose(1, 0, 2)
    return np.ascontiguousarray(out.reshape(32 * len(out), -1)[: shape[0], : shape[1]])


def _byte_of(K: int, block: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Of every input: its byte row, and its place in the byte."""
    k = np.arange(K)
    inside = k % block
    return k // block * -(-block // TRITS) + inside // TRITS, inside % TRITS


def _pack_trits(codes: Codes, block: int) -> Trits:
    K, N = codes.shape
    row, place = _byte_of(K, block)
    out = np.zeros((row[-1] + 1, N), np.int8)
    for j in range(TRITS):
        out[row[place == j]] += (codes[place == j].astype(np.int8) - 1) * np.int8(3 ** (TRITS - 1 - j))
    return pack_blocks(out)


def _unpack_trits(packed: Trits, block: int, shape: tuple[int, int]) -> Codes:
    row, place = _byte_of(shape[0], block)
    weight = np.array([3 ** (TRITS - 1 - j) for j in range(TRITS)], np.uint8)
    levels = (unpack_blocks(packed, shape[1])[row] + 121).astype(np.uint8)  # base 3 with digits 0, 1, 2
    return levels // weight[place][:, None] % np.uint8(3)
