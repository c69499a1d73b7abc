"""Number formats: what the codes and scales of a quantized weight mean. Pure numpy, no graphs."""

from __future__ import annotations

from qgraph.formats.block import BlockFormat
from qgraph.formats.qtensor import FORMATS, QTensor

__all__ = ["FORMATS", "BlockFormat", "QTensor"]
