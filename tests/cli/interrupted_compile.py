"""`qgraph ARGS`, in a process that sends itself a signal on the way:

    python interrupted_compile.py EVENT COUNT SIGNAL ARGS...

EVENT: what is about to happen for the COUNT-th time when the signal comes.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from qgraph import pipeline
from qgraph.calibration import border, journal, walk
from qgraph.cli import run
from qgraph.passes import quantize_weights

# name -> (object, attribute that is called)
EVENTS: dict[str, tuple[Any, str]] = {
    "batch": (walk.Walk, "_run"),
    "solve": (quantize_weights._Work, "solve"),
    "record": (journal.Journal, "write"),
    "apply": (quantize_weights._Work, "apply"),
    "border": (border.Border, "_save"),
    "records are all there": (journal.Journal, "finish"),
    "low-bit file": (pipeline, "_save"),
    "artifact": (pipeline, "_verify"),
}


def signal_at(event: str, count: int, number: int) -> None:
    """Send it before the `count`-th call."""
    owner, name = EVENTS[event]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), number)
        return original(*args, **options)

    setattr(owner, name, counted)


if __name__ == "__main__":
    # Whoever edits a solver between two runs fails no test.
    journal._sources = lambda: "as they are"  # type: ignore[assignment]
    event, count, number, *argv = sys.argv[1:]
    if event:
        signal_at(event, int(count), signal.Signals[number])
    sys.exit(run(argv))
