"""What was done, as data: the JSON report, and the lines a terminal shows of it."""

from __future__ import annotations

from qgraph.report.document import REPORT_VERSION, CompileReport, ExportReport
from qgraph.report.layers import LayerReport, layers_of

__all__ = ["REPORT_VERSION", "CompileReport", "ExportReport", "LayerReport", "layers_of"]
