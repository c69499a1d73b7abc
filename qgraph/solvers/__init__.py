"""Solvers: float weights -> `QTensor`. Pure functions of arrays, one file each, none knows of graphs.

A solver is `solve(W, *, H=None, tokens=0, name="", threads=None) -> QTensor` with W float32 [K, N] and H
float64 [K, K], the second moment of the layer's inputs (`Statistics.second_moment`) over so many tokens (0:
unknown), which only calibrated solvers read. `name` is for messages only; the result does not depend on
`threads` (None: every CPU this process may use). InputError for weights, or an H, that are not finite.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from qgraph.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from qgraph.formats import QTensor


@dataclass(frozen=True)
class Solver:
    """One way to choose codes and scales. Its module is imported at the first call: listing loads nothing.

    Attributes:
        name: what the user types.
        module: below `qgraph.solvers`; has the function `solve`.
        summary: one line for `qgraph schemes` and the docs.
        format: of the QTensor that it returns.
        calibrated: whether it needs H.
    """

    name: str
    module: str
    summary: str
    format: str = "nvfp4"
    calibrated: bool = False

    def __call__(
        self,
        W: npt.NDArray[np.float32],
        *,
        H: npt.NDArray[np.float64] | None = None,
        tokens: int = 0,
        name: str = "",
        threads: int | None = None,
    ) -> QTensor:
        """See the module. UsageError when a calibrated solver gets no H."""
        solve = import_module(f"qgraph.solvers.{self.module}").solve
        if not self.calibrated:
            return solve(W, name=name, threads=threads)
        if H is None:
            raise UsageError(f"solver '{self.name}' needs calibration data")
        return solve(W, H=H, tokens=tokens, name=name, threads=threads)


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("rtn", "rtn", "round to nearest, scales from the block's largest weight"),
        Solver(
            "four-over-six",
            "four_over_six",
            "the better of two scales: the block's largest weight at 6 or at 4",
        ),
        Solver(
            "soar",
            "soar",
            "closed forms for all scales, and a search that decouples codes from stored scales",
        ),
        Solver("sweep", "sweep", "every useful scale of every block, the best kept: least weight error"),
        Solver(
            "sweep-diagonal",
            "sweep_diagonal",
            "sweep, errors weighted by the power of each input",
            calibrated=True,
        ),
        Solver(
            "gptq",
            "gptq",
            "error feedback along correlated inputs, scales and codes together: least output error",
            calibrated=True,
        ),
        Solver(
            "mxfp4-rtn", "mxfp4_rtn", "round to nearest in MXFP4, a baseline to compare with", format="mxfp4"
        ),
    )
}


def get_solver(name: str) -> Solver:
    """The solver of that name. UsageError lists the known ones."""
    if name not in SOLVERS:
        near = get_close_matches(name, SOLVERS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UsageError(f"unknown solver '{name}'; known: {', '.join(SOLVERS)}{hint}")
    return SOLVERS[name]


def default_solver(names: Iterable[str], calibrated: bool) -> str:
    """The first of `names` that has what it needs; empty when there is none."""
    return next((name for name in names if calibrated or not get_solver(name).calibrated), "")
