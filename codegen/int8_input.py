"""What products with int8 activations take of them: which order, and which sums. Knows nothing of TVM."""

from __future__ import annotations

from dataclasses import dataclass

from qgraph.formats import FORMATS
from qgraph.formats.group import GROUP_FORMATS
from qgraph.formats.nvfp4 import NVFP4

NVFP4_OFFSET = 12  # twice the largest E2M1 number: what makes twice each of them a number 0 .. 24


@dataclass(frozen=True)
class Int8Input:
    """How `quantize_int8` writes the rows that a kernel reads.

    Attributes:
        fields: codes that a byte of packed weights holds. Of every 4 * fields inputs those come first that
            belong to the lowest field of four bytes, then the next: f, fields + f, 2 fields + f, 3 fields +
            f for f = 0 .. fields - 1.
        block: inputs that share a weight scale, a multiple of 16 and of 4 * fields. Rows are padded to whole
            blocks.
        offset: what unsigned bytes are above the weights that they stand for.
    """

    fields: int
    block: int
    offset: int

    @property
    def factor(self) -> int:
        """What the sums of blocks are multiplied by: -offset, for sums of products with the bytes to start
        from; else 1."""
        return -self.offset or 1


def int8_input(weight_format: str, block: int = 0) -> Int8Input | None:
    """Of a format's kernel, `matmul_<format>_a8`; None for one that has none.

    `block` is that of a group format, 0 its usual one.
    """
    spec = FORMATS[weight_format]
    if weight_format == NVFP4.name:
        return Int8Input(2, spec.block, NVFP4_OFFSET)
    if spec not in GROUP_FORMATS or 8 % spec.code_bits:
        return None
    signed = spec.values[0] < 0
    return Int8Input(8 // spec.code_bits, block or spec.block, 1 << spec.code_bits - 1 if signed else 0)
