"""Modules of this folder, and the tiny decoder of tests/evaluate, are importable."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parent.parent / "evaluate"):
    sys.path.insert(0, str(folder))
