"""What calibration tells a solver about the inputs of a linear layer: arrays, no graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Statistics:
    """Moments of the inputs x (float32 [tokens, K]) of linear layers, over all calibration tokens.

    The output error of a weight W [K, N] that becomes W' is E|x W - x W'|^2 = tr((W - W')^T H (W - W')) with
    H the second moment: what GPTQ calls the Hessian, up to a factor.
    """

    tokens: int  # how many rows of x were seen
    second_moment: npt.NDArray[np.float64]  # [K, K], mean of x^T x
    mean: npt.NDArray[np.float64]  # [K], mean of x
    amax: npt.NDArray[np.float32]  # [K], largest |x| of every channel
    # [K, K], mean of x^T (x_float - x), where x_float is what the float model has in the place of x. None
    # where the two are the same.
    cross: npt.NDArray[np.float64] | None = None
    # By the name of a value r [tokens, N] that a layer's output is added to: [K, N], mean of x^T (r_float -
    # r).
    residuals: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)

    @property
    def largest(self) -> float:
        """Largest |x| of all channels."""
        return float(self.amax.max())
