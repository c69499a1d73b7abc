"""Where the time of a run goes: every step of the plan, and what lies between the steps."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qgraph.runtime import Profile, Step


@dataclass(frozen=True)
class Summary:
    """Means over runs, in microseconds.

    Attributes:
        wall_us: of a run, from call to return.
        steps: every step of the plan with its time.
        runs: how many the means are of.
    """

    wall_us: float
    steps: Sequence[tuple[Step, float]]
    runs: int

    @property
    def between_us(self) -> float:
        """What is no step's: shapes, memory, the caller's language, and the clock read around every step."""
        return self.wall_us - sum(us for _, us in self.steps)

    @property
    def kernels(self) -> list[tuple[str, int, float]]:
        """(kernel, its steps, their time together), the longest first."""
        count: dict[str, int] = defaultdict(int)
        total: dict[str, float] = defaultdict(float)
        for step, us in self.steps:
            count[kernel_name(step)] += 1
            total[kernel_name(step)] += us
        return sorted(((name, count[name], total[name]) for name in count), key=lambda row: -row[2])


def kernel_name(step: Step) -> str:
    """`matmul_nvfp4` of the symbol `qg_matmul_nvfp4_<hash of its sizes>`."""
    return re.sub(r"^qg_(.*)_[0-9a-f]{12}$", r"\1", step.kernel)


def measure(run: Callable[[], Profile], repeat: int, warmup: int = 2) -> Summary:
    """`run` is one run with every step timed. Means are over the faster half of `repeat` runs, so that what
    else the machine did does not count, and steps and the time between them add up to the whole."""
    for _ in range(warmup):
        run()
    found = sorted((run() for _ in range(repeat)), key=lambda one: one.wall_ns)
    kept = found[: (repeat + 1) // 2]
    steps = [
        (step, sum(one.steps[i][1] for one in kept) / len(kept) / 1e3)
        for i, (step, _) in enumerate(kept[0].steps)
    ]
    return Summary(sum(one.wall_ns for one in kept) / len(kept) / 1e3, steps, len(kept))
