"""Tests of CUDA kernels use the operands and references of those of the CPU's."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parent.parent / "codegen"):
    sys.path.insert(0, str(folder))
