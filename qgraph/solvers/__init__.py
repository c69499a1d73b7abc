"""Solvers: float weights -> `QTensor`. Pure functions of arrays, one file each, none knows of graphs.

A solver is `solve(W, *, name="", threads=None) -> QTensor` with W float32 [K, N]. `name` is for messages
only; the result does not depend on `threads` (None: every CPU this process may use). InputError for weights
that are not finite.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from qgraph.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from qgraph.formats import QTensor


class Solver(Protocol):
    """The signature that every solver has."""

    def __call__(
        self, W: npt.NDArray[np.float32], *, name: str = "", threads: int | None = None
    ) -> QTensor: ...


def _lazy(module: str) -> Solver:
    """The `solve` of a module that is imported at its first call: listing the solvers loads nothing."""

    def solve(W: npt.NDArray[np.float32], *, name: str = "", threads: int | None = None) -> QTensor:
        return import_module(f"qgraph.solvers.{module}").solve(W, name=name, threads=threads)

    return solve


SOLVERS: dict[str, Solver] = {"rtn": _lazy("rtn"), "sweep": _lazy("sweep")}


def get_solver(name: str) -> Solver:
    """The solver of that name. UsageError lists the known ones."""
    if name not in SOLVERS:
        near = get_close_matches(name, SOLVERS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UsageError(f"unknown solver '{name}'; known: {', '.join(SOLVERS)}{hint}")
    return SOLVERS[name]
