"""`sweep` with squared errors weighted by the power of each input channel, h_k = E[x_k^2], the diagonal of H.

The output error of a weight is tr((W - W')^T H (W - W')). Were the channels of x uncorrelated, it would be
sum_k h_k |w_k - w'_k|^2, which `sweep` minimises as exactly as it does the plain error, without the feedback
and the cost of second-order methods.

h has 1 % of its mean added, as much as GPTQ adds to the diagonal of its Hessian: a channel that calibration
did not reach still counts for something. An H of zeros counts all channels alike.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qgraph.errors import InputError
from qgraph.formats import QTensor
from qgraph.solvers import sweep
from qgraph.solvers._tiles import check_weight

DAMPING = 0.01  # share of the mean that is added to every h_k


def solve(
    W: npt.NDArray[np.float32],
    *,
    H: npt.NDArray[np.float64],
    tokens: int = 0,
    name: str = "",
    threads: int | None = None,
) -> QTensor:
    """W float32 [K, N], H float64 [K, K] -> NVFP4, as above; only the diagonal of H is read, `tokens` not.

    Raises InputError for weights or an H that are not finite, and for an H of another shape or with a
    negative diagonal.
    """
    check_weight(W, name)
    h = np.diagonal(H)
    what = f"weight '{name}'" if name else "the weight"
    if H.shape != (len(W), len(W)):
        raise InputError(f"{what} {list(W.shape)} needs a second moment [K, K], not {list(H.shape)}")
    if not (np.isfinite(h) & (h >= 0)).all():
        raise InputError(
            f"the second moment of the inputs of {what} is negative or not finite on its diagonal: "
            "check the calibration data"
        )
    h = h + DAMPING * h.mean()
    weights = h / h.max() if h.any() else np.ones(len(W))
    return sweep.solve_weighted(W, weights.astype(np.float32), name=name, threads=threads)
