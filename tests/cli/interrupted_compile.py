"""`qgraph ARGS`, in a process that sends itself a signal on the way:

    python interrupted_compile.py EVENT COUNT SIGNAL ARGS...

EVENT: what is about to happen for the COUNT-th time when the signal comes.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from interruption import before_call

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


if __name__ == "__main__":
    # Whoever edits a solver between two runs fails no test.
    journal._sources = lambda: "as they are"  # type: ignore[assignment]
    event, count, number, *argv = sys.argv[1:]
    if event:
        before_call(*EVENTS[event], int(count), lambda: os.kill(os.getpid(), signal.Signals[number]))
    sys.exit(run(argv))
