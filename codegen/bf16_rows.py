"""How activations lie in memory that are multiplied as bfloat16 in tiles (kernels/matmul_bf16.py). Knows
nothing of TVM.

Rows are parts that add up to them: i32 [ceil(k/32), parts, M, 16]. Word j of element [i, part, m] holds
inputs 32 i + j, in its low half, and 32 i + 16 + j of row m; inputs from k on are zeros. So 16 rows of a part
are a tile, and two vectors of 16 inputs become one of 16 words.
"""

from __future__ import annotations

from qgraph.codegen.spec import KernelSpec

PARTS = 3  # of 8 bits each: float32, exactly
INPUTS = 32  # of a row of a tile
WORDS = INPUTS // 2


def parts_of(spec: KernelSpec) -> int:
    """Parts that the rows of a kernel of `spec` have: `parts`, or as many as many rows have digits."""
    params = dict(spec.params)
    return int(params.get("parts", params.get("digits", PARTS)))


def row_words(k: int, parts: int) -> int:
    """Words that a row takes, all parts together."""
    return -(-k // INPUTS) * parts * WORDS
