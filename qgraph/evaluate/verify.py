"""Does the artifact compute what the low-bit ONNX file says? Both are run, on the same seeded inputs.

The judge is ONNX's reference evaluator: plain numpy, an implementation that shares nothing with ours.

Where activations are rounded, the last bit of a float32 sum decides now and then which way; the difference is
a whole step of the format, later layers meet it with roundings of their own, and two correct implementations
drift apart. So the pieces between roundings are compared one by one: a second artifact shows what goes into
every rounding and what comes out of it; the rounding must be exact to the bit, and the reference evaluator
goes on from the artifact's rounded values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qgraph.errors import BudgetError
from qgraph.evaluate.compare import Difference, compare
from qgraph.evaluate.runners import ReferenceRunner
from qgraph.evaluate.samples import InputSpec, artifact_ranges, choose_dims, input_specs, make_inputs

if TYPE_CHECKING:
    import numpy as np

    from qgraph.formats.activations import Rounding

    Arrays = Mapping[str, np.ndarray]

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


class Reference:
    """ONNX's reference evaluator on a low-bit file, for comparisons with its artifact.

    exposed: where there are `roundings`: the artifact of the same file with their inputs and outputs as
        further outputs.
    """

    def __init__(
        self,
        lowbit: Path,
        *,
        exposed: Path | None = None,
        roundings: Sequence[Rounding] = (),
        threads: int = 0,
    ) -> None:
        from qgraph.runtime import load

        self._lowbit, self._roundings = lowbit, roundings
        self._evaluator = ReferenceRunner(
            lowbit, given=[r.output for r in roundings], shown=[r.input for r in roundings]
        )
        self._exposed = None if exposed is None else load(exposed, threads=threads)

    def compare(self, feeds: Arrays, got: Arrays, where: str) -> dict[str, Difference]:
        """How far the artifact's outputs `got` for `feeds` are off, and what goes into every rounding.

        Raises BudgetError where the exposed artifact does not give the same outputs, or does not round
        exactly; `where` tells which feeds.
        """
        if self._exposed is None:
            return compare(got, self._evaluator.run(feeds))
        # An output or input may itself be rounded, and then it is not shown once more.
        shown = {**feeds, **self._exposed.run(feeds)}
        self._require_same(got, shown, where)
        self._require_exact(shown, where)
        given = {r.output: shown[r.output] for r in self._roundings}
        inside = {r.input: shown[r.input] for r in self._roundings}
        return compare({**got, **inside}, self._evaluator.run({**feeds, **given}))

    def _require_same(self, got: Arrays, shown: Arrays, where: str) -> None:
        for name, value in got.items():
            if name not in shown or value.tobytes() != shown[name].tobytes():
                raise BudgetError(
                    f"output '{name}' at {where} is not, bit for bit, that of an artifact built anew from "
                    f"{self._lowbit}: it was built from another file, or by another version of qgraph"
                )

    def _require_exact(self, shown: Arrays, where: str) -> None:
        from qgraph.formats.activations import dynamic_qdq

        for rounding in self._roundings:
            x, y = shown[rounding.input], shown[rounding.output]
            # CheckPrepared sees to the global scale.
            exact = dynamic_qdq(x, rounding.format, rounding.global_scale)
            if y.tobytes() != exact.tobytes():
                raise BudgetError(
                    f"the artifact rounds '{rounding.input}' to {rounding.format} wrongly at {where}"
                )


def verify(
    artifact: Path,
    lowbit: Path,
    *,
    exposed: Path | None = None,
    roundings: Sequence[Rounding] = (),
    threads: int = 0,
    seed: int = 0,
    limit: float = REL_ERROR_LIMIT,
    on_case: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Verification:
    """Run both files on inputs of several sizes and compare all outputs.

    `exposed` and `roundings` are as in `Reference`. Raises BudgetError, naming output and dims, when one
    differs by more than `limit` (relative, Frobenius norm), or a rounding in any bit.
    """
    from qgraph.runtime import load

    model = load(artifact, threads=threads)
    inputs = input_specs(model)
    ranges = artifact_ranges(model)
    reference = Reference(lowbit, exposed=exposed, roundings=roundings, threads=threads)
    cases = _cases(inputs, {dim.name: (dim.min, dim.max) for dim in model.dims})
    comparisons = []
    for i, dims in enumerate(cases):
        where = " ".join(f"{name}={size}" for name, size in dims.items()) or "fixed sizes"
        on_case(i, len(cases), where)
        feeds = make_inputs(inputs, ranges, dims, seed + i)
        found = reference.compare(feeds, model.run(feeds), where)
        errors = {name: difference.rel_error for name, difference in found.items()}
        comparisons.append(Comparison(dims, errors))
        for name, error in errors.items():
            if not error <= limit:
                raise BudgetError(
                    f"the artifact disagrees with the low-bit ONNX model: output '{name}' at {where} has "
                    f"a relative error of {error:.2g}, allowed is {limit:g}"
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
