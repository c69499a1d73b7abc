"""Solvers: float weights -> `QTensor`. Pure functions of arrays, one file each, none knows of graphs.

A solver is `solve(W, *, H=None, tokens=0, name="", threads=None) -> QTensor`, with `format` (a name of
`GROUP_FORMATS`) if it serves these, with W float32 [K, N] and H float64 [K, K], the second moment of the
layer's inputs (`Statistics.second_moment`) over so many tokens (0: unknown), which only calibrated solvers
read. `name` is for messages only; the result does not depend on `threads` (None: every CPU this process may
use). InputError for weights, or an H, that are not finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from qgraph.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from qgraph.formats import QTensor


# The names of `formats.group.GROUP_FORMATS`, once more since that table loads numpy; a test holds them equal.
GROUP_NAMES = ("ternary", "int2", "int3", "int4", "int4-sym", "int8")


def _groups(module: str) -> dict[str, str]:
    return dict.fromkeys(GROUP_NAMES, module)


@dataclass(frozen=True)
class Solver:
    """One way to choose codes and scales. Its module is imported at the first call: listing loads nothing.

    Attributes:
        name: what the user types.
        modules: for each format that it returns, in order of preference, where `solve` is: below
            `qgraph.solvers`.
        summary: one line for `qgraph schemes` and the docs.
        calibrated: whether it needs H.
    """

    name: str
    modules: Mapping[str, str]
    summary: str
    calibrated: bool = False

    @property
    def format(self) -> str:
        """What it returns unless told otherwise."""
        return next(iter(self.modules))

    def __call__(
        self,
        W: npt.NDArray[np.float32],
        *,
        format: str = "",
        H: npt.NDArray[np.float64] | None = None,
        tokens: int = 0,
        name: str = "",
        threads: int | None = None,
    ) -> QTensor:
        """See the module; `format` is one of `modules`, by default the first. UsageError for another, and
        when a calibrated solver gets no H."""
        format = format or self.format
        if format not in self.modules:
            raise UsageError(f"solver '{self.name}' is not for {format}; it is for {', '.join(self.modules)}")
        solve = import_module(f"qgraph.solvers.{self.modules[format]}").solve
        if format in GROUP_NAMES:
            solve = partial(solve, format=format)
        if not self.calibrated:
            return solve(W, name=name, threads=threads)
        if H is None:
            raise UsageError(f"solver '{self.name}' needs calibration data")
        return solve(W, H=H, tokens=tokens, name=name, threads=threads)


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver(
            "rtn",
            {"nvfp4": "rtn", **_groups("group_rtn")},
            "round to nearest, scales from the block's largest weight",
        ),
        Solver(
            "itf",
            _groups("itf"),
            "least squares and rounding in turn, until they agree: PT2-LLM's ITF for any number of levels",
        ),
        Solver(
            "pt2-llm",
            {"ternary": "pt2_llm"},
            "PT2-LLM as published: blocks by ITF and AGA, their errors made up for in later blocks",
            calibrated=True,
        ),
        Solver(
            "four-over-six",
            {"nvfp4": "four_over_six"},
            "the better of two scales: the block's largest weight at 6 or at 4",
        ),
        Solver(
            "soar",
            {"nvfp4": "soar"},
            "closed forms for all scales, and a search that decouples codes from stored scales",
        ),
        Solver(
            "sweep",
            {"nvfp4": "sweep"},
            "every useful scale of every block, the best kept: least weight error",
        ),
        Solver(
            "sweep-diagonal",
            {"nvfp4": "sweep_diagonal"},
            "sweep, errors weighted by the power of each input",
            calibrated=True,
        ),
        Solver(
            "gptq",
            {"nvfp4": "gptq", **_groups("group_gptq")},
            "error feedback along correlated inputs, scales and codes together: least output error",
            calibrated=True,
        ),
        Solver("mxfp4-rtn", {"mxfp4": "mxfp4_rtn"}, "round to nearest in MXFP4, a baseline to compare with"),
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
