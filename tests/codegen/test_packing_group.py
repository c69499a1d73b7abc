"""Layouts of group formats: element addresses as FORMAT.md states them, exact round trips, zero padding."""

from __future__ import annotations

import numpy as np
import pytest
from group_cases import CASES, NAMES, random_weight

from qgraph.codegen.packing_group import (
    code_layout,
    code_rows,
    pack_blocks,
    pack_codes,
    pack_nibbles,
    unpack_blocks,
    unpack_codes,
    unpack_nibbles,
)
from qgraph.errors import QGraphError
from qgraph.formats import FORMATS

SHAPES = [(1, 1), (31, 5), (32, 16), (128, 17), (129, 33), (172, 3), (200, 16), (384, 48)]

cases = pytest.mark.parametrize(("weight_format", "packing"), CASES, ids=NAMES)


def code_at(packed: np.ndarray, layout: str, block: int, signed: bool, k: int, n: int) -> int:
    """Code (k, n) as a number, unsigned or signed, by the words of FORMAT.md."""
    rows = [int(w) for w in packed[n // 16, :, n % 16]]
    if layout == "n16t5":
        byte = rows[k // block * -(-block // 5) + k % block // 5]
        digits = []
        for power in (81, 27, 9, 3, 1):
            digits.append(round(byte / power))  # never a tie
            byte -= digits[-1] * power
        return digits[k % block % 5]
    if layout == "n16b3":
        w, j = rows[k // 32 * 3 : k // 32 * 3 + 3], k % 32
        if j < 30:
            return w[j // 10] >> 3 * (j % 10) & 7
        return w[0] >> 30 ^ w[1] >> 29 if j == 30 else w[2] >> 30 ^ w[1] >> 28 & 7
    bits = int(layout[-1])
    field = rows[k * bits // 32] >> k * bits % 32 & (1 << bits) - 1
    return field - (1 << bits) if signed and field >> bits - 1 else field


@cases
@pytest.mark.parametrize(("K", "N"), SHAPES)
def test_codes(weight_format: str, packing: str, K: int, N: int) -> None:
    spec, layout = FORMATS[weight_format], code_layout(weight_format, packing)
    codes = random_weight(weight_format, K, N).codes
    words = pack_codes(weight_format, codes, layout)
    assert words.shape == (-(-N // 16), code_rows(layout, K, spec.block), 16) and words.flags.c_contiguous
    assert words.dtype == (np.int8 if packing == "base3" else np.uint32)
    lowest = int(spec.values[0])
    for n in range(N) if K < 200 else (0, N - 1):
        for k in range(K):
            assert code_at(words, layout, spec.block, lowest < 0, k, n) == int(codes[k, n]) + lowest
    assert not words[-1, :, (N - 1) % 16 + 1 :].any()
    np.testing.assert_array_equal(unpack_codes(weight_format, words, layout, (K, N)), codes)


@cases
def test_bits_a_weight(weight_format: str, packing: str) -> None:
    """No bit is lost where K is a multiple of 128; base 3 is near its entropy, log2(3) = 1.585."""
    layout = code_layout(weight_format, packing)
    words = pack_codes(weight_format, random_weight(weight_format, 1280, 16).codes, layout)
    assert 8 * words.nbytes / (1280 * 16) == (
        1.625 if packing == "base3" else FORMATS[weight_format].code_bits
    )


def test_a_shorter_last_block_of_base3_takes_no_whole_one() -> None:
    assert [code_rows("n16t5", K, 128) for K in (1, 5, 6, 127, 128, 129, 172)] == [1, 1, 2, 26, 26, 27, 35]


@pytest.mark.parametrize(("B", "N"), [(1, 1), (2, 16), (5, 33)])
def test_numbers_of_blocks(B: int, N: int) -> None:
    rng = np.random.default_rng(B)
    scales = rng.standard_normal((B, N)).astype(np.float16)
    tiles = pack_blocks(scales)
    assert tiles.shape == (-(-N // 16), B, 16) and tiles.dtype == np.float16 and tiles.flags.c_contiguous
    zeros = rng.integers(0, 16, (B, N), np.uint8)
    nibbles = pack_nibbles(zeros)
    assert nibbles.shape == (-(-N // 16), -(-B // 2), 16) and nibbles.flags.c_contiguous
    for n in range(N):
        for b in range(B):
            assert tiles[n // 16, b, n % 16] == scales[b, n]
            assert nibbles[n // 16, b // 2, n % 16] >> 4 * (b % 2) & 15 == zeros[b, n]
    np.testing.assert_array_equal(unpack_blocks(tiles, N), scales)
    np.testing.assert_array_equal(unpack_nibbles(nibbles, (B, N)), zeros)


@cases
def test_codes_that_the_format_lacks_are_refused(weight_format: str, packing: str) -> None:
    levels = len(FORMATS[weight_format].values)
    if levels < 256:
        codes = np.full((3, 2), levels, np.uint8)
        with pytest.raises(QGraphError, match=rf"code {levels} is not a code of {weight_format} "):
            pack_codes(weight_format, codes, code_layout(weight_format, packing))
    with pytest.raises(QGraphError, match="zero point 16"):
        pack_nibbles(np.full((3, 2), 16, np.uint8))
