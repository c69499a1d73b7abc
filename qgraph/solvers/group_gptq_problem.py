"""What `group_gptq` minimises, and what it knows of a solution."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qgraph.formats import BlockFormat
from qgraph.solvers.group_grid import Array, Moments
from qgraph.solvers.hessian import Matrix, block_feedback, factorize


class Block(NamedTuple):
    """The rows of one of the format's blocks, and parts of H' = R R^T, R upper triangular."""

    rows: slice
    share: Array  # R_bb R_bb^T: what errors cost that later blocks make up for as far as they can
    factor: Array  # R_jk / R_kk inside the block
    weight: Array  # R_kk^2
    feedback: Array  # of `block_feedback`: [rows of it, start of it]


class Problem:
    """tr(D^T H' D) with D = W - W' and H' = H / mean(diag H) + damping I. Raises InputError as `factorize`.

    Attributes:
        spec: the format; low, high: its lowest and its highest level.
        moment: H', float32 [K, K]; diagonal: its diagonal.
        blocks: of the rows, in their order.
    """

    def __init__(self, spec: BlockFormat, H: Matrix, damping: float, name: str) -> None:
        damped, R = factorize(H, damping, name)
        self.spec, self.low, self.high = spec, spec.values[0], spec.values[-1]
        self.moment = damped.astype(np.float32)
        self.diagonal = self.moment.diagonal().copy()
        starts = range(0, len(H), spec.block)
        self.blocks = [_block(damped, R, slice(k, min(k + spec.block, len(H)))) for k in starts]

    def losses(self, error: Array) -> Array:
        """e^T H' e of each column e of [K, n]."""
        return np.einsum("kn,kn->n", error, self.moment @ error)


def _block(damped: Matrix, R: Matrix, rows: slice) -> Block:
    own = R[rows, rows]
    diagonal = own.diagonal()
    return Block(
        rows,
        (own @ own.T).astype(np.float32),
        (own / diagonal).astype(np.float32),
        np.square(diagonal).astype(np.float32),
        block_feedback(R, rows),
    )


def moments(M: Array, levels: Array, gradient: Array) -> Moments:
    """What says how a block's error e^T M e depends on its grid: levels t and M e, float32 [b, n]."""
    mt, m1 = M @ levels, M.sum(axis=0)
    sums = (
        np.einsum("kn,kn->n", levels, mt),
        m1 @ levels,
        np.broadcast_to(m1.sum(), levels.shape[1:]),
        np.einsum("kn,kn->n", levels, gradient),
        gradient.sum(axis=0),
    )
    return Moments(*(a.astype(np.float64) for a in sums))


class Solution:
    """Levels and grids of columns [K, n], and what they leave.

    Attributes:
        target: W, float32 [K, n].
        levels: of the format, float32 [K, n].
        scale, offset: of the blocks, float32 [ceil(K / block), n], as `Grid` has them.
        error: target - (levels scale + offset), float32 [K, n].
    """

    def __init__(self, problem: Problem, target: Array) -> None:
        self.problem, self.target = problem, target
        self.levels, self.error = np.empty_like(target), np.empty_like(target)
        self.scale, self.offset = np.empty((2, len(problem.blocks), target.shape[1]), np.float32)

    def copy(self) -> Solution:
        """One that shares nothing that may change."""
        new = Solution(self.problem, self.target)
        for part in ("levels", "error", "scale", "offset"):
            np.copyto(getattr(new, part), getattr(self, part))
        return new

    def by_row(self, rows: slice) -> tuple[Array, Array]:
        """Scales and offsets of some rows, from the first of a block on: [rows, n] each."""
        size, count = self.problem.spec.block, rows.stop - rows.start
        blocks = slice(rows.start // size, -(-rows.stop // size))
        scale, offset = (np.repeat(a[blocks], size, axis=0)[:count] for a in (self.scale, self.offset))
        return scale, offset

    def update(self, rows: slice) -> None:
        """Makes the errors of some rows, from the first of a block on, anew."""
        scale, offset = self.by_row(rows)
        scale *= self.levels[rows]
        scale += offset
        np.subtract(self.target[rows], scale, out=self.error[rows])

    def take_better(self, other: Solution) -> None:
        """The columns in which the other leaves less error."""
        better = self.problem.losses(other.error) < self.problem.losses(self.error)
        for part in ("levels", "error", "scale", "offset"):
            np.copyto(getattr(self, part), getattr(other, part), where=better)
