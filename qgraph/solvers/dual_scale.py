"""Dual scales, D2Quant's DSQ (arXiv 2602.02546): weights as diag(c) Q, Q in a format with scales of groups.

The scales of groups run along K for every output by itself; c [K] evens out what its inputs have in common. A
layer that feeds these inputs can take c into its columns, where its own scales of groups absorb it: then W /
c is what is quantized, and c costs nothing (`passes/dual_scale.py`).

As in the paper, in turn: Q for the present c, and c by least squares for this Q. Of Q, each turn takes the
nearest levels on the present grid, and then the best grid for these levels, with errors weighted by c^2, as
they count in W; so no step can raise |W - diag(c) Q|^2. Weights for the power of the inputs gain nothing over
that once a calibrated solver quantizes W / c.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qgraph.errors import UsageError
from qgraph.formats import FORMATS, group
from qgraph.solvers import group_grid, itf
from qgraph.solvers._tiles import map_ordered
from qgraph.solvers.balance import balanced
from qgraph.solvers.group_grid import Array, Double, Grid

ROUNDS = 10
_STALLED = 1e-3  # share of the error that a turn must gain for another one
_REACH = 4.0  # by which factor c may leave the range of its row


def channel_scales(
    W: Array,
    format: str,
    *,
    channels: npt.NDArray[np.int32] | None = None,
    count: int | None = None,
    rounds: int = ROUNDS,
    name: str = "",
    threads: int | None = None,
) -> Array:
    """c float32 [channels] such that diag(1 / c) W, for W float32 [K, N], suits `format`: positive, geometric
    mean 1, within [1/256, 256], 1 for channels whose weights are zero.

    Args:
        format: one of `GROUP_FORMATS`.
        channels: [K], the channel of each row, for rows that must share their scales; by default 0..K-1.
        count: how many channels there are; by default K.
        rounds: turns at most; 0 leaves c at the start, the root mean square of the weights of each channel.

    Deterministic, whatever `threads`. InputError for weights that are not finite, or beyond float16;
    UsageError for another format.
    """
    if format not in {spec.name for spec in group.GROUP_FORMATS}:
        raise UsageError(f"dual scales are for integer and ternary formats, not {format}")
    group_grid.check_group_weight(W, name)
    channels = np.arange(len(W), dtype=np.int32) if channels is None else channels
    return Alternation(W, format, channels, count or len(W), threads).run(rounds)


class Alternation:
    """The state between two turns; a class so that tests see the error of each.

    Attributes:
        errors: |W - diag(c) Q|^2 after every turn.
    """

    def __init__(
        self,
        W: Array,
        format: str,
        channels: npt.NDArray[np.int32],
        count: int,
        threads: int | None,
    ) -> None:
        self.spec, self.threads = FORMATS[format], threads
        self.W, self.channels, self.count = W, channels, count
        self.parts = [slice(k, min(k + self.spec.block, len(W))) for k in range(0, len(W), self.spec.block)]
        energy = self._by_channel([np.square(W[part], dtype=np.float64).mean(axis=1) for part in self.parts])
        energy /= np.maximum(np.bincount(channels, minlength=count), 1)
        self.live = energy > 0
        log = 0.5 * np.log2(energy, out=np.zeros_like(energy), where=self.live)
        self.c = self.start = balanced(log, self.live).astype(np.float64)
        self.grids: list[Grid] = []
        self.errors: list[float] = []

    def run(self, rounds: int) -> Array:
        """Turns until they stall; c [channels] as `channel_scales` returns it."""
        if rounds:
            self.grids = map_ordered(self._first_grid, self.parts, self.threads)
        for _ in range(rounds):
            self.turn()
            if len(self.errors) > 1 and self.errors[-1] > (1 - _STALLED) * self.errors[-2]:
                break
        return balanced(np.log2(self.c), self.live)

    def turn(self) -> None:
        """Levels, grids, c."""
        found = map_ordered(self._turn, range(len(self.parts)), self.threads)
        grids, wq_rows, qq_rows, errors = zip(*found, strict=True)
        self.grids = list(grids)
        self.errors.append(sum(errors))
        wq, qq = self._by_channel(wq_rows), self._by_channel(qq_rows)
        best = np.divide(wq, qq, out=self.c.copy(), where=qq > 0)
        # A row that Q does not resemble would get next to nothing, and W / c would be beyond all others.
        self.c = np.clip(best, self.start / _REACH, self.start * _REACH)

    def _first_grid(self, part: slice) -> Grid:
        return itf.best_grid(self.spec, self._divided(part))

    def _turn(self, i: int) -> tuple[Grid, Double, Double, float]:
        """The grid of a block, and for each of its rows <W, Q> and <Q, Q>; the error."""
        part = self.parts[i]
        W, V, c = self.W[part], self._divided(part), self.c[self.channels[part]]
        codes = group_grid.nearest(self.spec, V, self.grids[i])
        grid = group_grid.fit(self.spec, V, codes, self.grids[i], c * c)
        Q = group_grid.values(self.spec, codes, grid).astype(np.float64)
        error = float(np.square(W - c[:, None] * Q).sum())
        return grid, (W * Q).sum(axis=1), np.square(Q).sum(axis=1), error

    def _divided(self, part: slice) -> Array:
        return (self.W[part] / self.c[self.channels[part], None]).astype(np.float32)

    def _by_channel(self, rows: Sequence[Double]) -> Double:
        """Sums [channels] of what the rows [K] contribute."""
        return np.bincount(self.channels, np.concatenate(rows), self.count).astype(np.float64, copy=False)
