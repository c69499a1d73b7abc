"""A process that calibrates the toy transformer, and may kill itself on the way:

    python interrupted_walk.py JOURNALS RESULT KIND [EVENT COUNT]

KIND: float | sequential | corrected | rounded. EVENT: what to die at, the COUNT-th time it is about to
happen. Writes the records that were applied to RESULT.npz when it gets to the end.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np
from calibration_harness import Coarse, data_of, feeds, groups_of, transformer
from interruption import before_call

from qgraph.calibration import Journal, StreamingCalibrator, border, journal, walk

SOURCES = "as they are"  # in the place of their hash: whoever edits a solver meanwhile fails no test

KINDS: dict[str, dict[str, Any]] = {
    "float": {"sequential": False, "memory": 40_000},
    "sequential": {"sequential": True},
    "corrected": {"sequential": True, "corrected": True},
    "rounded": {
        "sequential": True,
        "corrected": True,
        "rounding": lambda x, largest: np.round(x * np.float32(7 / largest)) * np.float32(largest / 7),
    },
}

# name -> (object, attribute): dies before the call
EVENTS = {
    "run": (walk.Walk, "_run"),
    "measure": (walk.Walk, "_measure"),
    "put": (border.BorderWriter, "put"),
    "close": (border.BorderWriter, "close"),
    "manifest": (border.Border, "_save"),
    "sweep": (border.Border, "_sweep"),
    "write": (journal.Journal, "write"),
    "replace": (Path, "replace"),
    "solve": (Coarse, "solve"),
    "apply": (Coarse, "apply"),
    "finish": (journal.Journal, "finish"),
}


def main(root: str, result: str, kind: str, event: str = "", count: str = "0") -> None:
    journal._sources = lambda: SOURCES
    model = transformer(1)
    if event:
        before_call(*EVENTS[event], int(count), lambda: os.kill(os.getpid(), signal.SIGKILL))
    handler = Coarse(model)
    kept = Journal({"model": "toy", "kind": kind}, root=root)
    data = data_of(model, feeds(3))
    StreamingCalibrator(data, journal=kept, threads=2, **KINDS[kind]).walk(model, groups_of(model), handler)
    arrays = {f"{i}.{k}": v for i, record in enumerate(handler.records) for k, v in record.items()}
    np.savez(result, solved=len(handler.solved), **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
