"""The damped second moment of a layer's inputs as `group_gptq` works with it, and what it keeps of a solution."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qgraph.formats import BlockFormat
from qgraph.solvers.group_grid import Array, Double, Grid
from qgraph.solvers.hessian import Matrix, factorize


class Block(NamedTuple):
    """The rows of one block of the format, and parts of H' = R R^T, R upper triangular, on its diagonal."""

    rows: slice
    moment: Double  # H'_bb
    share: Double  # R_bb R_bb^T: what an error costs that later blocks may make up for
    factor: Array  # R_jk / R_kk: feedback inside the block
    weight: Array  # R_kk^2
    feedback: Array  # [rows of b, start of b]: of earlier errors on the block as a whole


class Problem:
    """Least tr(D^T H' D), with H' = H / mean(diag H) + damping I. Raises InputError as `factorize` does.

    Attributes:
        moment: H', float32 [K, K]; diagonal: its diagonal, float32 [K].
        low, high: the format's lowest and highest level.
    """

    def __init__(self, spec: BlockFormat, H: Matrix, damping: float, name: str) -> None:
        damped, R = factorize(H, damping, name)
        self.spec, self.low, self.high = spec, spec.values[0], spec.values[-1]
        self.moment = damped.astype(np.float32)
        self.diagonal = np.ascontiguousarray(self.moment.diagonal())
        self.blocks = [
            _block(damped, R, slice(start, min(start + spec.block, len(H))))
            for start in range(0, len(H), spec.block)
        ]

    def loss(self, error: Array) -> Array:
        """e^T H' e of each column e of [K, n]."""
        return np.einsum("kn,kn->n", error, self.moment @ error)


def _block(damped: Matrix, R: Matrix, rows: slice) -> Block:
    own, before = R[rows, rows], R[: rows.start, rows]
    return Block(
        rows,
        damped[rows, rows].copy(),
        own @ own.T,
        (own / own.diagonal()).astype(np.float32),
        np.square(own.diagonal()).astype(np.float32),
        np.linalg.solve(own.T, before.T).astype(np.float32),
    )


class Solution:
    """Levels and grids of a slice of columns [K, n], and the errors that they leave.

    Attributes:
        target: W, float32 [K, n].
        levels: of the format, as float32 [K, n].
        grids: one a block.
        error: target - value, float32 [K, n].
    """

    def __init__(self, problem: Problem, target: Array) -> None:
        self.problem, self.target = problem, target
        self.levels, self.error = np.empty_like(target), np.empty_like(target)
        self.grids: list[Grid] = []

    def update(self, b: int, rows: slice) -> None:
        """Errors of some rows of block b, anew from their levels."""
        grid, error = self.grids[b], self.error[rows]
        np.multiply(self.levels[rows], grid.scale, out=error)
        error += grid.offset
        np.subtract(self.target[rows], error, out=error)

    def copy(self) -> Solution:
        """One that shares nothing that changes."""
        new = Solution(self.problem, self.target)
        new.levels, new.error, new.grids = self.levels.copy(), self.error.copy(), list(self.grids)
        return new

    def take_better(self, other: Solution) -> None:
        """The columns of the other that leave less error."""
        better = self.problem.loss(other.error) < self.problem.loss(self.error)
        for mine, theirs in ((self.levels, other.levels), (self.error, other.error)):
            np.copyto(mine, theirs, where=better)
        self.grids = [
            Grid(*(np.where(better, new, old) for new, old in zip(theirs, mine, strict=True)))
            for theirs, mine in zip(other.grids, self.grids, strict=True)
        ]
