"""Does the artifact compute what the low-bit ONNX file says? Both are run, on the same seeded inputs.

The judge is ONNX's reference evaluator: plain numpy, an implementation that shares nothing with ours.

Where activations are rounded, the last bit of a float32 sum decides now and then which way; the difference is
a whole step of the format, later layers meet it with roundings of their own, and two correct implementations
drift apart. So the pieces between roundings are compared one by one: a second artifact shows what goes into
every rounding and what comes out of it; the rounding must be exact to the bit, and the reference evaluator
goes on from the artifact's rounded values.

An artifact with state is run for several steps of a text. The reference evaluator gets back the cache that it
gave: what is wrong in the artifact's shows in the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qgraph.errors import BudgetError, InputError
from qgraph.evaluate.compare import Difference, compare, difference
from qgraph.evaluate.runners import ReferenceRunner
from qgraph.evaluate.samples import InputSpec, artifact_ranges, choose_dims, input_specs, make_inputs
from qgraph.evaluate.text_ports import POSITIONS, artifact_cache, empty_cache, new_tokens_dim

if TYPE_CHECKING:
    import numpy as np

    from qgraph.formats.activations import Rounding
    from qgraph.runtime import Model

    Arrays = Mapping[str, np.ndarray]
    Bounds = Mapping[str, tuple[int, int]]  # of symbolic dims

UNBOUNDED = 1 << 24  # of a dim without an upper bound: more than is ever tried
REL_ERROR_LIMIT = 1e-4  # float32 sums in another order differ by far less, a wrong kernel by far more
# Where products of many rows round activations, as `compute` of an artifact says. What that costs depends on
# the model; a wrong kernel costs all there is.
ROUNDED_LIMITS = {"bf16": 0.1, "int16": 1e-2, "int8": 0.25}


def rounded_limit(compute: str, device: str, limit: float = REL_ERROR_LIMIT) -> float:
    """What is allowed to many rows of an artifact on a device: `limit` where they are not rounded."""
    rounds = device == "cpu" or compute == "bf16"  # on a GPU there are no products in integers
    return ROUNDED_LIMITS.get(compute, limit) if rounds else limit


# Sizes of the symbolic dims, in the order in which the inputs name them. Different from each other, so that
# two dims mixed up show; 1, where broadcasting hides; not multiples of a vector.
_SIZES = ((2, 7, 5, 3), (1, 1, 1, 1), (3, 17, 6, 4))

# Of an artifact with state: tokens a step, and the sizes of other dims.
_STEPS = (((5, 1, 3), (2, 7, 5)), ((9, 1, 1), (1, 1, 1)), ((1, 4), (3, 6, 4)))


@dataclass(frozen=True)
class Comparison:
    """The artifact beside the reference evaluator, for inputs of one set of dims."""

    dims: Mapping[str, int]
    rel_error: Mapping[str, float]  # output -> |artifact - reference| / |reference|, Frobenius norms
    limit: float = REL_ERROR_LIMIT  # allowed


@dataclass(frozen=True)
class Verification:
    """Whether an artifact computes what its low-bit ONNX file says: `status` is `passed`, or `skipped` with a
    reason. One that passed may have a reason, too: why it was not run on all devices that it has code for."""

    status: str
    reason: str = ""
    limit: float = 0.0
    comparisons: Sequence[Comparison] = ()
    devices: Sequence[str] = ()

    @property
    def worst(self) -> float:
        """The largest relative error of all outputs and inputs tried."""
        return max(self.worst_by_limit().values(), default=0.0)

    def worst_by_limit(self) -> dict[float, float]:
        """limit -> the largest relative error of the comparisons that it is for; the strictest first."""
        found: dict[float, float] = {}
        for c in sorted(self.comparisons, key=lambda c: c.limit):
            found[c.limit] = max(*c.rel_error.values(), found.get(c.limit, 0.0), 0.0)
        return found


class Reference:
    """ONNX's reference evaluator on a low-bit file, for comparisons with its artifact.

    exposed: where there are `roundings`: the artifact of the same file with their inputs and outputs as
        further outputs.
    cache: past input -> present output, of an artifact with state. capacity: of the exposed one, 0 is its
        default. device: that the artifacts are on.
    """

    def __init__(
        self,
        lowbit: Path,
        *,
        exposed: Path | None = None,
        roundings: Sequence[Rounding] = (),
        cache: Mapping[str, str] | None = None,
        capacity: int = 0,
        threads: int = 0,
        device: str | None = None,
    ) -> None:
        from qgraph.runtime import load

        self._lowbit, self._roundings, self._pairs = lowbit, roundings, cache or {}
        self._evaluator = ReferenceRunner(
            lowbit, given=[r.output for r in roundings], shown=[r.input for r in roundings]
        )
        self._exposed = None
        if exposed is not None:
            self._exposed = load(exposed, threads=threads, device=device).session(capacity=capacity)
        self._past: dict[str, np.ndarray] = {}

    def begin(self) -> None:
        """Another text: the next `compare` is its first step."""
        self._past = {}
        if self._exposed is not None and self._pairs:
            self._exposed.reset()

    def compare(self, feeds: Arrays, got: Arrays, where: str) -> dict[str, Difference]:
        """How far the artifact's outputs `got` for `feeds` are off, and what goes into every rounding.

        With a cache this is a step of a text, behind those since `begin`. Raises BudgetError where the
        exposed artifact does not give the same outputs, or does not round exactly; `where` tells which feeds.
        """
        if self._exposed is None:
            return compare(got, self._evaluate(feeds))
        # An output or input may itself be rounded, and then it is not shown once more.
        shown = {**feeds, **self._exposed.run(feeds)}
        self._require_same(got, shown, where)
        require_exact("the artifact", self._roundings, shown, where)
        given = {r.output: shown[r.output] for r in self._roundings}
        inside = {r.input: shown[r.input] for r in self._roundings}
        return compare({**got, **inside}, self._evaluate({**feeds, **given}))

    def _evaluate(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """The outputs but for the cache, which is kept."""
        if self._pairs and not self._past:
            pasts = [spec for spec in self._evaluator.specs if spec.name in self._pairs]
            self._past = empty_cache(pasts, feeds)
        found = self._evaluator.run({**feeds, **self._past})
        if missing := [name for name in self._pairs.values() if name not in found]:
            raise InputError(f"{self._lowbit}: no output '{missing[0]}', which is state of the artifact")
        self._past = {past: found.pop(present) for past, present in self._pairs.items()}
        return found

    def _require_same(self, got: Arrays, shown: Arrays, where: str) -> None:
        for name, value in got.items():
            if name not in shown or value.tobytes() != shown[name].tobytes():
                raise BudgetError(
                    f"output '{name}' at {where} is not, bit for bit, that of an artifact built anew from "
                    f"{self._lowbit}: it was built from another file, or by another version of qgraph"
                )


def verify(
    artifact: Path,
    lowbit: Path,
    *,
    exposed: Path | None = None,
    roundings: Sequence[Rounding] = (),
    threads: int = 0,
    device: str | None = None,
    seed: int = 0,
    limit: float = REL_ERROR_LIMIT,
    compute: str = "f32",
    exact_rows: int = 0,
    on_case: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Verification:
    """Run both files on inputs of several sizes and compare all outputs.

    `exposed` and `roundings` are as in `Reference`; `compute` is that of the artifact, `exact_rows` how many
    rows it leaves alone. Raises BudgetError, naming output and dims, when one differs by more than `limit`
    (relative, Frobenius norm), or by what `rounded_limit` allows to inputs of more rows, or a rounding in any
    bit.
    """
    from qgraph.runtime import load

    model = load(artifact, threads=threads, device=device)
    reference = Reference(
        lowbit,
        exposed=exposed,
        roundings=roundings,
        cache=artifact_cache(model),
        threads=threads,
        device=device,
    )
    checks = _Checks(model, reference, seed, (limit, rounded_limit(compute, model.device, limit)), exact_rows)
    texts = _texts(model) if model.has_state else [[d] for d in cases_of(input_specs(model), _bounds(model))]
    total = sum(map(len, texts))
    for text in texts:
        checks.begin()
        for dims in text:
            on_case(len(checks.comparisons), total, where_of(dims))
            checks.step(dims)
    if not checks.comparisons:
        raise BudgetError(f"{artifact} cannot be verified: no run of it fits into its state")
    return Verification("passed", limit=limit, comparisons=checks.comparisons)


class _Checks:
    """Runs a model beside its reference, step by step."""

    def __init__(
        self,
        model: Model,
        reference: Reference,
        seed: int,
        limits: tuple[float, float],  # of exact rows, and where there have been more
        exact_rows: int,
    ) -> None:
        self._model, self._reference, self._seed = model, reference, seed
        self._limits, self._exact_rows, self._rounded = limits, exact_rows, False
        self._session = model.session()
        self._inputs, self._ranges = input_specs(model), artifact_ranges(model)
        self._shortened = [d.name for d in model.dims if d.kind == "option"]
        self.comparisons: list[Comparison] = []

    def begin(self) -> None:
        """The next step is the first of a text."""
        self._reference.begin()
        self._rounded = False
        if self._model.has_state:
            self._session.reset()

    def step(self, dims: Mapping[str, int]) -> None:
        """One run with inputs of these dims. BudgetError where an output is too far off."""
        held, where = self._session.length, where_of(dims)
        feeds = make_inputs(self._inputs, self._ranges, dims, self._seed + len(self.comparisons))
        if self._model.has_state and POSITIONS in feeds:  # where tokens are matters to each other
            feeds[POSITIONS] = positions(feeds[POSITIONS], held, self._ranges.get(POSITIONS, (0, 0))[1])
        got = self._session.run(feeds)
        errors = {n: d.rel_error for n, d in self._reference.compare(feeds, got, where).items()}
        for option in self._shortened:
            errors |= self._last_alone(option, feeds, got, held)
        # A cache remembers. No product has more rows than an input has elements.
        self._rounded |= max(array.size for array in feeds.values()) > self._exact_rows
        limit = self._limits[self._rounded]
        self.comparisons.append(Comparison(dims, errors, limit))
        for name, error in errors.items():
            if not error <= limit:
                raise BudgetError(
                    f"the artifact disagrees with the low-bit ONNX model: output '{name}' at {where} has "
                    f"a relative error of {error:.2g}, allowed is {limit:g}"
                )

    def _last_alone(self, option: str, feeds: Arrays, got: Arrays, held: int) -> dict[str, float]:
        """The step once more, asked for the last position only, beside that of the whole."""
        if self._model.has_state:
            self._session.truncate(held)
        short = self._session.run(feeds, dims={option: 1})
        found = {}
        for info in self._model.outputs:
            if option in info.shape:
                axis = info.shape.index(option)
                last = got[info.name].take([-1], axis=axis)
                found[f"{info.name} ({option}=1)"] = difference(short[info.name], last).rel_error
        return found


def require_exact(what: str, roundings: Sequence[Rounding], shown: Arrays, where: str) -> None:
    """BudgetError where a rounding of `what` differs in any bit, its input and output being among `shown`."""
    from qgraph.formats.activations import dynamic_qdq

    for rounding in roundings:
        x, y = shown[rounding.input], shown[rounding.output]
        # CheckPrepared sees to the global scale.
        exact = dynamic_qdq(x, rounding.format, rounding.global_scale)
        if y.tobytes() != exact.tobytes():
            raise BudgetError(f"{what} rounds '{rounding.input}' to {rounding.format} wrongly at {where}")


def positions(made: np.ndarray, held: int, highest: int) -> np.ndarray:
    """Of the new tokens [batch, sequence]: held, held + 1, .. as far as the table of positions goes."""
    import numpy as np

    found = np.broadcast_to(np.arange(held, held + made.shape[1]), made.shape)
    return np.minimum(found, highest if highest > 1 else found.max()).astype(made.dtype)


def where_of(dims: Mapping[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in dims.items()) or "fixed sizes"


def _bounds(model: Model) -> dict[str, tuple[int, int]]:
    return {dim.name: (dim.min, dim.max) for dim in model.dims}


def _texts(model: Model) -> list[list[dict[str, int]]]:
    """Of an artifact with state: texts, each the dims of its steps."""
    bounds = _bounds(model)
    total = next(dim.name for dim in model.dims if dim.kind == "total")
    most = min(within(bounds, total, UNBOUNDED), model.session().capacity)
    return texts_of(input_specs(model), bounds, total, most)


def cases_of(inputs: Sequence[InputSpec], bounds: Bounds) -> list[dict[str, int]]:
    """The distinct settings of the symbolic dims that are tried."""
    names = list(choose_dims(inputs, {}))
    cases = []
    for sizes in _SIZES:
        # One dim alone is given the second sizes: there are kernels for many rows to be run, too.
        first = 1 if len(names) == 1 else 0
        case = {name: within(bounds, name, sizes[(i + first) % len(sizes)]) for i, name in enumerate(names)}
        if case not in cases:
            cases.append(case)
    return cases


def texts_of(
    inputs: Sequence[InputSpec], bounds: Bounds, total: str, most: int
) -> list[list[dict[str, int]]]:
    """Of a model with a cache: texts, each the dims of its steps. `total` counts all tokens, at most
    `most`."""
    new = new_tokens_dim(inputs, total)
    others = [name for name in choose_dims(inputs, {}) if name not in (new, total)]
    texts = []
    for steps, sizes in _STEPS:
        fixed = {name: within(bounds, name, sizes[i % len(sizes)]) for i, name in enumerate(others)}
        text, held = [], 0
        for step in steps:
            count = new if isinstance(new, int) else within(bounds, new or "", step)
            held += count
            if held <= most:
                sequence = {new: count} if isinstance(new, str) else {}
                text.append({**fixed, **sequence, total: held})
        texts.append(text)
    return texts


def within(bounds: Bounds, name: str, size: int) -> int:
    """`size`, as far as the bounds of the dim allow."""
    low, high = bounds.get(name, (1, UNBOUNDED))
    return min(max(size, low), high)
