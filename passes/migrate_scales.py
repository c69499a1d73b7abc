"""Moves range from the inputs of quantized layers into their weights, channel by channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from qgraph.errors import InputError, UsageError
from qgraph.passes.base import printable
from qgraph.passes.scale_channels import ScaleChannels, Site, Vector
from qgraph.solvers import get_solver
from qgraph.solvers.balance import balanced

MIGRATIONS = "qgraph.migrations"  # key of model.meta: dict[str, float32 [K]], see ScaleChannels

Score = Callable[[Site, Vector], float]


class MigrateScales(ScaleChannels):
    """x W = (x / s) (diag(s) W) for the inputs of quantized linear layers: exact, and kinder to rounding.

    SmoothQuant (arXiv 2211.10438, equation 4): s_k = amax|x_k|^alpha / amax|W_k|^(1 - alpha), the geometric
    mean over the channels made 1, held to [1/256, 256]; 1 for a channel without inputs or weights. AWQ
    (arXiv 2306.00978, section 3.2): which alpha is chosen for each site by the error that it leaves.

    Where the division goes: see `ScaleChannels`.

    Args:
        channel_amax: largest |x| of every channel, float32 [K], for the name of every value that a quantized
            MatMul reads. It refers to the model as it is before this pass.
        alpha: the strength, in [0, 1]; several of them with `score`.
        score: (site, s [channels]) -> error, the lower the better. Chooses for each site among no migration
            (all ones) and `alpha`, the first of equals; see `weight_error`.
        exact: powers of two for s, so that every intermediate result keeps its bits (but for overflow and
            subnormal numbers). Off by default: it rounds away a good half of the gain on MiniLM.
        insert: a Mul for inputs that nothing else can divide.

    Raises InputError for a `channel_amax` of the wrong shape, negative or not finite; UsageError for an alpha
    out of range.
    """

    mark = MIGRATIONS

    def __init__(
        self,
        channel_amax: Mapping[str, Vector],
        alpha: float | Sequence[float] = 0.5,
        *,
        score: Score | None = None,
        exact: bool = False,
        insert: bool = False,
    ) -> None:
        super().__init__()
        self.channel_amax = channel_amax
        self.alphas = (float(alpha),) if isinstance(alpha, int | float) else tuple(map(float, alpha))
        self.score, self.exact, self.insert = score, exact, insert
        if not self.alphas or not all(0 <= a <= 1 for a in self.alphas):
            raise UsageError(f"alpha is between 0 and 1, not {alpha}")
        if len(self.alphas) > 1 and score is None:
            raise UsageError("several values of alpha need a score to choose by")

    def strength(self, site: Site) -> Vector | None:
        """By the formula, for the alpha of the best score."""
        largest_x, largest_w = np.zeros(site.channels), np.zeros(site.channels)
        for name, rows, weight in zip(site.inputs, site.rows, site.weights, strict=True):
            if name not in self.channel_amax:
                self.refuse(site.where, f"'{printable(name)}' was not calibrated")
                return None
            np.maximum.at(largest_x, rows, _checked(name, self.channel_amax[name], len(rows)))
            np.maximum.at(largest_w, rows, np.abs(weight).max(axis=1))
        live = site.free & (largest_x > 0) & (largest_w > 0)
        if not live.any():
            self.refuse(site.where, "every channel of its layers is zero")
            return None
        candidates = {
            f"alpha {alpha:g}": smoothing(largest_x, largest_w, live, alpha, self.exact)
            for alpha in self.alphas
        }
        if self.score is not None:
            candidates = {"no migration": np.ones(site.channels, np.float32), **candidates}
        scored = {text: self.score(site, s) if self.score else 0.0 for text, s in candidates.items()}
        best = min(scored, key=lambda text: scored[text])
        s = candidates[best]
        if (s == 1).all():
            why = f"{best} is best" if best == "no migration" else f"{best} rounds to 1"
            self.refuse(site.where, f"{site.shown}: {why}")
            return None
        self.refuse(site.where, f"{site.shown} divided by {s.min():.3g} to {s.max():.3g}, {best}")
        return s


def smoothing(
    largest_x: npt.NDArray, largest_w: npt.NDArray, live: npt.NDArray[np.bool_], alpha: float, exact: bool
) -> Vector:
    """s = largest_x^alpha / largest_w^(1 - alpha) [channels], `balanced`."""
    with np.errstate(divide="ignore", invalid="ignore"):  # where not live
        log = alpha * np.log2(np.asarray(largest_x, np.float64))
        log -= (1 - alpha) * np.log2(np.asarray(largest_w, np.float64))
    return balanced(log, live, exact=exact)


def weight_error(
    second_moment: Callable[[str], npt.NDArray[np.float64]], solver: str = "sweep", threads: int | None = None
) -> Score:
    """A score: E|x W - x W'|^2 / E|x W|^2 after migration, summed over the inputs of a site, with W' from an
    uncalibrated `solver`.

    Args:
        second_moment: name of a value -> E[x^T x], float64 [K, K], before migration.
    """

    def score(site: Site, s: Vector) -> float:
        total = 0.0
        divisors = site.divide(s)
        for name, weight in zip(site.inputs, site.weights, strict=True):
            H = second_moment(name)
            scaled = weight * divisors[name][:, None]
            back = get_solver(solver)(scaled, name=name, threads=threads).dequantize()
            error = (back - scaled) / divisors[name][:, None]
            signal = _energy(H, weight)
            total += _energy(H, error) / signal if signal > 0 else 0.0
        return float(f"{total:.5e}")  # so that the order of a product's sums does not decide

    return score


def _energy(H: npt.NDArray[np.float64], W: npt.NDArray) -> float:
    """tr(W^T H W)."""
    return float(np.einsum("kn,kn->", W, H @ W))


def _checked(name: str, amax: Vector, K: int) -> Vector:
    if np.shape(amax) != (K,) or not np.isfinite(amax).all() or (np.asarray(amax) < 0).any():
        raise InputError(
            f"the largest inputs of '{printable(name)}' must be {K} finite numbers, none negative"
        )
    return amax
