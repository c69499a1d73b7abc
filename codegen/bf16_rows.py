"""How activations lie in memory that are multiplied as bfloat16 in tiles (kernels/matmul_bf16.py). Knows
nothing of TVM.

Rows are parts that add up to them: i32 [ceil(M/16), ceil(k/32), parts, 16, 16]. Word j of element [t, i,
part, r] holds inputs 32 i + j, in its low half, and 32 i + 16 + j of row 16 t + r; inputs from k on are
zeros, rows from M on are not written. So [t, i, part] is a tile of 1 KiB, the tiles of 16 rows lie one
behind the other, which caches have room for whatever k and M are, and two vectors of 16 inputs become one of
16 words.
"""

from __future__ import annotations

from qgraph.codegen.spec import KernelSpec

PARTS = 3  # of 8 bits each: float32, exactly
INPUTS = 32  # of a row of a tile
WORDS = INPUTS // 2
ROWS = 16  # of a tile


def parts_of(spec: KernelSpec) -> int:
    """Parts that the rows of a kernel of `spec` have: `parts`, or as many as many rows have digits."""
    params = dict(spec.params)
    return int(params.get("parts", params.get("digits", PARTS)))


def row_words(k: int, parts: int) -> int:
    """Words that a row takes, all parts together."""
    return -(-k // INPUTS) * parts * WORDS
