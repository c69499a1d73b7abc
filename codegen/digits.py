"""How float32 activations lie in memory that are split into digits (kernels/split_digits.py). Knows nothing
of TVM."""

from __future__ import annotations

from dataclasses import dataclass

from qgraph.codegen.bf16_rows import row_words
from qgraph.codegen.int8_input import Int8Input, int8_input
from qgraph.codegen.isa import Isa
from qgraph.codegen.spec import KernelSpec
from qgraph.formats.nvfp4 import NVFP4

DIGITS = 3  # signed bytes, the most significant first: as accurate as float32
FEW_ROWS = 8  # that products have DIGITS of, whatever is asked for: time goes by the weights then
COMPUTE_DIGITS = {"int16": 2, "int8": 1}  # of more rows, by `compute`; others have DIGITS of all


@dataclass(frozen=True)
class DigitRows:
    """Rows of K inputs in blocks, as a weight's kernel wants them: i32 [M, words].

    A block is a record: its digits, most significant first, `block` bytes each in the order of `input`, then
    four words, `HIGH`, `LOW`, `SCALE` and `TOTAL` behind them. Blocks are followed by the word `flag`. What
    is left of a row keeps rows from being a multiple of 4096 bytes apart, which a cache would have no room
    for.
    """

    input: Int8Input
    k: int
    digits: int = DIGITS

    HIGH = 0  # int32: of three digits, factor times the sum of the first; else 0
    LOW = 1  # int32: factor times the sum of what the others stand for
    SCALE = 2  # float32
    TOTAL = 3  # float32: factor times the sum of the inputs

    @property
    def blocks(self) -> int:
        return -(-self.k // self.input.block)

    @property
    def extra(self) -> int:
        """Where in a record the four words are."""
        return self.digits * self.input.block // 4

    @property
    def record(self) -> int:
        """Words of a block."""
        return self.extra + 4

    @property
    def flag(self) -> int:
        """The word of a row that is 1, or 0 where it cannot be split."""
        return self.blocks * self.record

    @property
    def words(self) -> int:
        """Of a row."""
        return self.flag + 16

    def room(self, parts: int) -> int:
        """Words that a row may take: on tiles NVFP4's kernels have parts (codegen/bf16_rows.py) instead."""
        other = row_words(self.k, parts) if self.input == int8_input(NVFP4.name) else 0
        return max(self.words, other)


def digit_rows(weight_format: str, packing: str, k: int, block: int = 0) -> DigitRows | None:
    """What the kernel of a format in a packing reads; None for one that does not multiply by digits.

    `block` is that of a group format, 0 its usual one.
    """
    wanted = None if packing == "base3" else int8_input(weight_format, block)
    return None if wanted is None else DigitRows(wanted, k)


def uses_digits(isa: Isa, digits: int) -> bool:
    """Whether so many digits, fewer than DIGITS, are used for more than FEW_ROWS rows; else DIGITS are."""
    return any(COMPUTE_DIGITS.get(compute) == digits for compute in isa.computes)


def many_digits(spec: KernelSpec, isa: Isa) -> int:
    """Digits of the rows of products with more than FEW_ROWS of them: those of a kernel's spec, where the ISA
    uses them."""
    digits = dict(spec.params).get("digits", DIGITS)
    return digits if uses_digits(isa, digits) else DIGITS
