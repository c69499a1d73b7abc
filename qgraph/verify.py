"""Does the artifact compute what the low-bit ONNX file says? Both are run, on the same seeded inputs.

The judge is ONNX's reference evaluator: plain numpy, an implementation that shares nothing with ours.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qgraph.codegen.isa import ISAS
from qgraph.errors import BudgetError, InputError
from qgraph.report.document import Comparison, Verification
from qgraph.samples import InputSpec, artifact_ranges, choose_dims, input_specs, make_inputs

if TYPE_CHECKING:
    import numpy as np

REL_ERROR_LIMIT = 1e-4  # float32 sums in another order differ by far less, a wrong kernel by far more

# Sizes of the symbolic dims, in the order in which the inputs name them. Different from each other, so that
# two dims mixed up show; 1, where broadcasting hides; not multiples of a vector.
_SIZES = ((2, 7, 5, 3), (1, 1, 1, 1), (3, 17, 6, 4))


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
    reference = reference_runner(lowbit)
    cases = _cases(inputs, {dim.name: (dim.min, dim.max) for dim in model.dims})
    comparisons = []
    for i, dims in enumerate(cases):
        shown = " ".join(f"{name}={size}" for name, size in dims.items()) or "fixed sizes"
        on_case(i, len(cases), shown)
        feeds = make_inputs(inputs, ranges, dims, seed + i)
        errors = {name: d.rel_error for name, d in compare(model.run(feeds), reference(feeds)).items()}
        comparisons.append(Comparison(dims, errors))
        for name, error in errors.items():
            if not error <= limit:
                raise BudgetError(
                    f"the artifact disagrees with the low-bit ONNX model: output '{name}' at {shown} has "
                    f"a relative error of {error:.2g}, allowed is {limit:g}; nothing was written"
                )
    return Verification("passed", limit=limit, comparisons=comparisons)


def runs_here(isas: Iterable[str]) -> bool:
    """Whether this machine has the architecture of one of these ISA levels."""
    return any(ISAS[name].arch == platform.machine() for name in isas)


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


def reference_runner(path: Path) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """A function that runs the ONNX file at `path` by ONNX's reference evaluator. Raises InputError when it
    cannot."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(path)
    try:
        evaluator = ReferenceEvaluator(model)
    except Exception as error:
        raise InputError(f"{path.name}: ONNX's reference evaluator refuses the model: {error}") from error
    names = [output.name for output in model.graph.output]

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return dict(zip(names, evaluator.run(None, dict(feeds)), strict=True))
        except Exception as error:
            raise InputError(
                f"{path.name}: ONNX's reference evaluator fails on these inputs: {error}; "
                "give inputs of your own to `qgraph check`, and --no-verify to `qgraph compile`"
            ) from error

    return run


@dataclass(frozen=True)
class Difference:
    """How far an output is from its reference; all in float64.

    `rel_error`: |got - wanted| / |wanted|, Frobenius norms. `cosine` of the two as vectors. `max_abs`: the
    largest difference of an element. Infinite, and a cosine of -1, where shapes, NaNs or infinities are not
    the same.
    """

    rel_error: float
    cosine: float
    max_abs: float


_INCOMPARABLE = Difference(float("inf"), -1.0, float("inf"))


def compare(got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> dict[str, Difference]:
    """The difference of every output of `wanted`. Raises InputError when `got` lacks one."""
    missing = [name for name in wanted if name not in got]
    if missing:
        raise InputError(f"the artifact has no output '{missing[0]}': it has {', '.join(got)}")
    return {name: difference(got[name], wanted[name]) for name in wanted}


def difference(got: np.ndarray, wanted: np.ndarray) -> Difference:
    """The difference of two arrays."""
    import numpy as np

    if got.shape != wanted.shape:
        return _INCOMPARABLE
    a, b = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    odd = ~np.isfinite(b)
    if not np.array_equal(a[odd], b[odd], equal_nan=True) or not np.isfinite(a[~odd]).all():
        return _INCOMPARABLE
    a, b = a[~odd], b[~odd]
    error, norm_a, norm_b = (float(np.linalg.norm(x)) for x in (a - b, a, b))
    if not norm_b:
        return _INCOMPARABLE if error else Difference(0.0, 1.0, 0.0)
    cosine = float(a @ b) / (norm_a * norm_b) if norm_a else 0.0
    return Difference(error / norm_b, cosine, float(np.abs(a - b).max()))
