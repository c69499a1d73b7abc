"""What block formats share: codes from a table of values, one scale a block along K, one a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class BlockFormat:
    """A format in which W'[k, n] = values[code[k, n]] * (block_scale[k // block, n] * global_scale)."""

    name: str
    block: int  # elements of K that share a block scale
    code_bits: int  # bits that a stored code takes
    values: npt.NDArray[np.float32]  # what each code stands for
    scale_dtype: np.dtype  # of the block scales

    def blocks(self, K: int) -> int:
        """Number of blocks along K; the last is shorter where `block` does not divide K."""
        return -(-K // self.block)

    def nbytes(self, K: int, N: int) -> int:
        """Bytes of a [K, N] weight as stored: packed codes, block scales, the global scale."""
        return -(-K * N * self.code_bits // 8) + self.blocks(K) * N * self.scale_dtype.itemsize + 4


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
