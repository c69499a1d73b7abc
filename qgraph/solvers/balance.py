"""Vectors that scale channels: what all of them have in common."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LIMIT = 256.0  # no channel is scaled by more than this, or by less than its reciprocal


def balanced(
    log: npt.NDArray[np.float64], live: npt.NDArray[np.bool_], *, exact: bool = False
) -> npt.NDArray[np.float32]:
    """2^log [n] for the `live` channels, their geometric mean made 1, held to [1/256, 256]; 1 for the others.

    8 significant bits are plenty, and hide in what the last bits of logarithms and powers differ between
    machines. With `exact` the nearest powers of two.
    """
    s = np.ones(len(live), np.float32)
    if not live.any():
        return s
    centred, bound = log[live] - log[live].mean(), np.log2(LIMIT)
    mantissa, exponent = np.frexp(np.exp2(np.clip(np.rint(centred) if exact else centred, -bound, bound)))
    s[live] = np.ldexp(np.rint(256 * mantissa) / 256, exponent)
    return s
