"""What block formats share: codes from a table of values, one scale a block along K, one a tensor, and for
some an offset a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Offset = Literal["none", "zero_point", "mean"]


@dataclass(frozen=True, eq=False)
class BlockFormat:
    """A format in which W'[k, n] = values[code[k, n]] * (block_scale[k // block, n] * global_scale).

    Where a format has no global scale it is 1, and takes no space. With an offset o = block_offset[k //
    block, n] it is (values[code] - values[o]) * scale, o a code (`zero_point`), or values[code] * scale + o
    (`mean`, o float16).
    """

    name: str
    title: str  # in the names of its operators, `QLinear<title>`; in those of its kernels in lower case
    block: int  # elements of K that share a block scale
    code_bits: int  # bits that a stored code, or zero point, takes
    values: npt.NDArray[np.float32]  # what each code stands for
    scale_dtype: np.dtype  # of the block scales
    has_global_scale: bool = True  # a float32 for the tensor
    offset: Offset = "none"

    def blocks(self, K: int) -> int:
        """Number of blocks along K; the last is shorter where `block` does not divide K."""
        return -(-K // self.block)

    def nbytes(self, K: int, N: int) -> int:
        """Bytes of a [K, N] weight as stored: packed codes, block scales, offsets and the global scale if
        any."""
        codes, blocks = -(-K * N * self.code_bits // 8), self.blocks(K) * N
        offsets = {"none": 0, "zero_point": -(-blocks * self.code_bits // 8), "mean": 2 * blocks}[self.offset]
        return codes + blocks * self.scale_dtype.itemsize + offsets + 4 * self.has_global_scale

    @property
    def suffix(self) -> str:
        """What the names of kernels that read it end with: `int4sym` of `int4-sym`."""
        return self.title.lower()

    @property
    def kernel(self) -> str:
        """The kernel that multiplies by a weight of it: `matmul_int4sym` of `int4-sym`."""
        return f"matmul_{self.suffix}"

    @property
    def offset_dtype(self) -> np.dtype:
        """Of the block offsets: codes, or float16."""
        return np.dtype(np.float16 if self.offset == "mean" else np.uint8)


def per_block(W: npt.NDArray, block: int) -> list[npt.NDArray]:
    """Views [blocks, rows, N] of [K, N]: one for the whole blocks of K, one more for a shorter last one.

    Writing to a view writes to W, which must therefore be a base array or a slice of one.
    """
    K, N = W.shape
    whole = K - K % block
    views = [W[:whole].reshape(whole // block, block, N)] if whole else []
    if whole < K:
        views.append(W[whole:][None])
    return views


def block_amax(W: npt.NDArray[np.float32], block: int) -> npt.NDArray[np.float32]:
    """max|W| of every block: [K, N] -> [ceil(K / block), N]."""
    return np.concatenate([np.maximum(v.max(axis=1), -v.min(axis=1)) for v in per_block(W, block)])


def divide_blocks(
    W: npt.NDArray[np.float32], s: npt.NDArray[np.float32], block: int
) -> npt.NDArray[np.float32]:
    """W[k, n] / s[k // block, n]: float32 [K, N]."""
    ratio = np.empty(W.shape, np.float32)
    start = 0
    for source, out in zip(per_block(W, block), per_block(ratio, block), strict=True):
        stop = start + len(source)
        np.divide(source, s[start:stop, None, :], out=out)
        start = stop
    return ratio
