"""Leads `QuantizeWeights` through a model, with what is to be known at every stage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qgraph.calibration.border import Border
from qgraph.calibration.collector import MEMORY
from qgraph.calibration.data import Data
from qgraph.calibration.journal import Journal
from qgraph.calibration.sources import FloatModel, Nothing, QuantizedSoFar, Rounding, Source
from qgraph.calibration.workspace import scratch_folder
from qgraph.errors import ResourceError, UsageError
from qgraph.passes.linear_groups import Arrays, GroupHandler, LinearGroup, Stage
from qgraph.solvers._tiles import thread_count

if TYPE_CHECKING:
    import onnx_ir as ir


class StreamingCalibrator:
    """A `Calibrator` that runs the model over `data` in segments, and keeps no activations but those between
    two segments, on disk.

    Args:
        data: from `open_data`, for this model.
        sequential: the statistics of a group are those of the model as it is by then, with the groups before
            it quantized (the activations that the layer will see); else those of the float model.
        corrected: `Statistics.cross` tells how these activations differ from the float model's, which is
            carried along. Goes with `sequential`.
        rounding: (x float32 [n, K], the largest |x| over all data) -> x as the layers will see it, where
            their inputs are rounded at run time. The second moment and the mean are then those of the rounded
            x, `amax` is that of x before, and `cross` is to x of the float model if `corrected`, else to x
            before. With `sequential`, layers to come see what rounded inputs lead to.
        journal: where records are kept, so that a run which was interrupted goes on; None: nowhere.
        threads: None is one for every CPU. The result does not depend on it.
        memory: bytes of sums at a time (8 K^2 a group) when not sequential.
        on_group(i, n, weight): before the i-th of n stages (from 0); i = n at the end.
        on_records(done, n): once, before the first stage, where the journal has records of `done` of n.

    Raises UsageError for options that do not fit together. What `walk` raises is told there.
    """

    def __init__(
        self,
        data: Data,
        *,
        sequential: bool,
        corrected: bool = False,
        rounding: Rounding | None = None,
        journal: Journal | None = None,
        threads: int | None = None,
        memory: int = MEMORY,
        on_group: Callable[[int, int, str], None] = lambda i, n, name: None,
        on_records: Callable[[int, int], None] = lambda done, n: None,
    ) -> None:
        if corrected and not sequential:
            raise UsageError(
                "calibration: 'corrected' goes with 'sequential': else nothing is to be corrected"
            )
        self.data, self.sequential, self.corrected, self.rounding = data, sequential, corrected, rounding
        self.journal, self.threads, self.memory = journal, thread_count(threads), memory
        self.on_group, self.on_records = on_group, on_records

    def walk(self, model: ir.Model, stages: Sequence[Stage], handler: GroupHandler) -> None:
        """See `Calibrator`.

        Raises:
            UsageError: sites without `sequential`.
            InputError: activations that are not finite, with the sample; data that the model cannot run.
            UnsupportedError: a model that ONNX Runtime cannot run.
            ResourceError: no disk space; another process holds the journal.
        """
        if not self.sequential and not all(isinstance(stage, LinearGroup) for stage in stages):
            raise UsageError(
                "calibration: a shift of the mean goes with 'sequential': on the float model there is none"
            )
        journal = self.journal
        with contextlib.ExitStack() as stack:
            if journal is not None:
                stack.enter_context(journal.open())
            missing = [
                i for i, stage in enumerate(stages) if journal is None or journal.read(i, stage) is None
            ]
            if len(missing) < len(stages):
                self.on_records(len(stages) - len(missing), len(stages))
            source = self._source(model, stages, missing, stack) if missing else Nothing()
            for i, stage in enumerate(stages):
                self.on_group(i, len(stages), stage.weights[0])
                # No local name holds on to the arrays of a stage while the next one is solved.
                if i in missing:
                    source.replace(handler.apply(stage, self._fresh(i, stage, handler, source)))
                else:
                    source.skip(i)
                    source.replace(handler.apply(stage, self._recorded(i, stage)))
            if journal is not None:
                journal.finish()
        self.on_group(len(stages), len(stages), "")

    def _recorded(self, index: int, stage: Stage) -> Arrays:
        """The record of an earlier run."""
        assert self.journal is not None
        record = self.journal.read(index, stage)
        if record is None:
            raise ResourceError(
                f"{self.journal.folder}: a record was there a moment ago and is gone: run again"
            )
        return record

    def _fresh(self, index: int, stage: Stage, handler: GroupHandler, source: Source) -> Arrays:
        """A record made now."""
        if isinstance(stage, LinearGroup):
            record = handler.solve(stage, source.statistics(index))
        else:
            record = source.shift(index)
        return record if self.journal is None else self.journal.write(index, stage, record)

    def _source(
        self,
        model: ir.Model,
        stages: Sequence[Stage],
        missing: Sequence[int],
        stack: contextlib.ExitStack,
    ) -> Source:
        if self.journal is not None:
            border = self.journal.border(keep=self.sequential)
        else:
            border = Border(stack.enter_context(scratch_folder()))
        rest = (missing, self.data, border, self.rounding, self.threads)
        if self.sequential:
            return QuantizedSoFar(model, stages, *rest, corrected=self.corrected)
        groups = [stage for stage in stages if isinstance(stage, LinearGroup)]
        return FloatModel(model, groups, *rest, memory=self.memory)
