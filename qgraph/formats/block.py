"""What block formats share: codes from a table of values, one scale a block along K, one a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class BlockFormat:
    """A format in which W'[k, n] = values[code[k, n]] * (block_scale[k // block, n] * global_scale).

    Where a format has no global scale it is 1, and takes no space.
    """

    name: str
    block: int  # elements of K that share a block scale
    code_bits: int  # bits that a stored code takes
    values: npt.NDArray[np.float32]  # what each code stands for
    scale_dtype: np.dtype  # of the block scales
    has_global_scale: bool = True  # a float32 for the tensor

    def blocks(self, K: int) -> int:
        """Number of blocks along K; the last is shorter where `block` does not divide K."""
        return -(-K // self.block)

    def nbytes(self, K: int, N: int) -> int:
        """Bytes of a [K, N] weight as stored: packed codes, block scales, the global scale if any."""
        codes = -(-K * N * self.code_bits // 8)
        return codes + self.blocks(K) * N * self.scale_dtype.itemsize + 4 * self.has_global_scale


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
