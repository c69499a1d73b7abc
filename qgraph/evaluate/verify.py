"""Does the artifact compute what the low-bit ONNX file says? Both are run, on the same seeded inputs.

The judge is ONNX's reference evaluator: plain numpy, an implementation that shares nothing with ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qgraph.errors import BudgetError
from qgraph.evaluate.compare import compare
from qgraph.evaluate.runners import ReferenceRunner
from qgraph.evaluate.samples import InputSpec, artifact_ranges, choose_dims, input_specs, make_inputs

REL_ERROR_LIMIT = 1e-4  # float32 sums in another order differ by far less, a wrong kernel by far more

# Sizes of the symbolic dims, in the order in which the inputs name them. Different from each other, so that
# two dims mixed up show; 1, where broadcasting hides; not multiples of a vector.
_SIZES = ((2, 7, 5, 3), (1, 1, 1, 1), (3, 17, 6, 4))


@dataclass(frozen=True)
class Comparison:
    """The artifact beside the reference evaluator, for inputs of one set of dims."""

    dims: Mapping[str, int]
    rel_error: Mapping[str, float]  # output -> |artifact - reference| / |reference|, Frobenius norms


@dataclass(frozen=True)
class Verification:
    """Whether an artifact computes what its low-bit ONNX file says: `status` is `passed`, or `skipped` with a
    reason."""

    status: str
    reason: str = ""
    limit: float = 0.0
    comparisons: Sequence[Comparison] = ()

    @property
    def worst(self) -> float:
        """The largest relative error of all outputs and inputs tried."""
        return max((e for c in self.comparisons for e in c.rel_error.values()), default=0.0)


def verify(
    artifact: Path,
    lowbit: Path,
    *,
    threads: int = 0,
    seed: int = 0,
    limit: float = REL_ERROR_LIMIT,
    on_case: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Verification:
    """Run both files on inputs of several sizes and compare all outputs.

    Raises BudgetError, naming output and dims, when one differs by more than `limit` (relative, Frobenius
    norm).
    """
    from qgraph.runtime import load

    model = load(artifact, threads=threads)
    inputs = input_specs(model)
    ranges = artifact_ranges(model)
    reference = ReferenceRunner(lowbit)
    cases = _cases(inputs, {dim.name: (dim.min, dim.max) for dim in model.dims})
    comparisons = []
    for i, dims in enumerate(cases):
        shown = " ".join(f"{name}={size}" for name, size in dims.items()) or "fixed sizes"
        on_case(i, len(cases), shown)
        feeds = make_inputs(inputs, ranges, dims, seed + i)
        errors = {name: d.rel_error for name, d in compare(model.run(feeds), reference.run(feeds)).items()}
        comparisons.append(Comparison(dims, errors))
        for name, error in errors.items():
            if not error <= limit:
                raise BudgetError(
                    f"the artifact disagrees with the low-bit ONNX model: output '{name}' at {shown} has "
                    f"a relative error of {error:.2g}, allowed is {limit:g}; nothing was written"
                )
    return Verification("passed", limit=limit, comparisons=comparisons)


def _cases(inputs: list[InputSpec], bounds: Mapping[str, tuple[int, int]]) -> list[dict[str, int]]:
    """The distinct settings of the symbolic dims that are tried."""
    names = list(choose_dims(inputs, {}))
    cases: list[dict[str, int]] = []
    for sizes in _SIZES:
        case = {}
        for i, name in enumerate(names):
            low, high = bounds.get(name, (1, 1 << 24))
            case[name] = min(max(sizes[i % len(sizes)], low), high)
        if case not in cases:
            cases.append(case)
    return cases
