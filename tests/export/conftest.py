"""Tests of exports import `lowbit_models` from this folder, and the tiny models of two others."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).parents[i] / folder) for i, folder in ((0, ""), (1, "cli"), (1, "evaluate"))
]
