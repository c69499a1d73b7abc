"""Does an export compute what the low-bit file says? Both are run, on the same seeded inputs, as for an
artifact (qgraph/evaluate/verify.py); the judge is ONNX's reference evaluator.

Where activations are rounded, a last bit decides now and then which way, and two correct implementations
drift apart. So a twin is run as well: the same weights, with every rounding of the low-bit file and none of
the engine's own (`Context.exact`). It is held to the limit piece by piece, from rounding to rounding, and
these to the bit. What was written is held to `ROUNDED_LIMIT` there: what rounding to 8 bits may cost, and a
wrong weight exceeds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qgraph.errors import BudgetError
from qgraph.evaluate.compare import compare
from qgraph.evaluate.runners import ReferenceRunner, Runner
from qgraph.evaluate.samples import InputSpec, input_ranges, make_inputs
from qgraph.evaluate.text_ports import POSITIONS, empty_cache
from qgraph.evaluate.verify import (
    ROUNDED_LIMITS,
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
from qgraph.passes import load_model, prepare_model
from qgraph.passes.cache import find_cache
from qgraph.passes.expose_roundings import expose_roundings
from qgraph.passes.infer_shapes import CHECKS
from qgraph.passes.save import save_lowbit

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from qgraph.formats.activations import Rounding

    Arrays = Mapping[str, np.ndarray]

ROUNDED_LIMIT = ROUNDED_LIMITS["int8"]


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

    Raises BudgetError, naming output and dims, when an output differs by more than the limit, or a rounding
    in any bit; UnsupportedError and InputError where the engine does not take the file.
    """
    module = EXPORTS[name].module
    model = prepare_model(load_model(lowbit))
    cache = find_cache(model.graph)
    pairs = {str(pair.past.name): str(pair.present.name) for pair in cache.pairs} if cache else {}
    ranges, bounds = input_ranges(model), _bounds(model)
    roundings = expose_roundings(model)
    with tempfile.TemporaryDirectory(prefix="qgraph-") as folder:
        twin = None
        if roundings:
            path = Path(folder) / "twin.onnx"
            exact = Context(context.target, context.packing, context.compute, exact=True)
            save_lowbit(module.export(model, exact), path)
            twin = _Stepper(module.open_runner(path, threads), pairs)
        reference = ReferenceRunner(
            lowbit, given=[r.output for r in roundings], shown=[r.input for r in roundings]
        )
        given = {r.output for r in roundings}
        inputs = [spec for spec in reference.specs if spec.name not in (*pairs, *given)]
        limit = rounded_limit(context.compute if EXPORTS[name].compiled else "f32", "cpu")
        checks = _Checks(name, limit, _Stepper(module.open_runner(written, threads), pairs), twin, roundings)
        judge = _Stepper(reference, pairs)
        if cache is None:
            texts = [[dims] for dims in cases_of(inputs, bounds)]
        else:
            texts = texts_of(inputs, bounds, cache.total, within(bounds, cache.total, 1 << 24))
        total = sum(map(len, texts))
        done = 0
        for text in texts:
            for stepper in (checks.written, judge, *([twin] if twin else [])):
                stepper.begin()
            held = 0
            for dims in text:
                on_case(done, total, where_of(dims))
                feeds = make_inputs(inputs, ranges, dims, seed + done)
                if cache is not None and POSITIONS in feeds:
                    feeds[POSITIONS] = positions(feeds[POSITIONS], held, ranges.get(POSITIONS, (0, 0))[1])
                checks.step(feeds, dims, judge)
                held, done = dims.get(cache.total, 0) if cache else 0, done + 1
    return Verification("passed", limit=limit, comparisons=checks.comparisons, devices=["cpu"])


class _Stepper:
    """A runner that is given its own cache back, from step to step of a text."""

    def __init__(self, runner: Runner, pairs: Mapping[str, str]) -> None:
        self._runner, self._pairs = runner, pairs
        self._pasts: list[InputSpec] = [spec for spec in runner.specs if spec.name in pairs]
        self._past: dict[str, np.ndarray] = {}

    def begin(self) -> None:
        """Another text."""
        self._past = {}

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """All outputs but the cache."""
        found = self._runner.run({**feeds, **(self._past or empty_cache(self._pasts, feeds))})
        self._past = {past: found.pop(present) for past, present in self._pairs.items()}
        return found


class _Checks:
    """Compares step by step."""

    def __init__(
        self,
        name: str,
        limit: float,
        written: _Stepper,
        twin: _Stepper | None,
        roundings: Sequence[Rounding],
    ) -> None:
        self._name, self._limit = name, limit
        self.written, self._twin, self._roundings = written, twin, roundings
        self.comparisons: list[Comparison] = []

    def step(self, feeds: Arrays, dims: Mapping[str, int], judge: _Stepper) -> None:
        """One run of all."""
        got = self.written.run(feeds)
        if self._twin is None:
            self._hold(got, judge.run(feeds), dims, self._limit)
            return
        shown = {**feeds, **self._twin.run(feeds)}
        require_exact(f"export '{self._name}'", self._roundings, shown, where_of(dims))
        wanted = judge.run({**feeds, **{r.output: shown[r.output] for r in self._roundings}})
        self._hold(shown, wanted, dims, self._limit)
        self._hold(got, {name: wanted[name] for name in got}, dims, ROUNDED_LIMIT)

    def _hold(self, got: Arrays, wanted: Arrays, dims: Mapping[str, int], limit: float) -> None:
        errors = {name: found.rel_error for name, found in compare(got, wanted).items()}
        self.comparisons.append(Comparison(dims, errors, limit))
        for name, error in errors.items():
            if not error <= limit:
                raise BudgetError(
                    f"export '{self._name}' disagrees with the low-bit ONNX model: output '{name}' at "
                    f"{where_of(dims)} has a relative error of {error:.2g}, allowed is {limit:g}; "
                    "nothing was written"
                )


def _bounds(model: ir.Model) -> dict[str, tuple[int, int]]:
    """Of the dims that a check bounds by a number."""
    found: dict[str, tuple[int, int]] = {}
    for a, b, _ in model.graph.meta.get(CHECKS, []):
        if isinstance(a, int) and not isinstance(b, int):
            low, high = found.get(str(b), (1, 1 << 24))
            found[str(b)] = low, min(high, a)
        elif isinstance(b, int) and not isinstance(a, int):
            low, high = found.get(str(a), (1, 1 << 24))
            found[str(a)] = max(low, b), high
    return found
