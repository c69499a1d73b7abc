"""Does an export compute what the low-bit file says? Both are run, on the same seeded inputs, as for an
artifact (qgraph/evaluate/verify.py); the judge is ONNX's reference evaluator.

Where activations are rounded, a last bit decides now and then which way, and two correct implementations
drift apart. So twins of what was written are run, which show what goes into every rounding, and the judge
goes on from there: what is compared lies between two roundings.
* One has every rounding of the low-bit file and none of the engine's own (`Context.exact`), on the same
  weights. It is held to the limit, and roundings to the bit.
* Where the engine rounds in its own way instead, another does so, too, beside a judge for whom the inputs are
  rounded as the engine does (`Context.rounds`). It is held to `ROUNDED_LIMIT`.
What was written is then held to the latter, and to `WHOLE_LIMIT`: last bits may drift.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qgraph.errors import BudgetError
from qgraph.evaluate.compare import compare
from qgraph.evaluate.runners import ReferenceRunner, Runner
from qgraph.evaluate.samples import input_ranges, make_inputs
from qgraph.evaluate.text_ports import POSITIONS, empty_cache
from qgraph.evaluate.verify import (
    REL_ERROR_LIMIT,
    UNBOUNDED,
    Comparison,
    Verification,
    cases_of,
    positions,
    require_exact,
    rounded_limit,
    texts_of,
    where_of,
    within,
)
from qgraph.export import EXPORTS, Context
from qgraph.export.nbits import round_blocks
from qgraph.passes import load_model, prepare_model
from qgraph.passes.cache import Cache, find_cache
from qgraph.passes.expose_roundings import expose_roundings
from qgraph.passes.infer_shapes import CHECKS
from qgraph.passes.save import save_lowbit

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    Arrays = Mapping[str, np.ndarray]

ROUNDED_LIMIT = 5e-3  # of one layer, and what is behind it: a few roundings that go the other way
WHOLE_LIMIT = 0.25


@dataclass(frozen=True)
class _Facts:
    """How the export is made and run, how exact it is where it rounds nothing, and what inputs of the low-bit
    file are made from."""

    context: Context
    limit: float
    ranges: Mapping[str, tuple[int, int]]
    bounds: Mapping[str, tuple[int, int]]
    cache: Cache | None
    threads: int

    @property
    def pairs(self) -> dict[str, str]:
        """Past input -> present output."""
        return {str(p.past.name): str(p.present.name) for p in self.cache.pairs} if self.cache else {}


def verify_export(
    name: str,
    written: Path,
    lowbit: Path,
    context: Context,
    *,
    threads: int = 0,
    seed: int = 0,
    on_case: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Verification:
    """Compare the file that an export has `written`, in this context, with the low-bit file that it was made
    of.

    Raises BudgetError, naming output and dims, when an output differs by more than a limit, or a rounding in
    any bit; UnsupportedError and InputError where the engine does not take the file.
    """
    model = prepare_model(load_model(lowbit))
    limit = rounded_limit(context.compute, "cpu") if EXPORTS[name].compiled else REL_ERROR_LIMIT
    cache = find_cache(model.graph)
    facts = _Facts(context, limit, input_ranges(model), _bounds(model), cache, threads)
    with tempfile.TemporaryDirectory(prefix="qgraph-") as folder:
        checks = _Checks(name, written, lowbit, facts, Path(folder))
        texts = checks.texts()
        total = sum(map(len, texts))
        for text in texts:
            checks.begin()
            for dims in text:
                on_case(checks.done, total, where_of(dims))
                checks.step(dims, seed + checks.done)
    return Verification("passed", limit=limit, comparisons=checks.comparisons, devices=["cpu"])


class _Stepper:
    """A runner that is given its own cache back, from step to step of a text."""

    def __init__(self, runner: Runner, pairs: Mapping[str, str]) -> None:
        self._runner, self._pairs = runner, pairs
        self._pasts = [spec for spec in runner.specs if spec.name in pairs]
        self._past: dict[str, np.ndarray] = {}

    def begin(self) -> None:
        """Another text."""
        self._past = {}

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """All outputs but the cache."""
        found = self._runner.run({**feeds, **(self._past or empty_cache(self._pasts, feeds))})
        self._past = {past: found.pop(present) for past, present in self._pairs.items()}
        return found


class _Twin:
    """What was written once more, showing inputs and outputs of roundings, beside a judge of its own.
    Without a rounding it is what was `written` itself."""

    def __init__(
        self, name: str, written: Path, lowbit: Path, exact: bool, facts: _Facts, folder: Path
    ) -> None:
        module, model = EXPORTS[name].module, prepare_model(load_model(lowbit))
        of = facts.context
        context = Context(of.target, of.packing, of.compute, exact=exact)
        self.roundings = expose_roundings(model)
        path = written
        if self.roundings:
            path = folder / f"{'exact' if exact else 'rounded'}.onnx"
            save_lowbit(module.export(model, context), path)
        self.rounds = context.rounds
        judge = ReferenceRunner(
            lowbit, given=[r.output for r in self.roundings], shown=[r.input for r in self.roundings]
        )
        runner = module.open_runner(path, facts.threads)
        self.inputs = [spec for spec in runner.specs if spec.name not in facts.pairs]
        self._steppers = [_Stepper(runner, facts.pairs), _Stepper(judge, facts.pairs)]

    def begin(self) -> None:
        """Another text."""
        for stepper in self._steppers:
            stepper.begin()

    def step(self, feeds: Arrays) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(outputs and inputs of roundings; the same by the judge, who goes on from these)."""
        twin, judge = self._steppers
        shown = {**feeds, **twin.run(feeds)}
        given = {r.output: shown[r.output] for r in self.roundings}
        for r in self.roundings:
            if block := self.rounds.get(r.output):
                given[r.output] = round_blocks(shown[r.input], block)
        return shown, judge.run({**feeds, **given})


class _Checks:
    """Compares step by step."""

    def __init__(self, name: str, written: Path, lowbit: Path, facts: _Facts, folder: Path) -> None:
        self._name, self._facts = name, facts
        self._exact = _Twin(name, written, lowbit, True, facts, folder)
        self._inputs = self._exact.inputs
        self._written, self._rounded = None, None
        if self._exact.roundings:
            runner = EXPORTS[name].module.open_runner(written, facts.threads)
            self._written = _Stepper(runner, facts.pairs)
            if facts.context.rounds:
                self._rounded = _Twin(name, written, lowbit, False, facts, folder)
        self.comparisons: list[Comparison] = []
        self.done = self._held = 0

    def texts(self) -> list[list[dict[str, int]]]:
        """The dims of the steps of each text; without a cache a text is one step."""
        bounds, cache = self._facts.bounds, self._facts.cache
        if cache is None:
            return [[dims] for dims in cases_of(self._inputs, bounds)]
        return texts_of(self._inputs, bounds, cache.total, within(bounds, cache.total, UNBOUNDED))

    def begin(self) -> None:
        """Another text."""
        self._held = 0
        for part in (self._exact, self._rounded, self._written):
            if part is not None:
                part.begin()

    def step(self, dims: Mapping[str, int], seed: int) -> None:
        """One run of all. BudgetError where a limit is exceeded."""
        feeds = self._feeds(dims, seed)
        shown, wanted = self._exact.step(feeds)
        require_exact(f"export '{self._name}'", self._exact.roundings, shown, where_of(dims))
        self._hold(shown, wanted, dims, self._facts.limit)
        if self._rounded is not None:
            shown, wanted = self._rounded.step(feeds)
            if None not in self._rounded.rounds.values():
                self._hold(shown, wanted, dims, ROUNDED_LIMIT)
        if self._written is not None:
            got = self._written.run(feeds)
            self._hold(got, {output: shown[output] for output in got}, dims, WHOLE_LIMIT)
        self.done += 1

    def _feeds(self, dims: Mapping[str, int], seed: int) -> dict[str, np.ndarray]:
        feeds = make_inputs(self._inputs, self._facts.ranges, dims, seed)
        if self._facts.cache is not None:
            if POSITIONS in feeds:
                highest = self._facts.ranges.get(POSITIONS, (0, 0))[1]
                feeds[POSITIONS] = positions(feeds[POSITIONS], self._held, highest)
            self._held = dims[self._facts.cache.total]
        return feeds

    def _hold(self, got: Arrays, wanted: Arrays, dims: Mapping[str, int], limit: float) -> None:
        errors = {name: found.rel_error for name, found in compare(got, wanted).items()}
        self.comparisons.append(Comparison(dims, errors, limit))
        for name, error in errors.items():
            if not error <= limit:
                raise BudgetError(
                    f"export '{self._name}' disagrees with the low-bit ONNX model: '{name}' at "
                    f"{where_of(dims)} has a relative error of {error:.2g}, allowed is {limit:g}; "
                    "nothing was written"
                )


def _bounds(model: ir.Model) -> dict[str, tuple[int, int]]:
    """Of the dims that a check bounds by a number."""
    found: dict[str, tuple[int, int]] = {}
    for a, b, _ in model.graph.meta.get(CHECKS, []):
        if isinstance(a, int) and not isinstance(b, int):
            low, high = found.get(str(b), (1, UNBOUNDED))
            found[str(b)] = low, min(high, a)
        elif isinstance(b, int) and not isinstance(a, int):
            low, high = found.get(str(a), (1, UNBOUNDED))
            found[str(a)] = max(low, b), high
    return found
