"""How far the outputs of two runs are apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qgraph.errors import InputError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Difference:
    """How far an output is from its reference; all in float64.

    `rel_error`: |got - wanted| / |wanted|, Frobenius norms. `cosine` of the two as vectors. `max_abs`: the
    largest difference of an element. Infinite, and a cosine of -1, where shapes, NaNs or infinities are not
    the same.
    """

    rel_error: float
    cosine: float
    max_abs: float


_INCOMPARABLE = Difference(float("inf"), -1.0, float("inf"))


def compare(got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> dict[str, Difference]:
    """The difference of every output of `wanted`. Raises InputError when `got` lacks one."""
    missing = [name for name in wanted if name not in got]
    if missing:
        raise InputError(f"the artifact has no output '{missing[0]}': it has {', '.join(got)}")
    return {name: difference(got[name], wanted[name]) for name in wanted}


def difference(got: np.ndarray, wanted: np.ndarray) -> Difference:
    """The difference of two arrays."""
    import numpy as np

    if got.shape != wanted.shape:
        return _INCOMPARABLE
    a, b = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    odd = ~np.isfinite(b)
    if not np.array_equal(a[odd], b[odd], equal_nan=True) or not np.isfinite(a[~odd]).all():
        return _INCOMPARABLE
    a, b = a[~odd], b[~odd]
    error, norm_a, norm_b = (float(np.linalg.norm(x)) for x in (a - b, a, b))
    if not norm_b:
        return _INCOMPARABLE if error else Difference(0.0, 1.0, 0.0)
    cosine = float(a @ b) / (norm_a * norm_b) if norm_a else 0.0
    return Difference(error / norm_b, cosine, float(np.abs(a - b).max()))
