"""QTensor: one quantized weight, what solvers return and what emitters, codegen and report read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qgraph.errors import InputError
from qgraph.formats import group
from qgraph.formats.block import BlockFormat, per_block
from qgraph.formats.mxfp4 import MXFP4
from qgraph.formats.nvfp4 import NVFP4

FORMATS: dict[str, BlockFormat] = {spec.name: spec for spec in (NVFP4, MXFP4, *group.GROUP_FORMATS)}

ONE = np.float32(1)


@dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized weight as MatMul's right operand, unpacked: W'[k, n] = value of codes[k, n] * its scale,
    with an offset in some formats (`BlockFormat`).

    Blocks run along K; where the block size does not divide K the last block is shorter, nothing is padded.
    Raises InputError when the parts do not fit together.
    """

    format: str  # key of FORMATS
    shape: tuple[int, int]  # (K, N)
    codes: npt.NDArray[np.uint8]  # [K, N], one code an element
    block_scale: npt.NDArray  # [ceil(K / block), N] in the format's scale dtype: finite, not negative
    global_scale: np.float32 = ONE  # finite, positive; 1 where the format has none
    # [ceil(K / block), N] in the format's offset dtype, finite; None where the format has none
    block_offset: npt.NDArray | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InputError(f"unknown weight format '{self.format}'; known: {', '.join(FORMATS)}")
        spec = FORMATS[self.format]
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise InputError(
                f"a quantized weight has a shape [K, N] of at least [1, 1], not {list(self.shape)}"
            )
        K, N = self.shape
        _expect("codes", self.codes, np.dtype(np.uint8), (K, N))
        _expect("block_scale", self.block_scale, spec.scale_dtype, (spec.blocks(K), N))
        if self.codes.max() >= len(spec.values):
            raise InputError(f"codes of {self.format} are below {len(spec.values)}, found {self.codes.max()}")
        scale = self.block_scale.astype(np.float32)
        if not (np.isfinite(scale) & (scale >= 0)).all():
            raise InputError("block_scale holds a number that is negative or not finite")
        if not isinstance(self.global_scale, np.float32) or not 0 < self.global_scale < np.inf:
            raise InputError(f"global_scale is a positive finite float32, not {self.global_scale!r}")
        if self.global_scale != 1 and not spec.has_global_scale:
            raise InputError(f"{self.format} has no global scale: it is 1, not {self.global_scale!r}")
        self._check_offset(spec)

    def _check_offset(self, spec: BlockFormat) -> None:
        if (self.block_offset is None) != (spec.offset == "none"):
            raise InputError(f"{self.format} {'has no' if spec.offset == 'none' else 'needs'} block offsets")
        if self.block_offset is None:
            return
        _expect("block_offset", self.block_offset, spec.offset_dtype, self.block_scale.shape)
        if spec.offset == "zero_point" and self.block_offset.max() >= len(spec.values):
            raise InputError(
                f"zero points of {self.format} are below {len(spec.values)}, found {self.block_offset.max()}"
            )
        if not np.isfinite(self.block_offset).all():
            raise InputError("block_offset holds a number that is not finite")

    def dequantize(self) -> npt.NDArray[np.float32]:
        """float32 [K, N], bit for bit what the standard operators of the low-bit ONNX file give."""
        spec = FORMATS[self.format]
        if spec in group.GROUP_FORMATS:
            return group.dequantize(spec, self.codes, self.block_scale, self.block_offset)
        s = self.block_scale.astype(np.float32) * self.global_scale
        W = spec.values[self.codes]
        start = 0
        for view in per_block(W, spec.block):
            stop = start + len(view)
            view *= s[start:stop, None, :]
            start = stop
        return W

    def nbytes(self) -> int:
        """Bytes as stored: packed codes, all scales and offsets."""
        return FORMATS[self.format].nbytes(*self.shape)

    def bits_per_weight(self) -> float:
        """All stored bits, scales and offsets included, over the number of weights."""
        return 8 * self.nbytes() / (self.shape[0] * self.shape[1])


def _expect(what: str, array: npt.NDArray, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise InputError(f"{what} is {dtype} {list(shape)}, not {array.dtype} {list(array.shape)}")
