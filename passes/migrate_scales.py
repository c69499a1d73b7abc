"""Moves range from the inputs of quantized layers into their weights, channel by channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph.errors import InputError, UsageError
from qgraph.passes.base import (
    GraphPass,
    add_initializer,
    copy_metadata,
    describe,
    make_node,
    printable,
)
from qgraph.passes.channel_flow import Sink
from qgraph.passes.channel_sources import (
    Source,
    change_constant,
    chosen_matmuls,
    floats,
    operand,
    require_selected_once,
    sources,
)
from qgraph.passes.tie_initializers import TieInitializers
from qgraph.solvers import get_solver

MIGRATIONS = "qgraph.migrations"  # key of model.meta: dict[str, float32 [K]], see MigrateScales

LIMIT = 256.0  # no channel is scaled by more than this, or by less than its reciprocal

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Site:
    """A place where channels can be divided by s > 0, and the rows of the weights that get s in return."""

    where: str  # the value or node that takes the division, for messages
    inputs: tuple[str, ...]  # the values, [.., K], that quantized layers read
    rows: tuple[npt.NDArray[np.int32], ...]  # [K] for each of `inputs`: the channel of each row
    weights: tuple[Vector, ...]  # [K, N] for each of `inputs`: its quantized weights, side by side
    channels: int

    def divide(self, s: Vector) -> dict[str, Vector]:
        """s [channels] as the divisors [K] of each of `inputs`."""
        return {name: s[rows] for name, rows in zip(self.inputs, self.rows, strict=True)}


Score = Callable[[Site, Vector], float]


class MigrateScales(GraphPass):
    """x W = (x / s) (diag(s) W) for the inputs of quantized linear layers: exact, and kinder to rounding.

    SmoothQuant (arXiv 2211.10438, equation 4): s_k = amax|x_k|^alpha / amax|W_k|^(1 - alpha), the geometric
    mean over the channels made 1, held to [1/256, 256]; 1 for a channel without inputs or weights. AWQ
    (arXiv 2306.00978, section 3.2): which alpha is chosen for each site by the error that it leaves.

    The division goes where it costs nothing: into the scale and bias of a LayerNormalization or
    RMSNormalization, the vector of a Mul, or the columns and bias of a linear layer, which the channels may
    leave through heads, attention, a ReLU or the elementwise product of a gated MLP. It must reach nothing
    but constant weights. With `insert`, inputs for which there is no such place are multiplied by 1 / s, for
    the quantized layers only.

    Args:
        channel_amax: largest |x| of every channel, float32 [K], for the name of every value that a quantized
            MatMul reads. It refers to the model as it is before this pass.
        alpha: the strength, in [0, 1]; several of them with `score`.
        score: (site, s [channels]) -> error, the lower the better. Chooses for each site among no migration
            (all ones) and `alpha`, the first of equals; see `weight_error`.
        exact: powers of two for s, so that every intermediate result keeps its bits (but for overflow and
            subnormal numbers). Off by default: it rounds away a good half of the gain on MiniLM.
        insert: see above.

    What was done is stored in `model.meta[MIGRATIONS]`: for the name of a value that a layer read before, the
    s [K] that it has been divided by. Every site, done or not, is among the refusals with its reason.

    Raises InputError for a `channel_amax` of the wrong shape, negative or not finite; UsageError for an alpha
    out of range.
    """

    def __init__(
        self,
        channel_amax: Mapping[str, Vector],
        alpha: float | Sequence[float] = 0.5,
        *,
        score: Score | None = None,
        exact: bool = False,
        insert: bool = False,
    ) -> None:
        super().__init__()
        self.channel_amax = channel_amax
        self.alphas = (float(alpha),) if isinstance(alpha, int | float) else tuple(map(float, alpha))
        self.score, self.exact, self.insert = score, exact, insert
        if not self.alphas or not all(0 <= a <= 1 for a in self.alphas):
            raise UsageError(f"alpha is between 0 and 1, not {alpha}")
        if len(self.alphas) > 1 and score is None:
            raise UsageError("several values of alpha need a score to choose by")

    def requires(self, model: ir.Model) -> None:
        """`SelectLayers` has run, and this pass has not: its statistics would be out of date."""
        require_selected_once(self, model, MIGRATIONS)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        done: dict[str, Vector] = {}
        model.meta[MIGRATIONS] = done
        waiting = dict.fromkeys(chosen_matmuls(model))  # that nothing has been done for
        why: dict[ir.Node, str] = {}
        for source in tuple(sources(model.graph)):
            sinks = source.flow.sinks
            targets = [sink for sink in sinks if sink.node in waiting]
            if not targets:
                continue
            reason = _obstacle(source, targets)
            if not reason and any(operand(sink.node, 0).name in done for sink in sinks):
                reason = "some of the layers that it reaches are migrated already"
            if reason:
                why.update({sink.node: reason for sink in targets})
                continue
            for sink in targets:
                del waiting[sink.node]
            s = self._strength(describe(source.node), targets, source.flow.channels, source.flow.free())
            if s is not None and self._fold(source, s):
                done.update({str(operand(sink.node, 0).name): s[sink.channels] for sink in sinks})
        self._left(model.graph, waiting, why, done)
        if done:
            TieInitializers()(model)
        return ir.passes.PassResult(model, bool(done))

    def _left(
        self,
        graph: ir.Graph,
        waiting: Mapping[ir.Node, None],
        why: Mapping[ir.Node, str],
        done: dict[str, Vector],
    ) -> None:
        """Inserts a Mul for the layers that are `waiting`, or says why they are left."""
        by_value: dict[ir.Value, list[ir.Node]] = {}
        for node in waiting:
            by_value.setdefault(operand(node, 0), []).append(node)
        for value, nodes in by_value.items():
            reason = why.get(
                nodes[0], "no norm, product with a vector or linear layer before it can take a scale exactly"
            )
            shared = [n for n in nodes if any(user not in nodes for user in operand(n, 1).consumers())]
            if not self.insert or shared:
                self.refuse(value, reason if not shared else f"{describe(operand(shared[0], 1))} is shared")
                continue
            K = floats(nodes[0], 1).shape[0]
            sinks = [Sink(node, np.arange(K, dtype=np.int32)) for node in nodes]
            s = self._strength(describe(value), sinks, K, np.ones(K, bool))
            if s is not None:
                _insert(graph, value, sinks, s)
                done[str(value.name)] = s

    def _fold(self, source: Source, s: Vector) -> bool:
        """Divides the channels of `source` and multiplies the rows of every weight that they reach.

        False, and nothing done, where a constant would overflow.
        """
        divided = [(source.node, index, floats(source.node, index) / s) for index in source.indices]
        divided += [(a.node, a.index, floats(a.node, a.index) / s[a.channels]) for a in source.flow.addends]
        weights = _rows_scaled(source.flow.sinks, s)
        if not all(np.isfinite(a).all() for a in (*(a for _, _, a in divided), *weights.values())):
            self.refuse(source.node, "left after all: a constant would overflow")
            return False
        for node, index, array in divided:
            change_constant(node, index, array)
        _set(weights)
        return True

    def _strength(
        self, where: str, targets: Sequence[Sink], channels: int, free: npt.NDArray[np.bool_]
    ) -> Vector | None:
        """s [channels] for a site, None to leave it; says so."""
        site = _site(where, targets, channels)
        largest_x, largest_w = np.zeros(channels), np.zeros(channels)
        for name, rows, weight in zip(site.inputs, site.rows, site.weights, strict=True):
            if name not in self.channel_amax:
                self.refuse(where, f"'{printable(name)}' was not calibrated")
                return None
            np.maximum.at(largest_x, rows, _checked(name, self.channel_amax[name], len(rows)))
            np.maximum.at(largest_w, rows, np.abs(weight).max(axis=1))
        live = free & (largest_x > 0) & (largest_w > 0)
        if not live.any():
            self.refuse(where, "every channel of its layers is zero")
            return None
        candidates = {
            f"alpha {alpha:g}": smoothing(largest_x, largest_w, live, alpha, self.exact)
            for alpha in self.alphas
        }
        if self.score is not None:
            candidates = {"no migration": np.ones(channels, np.float32), **candidates}
        scored = {text: self.score(site, s) if self.score else 0.0 for text, s in candidates.items()}
        best = min(scored, key=lambda text: scored[text])
        s = candidates[best]
        names = ", ".join(printable(name) for name in site.inputs)
        if (s == 1).all():
            self.refuse(
                where,
                f"{names}: {best} is best" if best == "no migration" else f"{names}: {best} rounds to 1",
            )
            return None
        self.refuse(where, f"{names} divided by {s.min():.3g} to {s.max():.3g}, {best}")
        return s


def smoothing(
    largest_x: npt.NDArray, largest_w: npt.NDArray, live: npt.NDArray[np.bool_], alpha: float, exact: bool
) -> Vector:
    """s = largest_x^alpha / largest_w^(1 - alpha) [channels], geometric mean 1, within [1/256, 256]; 1 where
    not `live`. With `exact` the nearest powers of two.

    8 significant bits are plenty, and hide in what the last bits of log2 and exp2 differ between machines.
    """
    log = alpha * np.log2(largest_x[live].astype(np.float64))
    log -= (1 - alpha) * np.log2(largest_w[live].astype(np.float64))
    log -= log.mean()
    bound = np.log2(LIMIT)
    mantissa, exponent = np.frexp(np.exp2(np.clip(np.rint(log) if exact else log, -bound, bound)))
    s = np.ones(len(live), np.float32)
    s[live] = np.ldexp(np.rint(256 * mantissa) / 256, exponent)
    return s


def weight_error(
    second_moment: Callable[[str], npt.NDArray[np.float64]], solver: str = "sweep", threads: int | None = None
) -> Score:
    """A score: E|x W - x W'|^2 / E|x W|^2 after migration, summed over the inputs of a site, with W' from an
    uncalibrated `solver`.

    Args:
        second_moment: name of a value -> E[x^T x], float64 [K, K], before migration.
    """

    def score(site: Site, s: Vector) -> float:
        total = 0.0
        divisors = site.divide(s)
        for name, weight in zip(site.inputs, site.weights, strict=True):
            H = second_moment(name)
            scaled = weight * divisors[name][:, None]
            back = get_solver(solver)(scaled, name=name, threads=threads).dequantize()
            error = (back - scaled) / divisors[name][:, None]
            signal = _energy(H, weight)
            total += _energy(H, error) / signal if signal > 0 else 0.0
        return float(f"{total:.5e}")  # so that the order of a product's sums does not decide

    return score


def _energy(H: npt.NDArray[np.float64], W: npt.NDArray) -> float:
    """tr(W^T H W)."""
    return float(np.einsum("kn,kn->", W, H @ W))


def _obstacle(source: Source, targets: Sequence[Sink]) -> str:
    """Why a source cannot serve all of `targets`; empty when it can."""
    channels = np.concatenate([sink.channels for sink in targets])
    return source.flow.obstacle(channels) or source.obstacle()


def _site(where: str, targets: Sequence[Sink], channels: int) -> Site:
    by_input: dict[str, list[Sink]] = {}
    for sink in targets:
        by_input.setdefault(str(operand(sink.node, 0).name), []).append(sink)
    weights = []
    for sinks in by_input.values():
        arrays = [floats(node, 1) for node in {operand(s.node, 1): s.node for s in sinks}.values()]
        weights.append(np.concatenate(arrays, axis=1) if len(arrays) > 1 else arrays[0])
    rows = tuple(sinks[0].channels for sinks in by_input.values())
    return Site(where, tuple(by_input), rows, tuple(weights), channels)


def _rows_scaled(sinks: Sequence[Sink], s: Vector) -> dict[ir.Value, Vector]:
    """Every weight with its rows multiplied, each once: no other node reads them."""
    return {
        weight: floats(sink.node, 1) * s[sink.channels][:, None]
        for weight, sink in {operand(sink.node, 1): sink for sink in sinks}.items()
    }


def _set(weights: Mapping[ir.Value, Vector]) -> None:
    for value, array in weights.items():
        value.const_value = ir.Tensor(array, name=value.name)


def _insert(graph: ir.Graph, value: ir.Value, sinks: Sequence[Sink], s: Vector) -> None:
    """x -> x * (1 / s) for the readers `sinks` of `value`."""
    factor = add_initializer(graph, 1 / s, f"{value.name}.smoothing")
    node = make_node("Mul", [value, factor], name=f"{value.name}/smooth")
    copy_metadata(sinks[0].node, [node])
    out = node.outputs[0]
    out.name, out.type, out.shape = f"{value.name}.smooth", value.type, value.shape
    graph.insert_before(sinks[0].node, node)
    for sink in sinks:
        sink.node.replace_input_with(0, out)
    _set(_rows_scaled(sinks, s))


def _checked(name: str, amax: Vector, K: int) -> Vector:
    if np.shape(amax) != (K,) or not np.isfinite(amax).all() or (np.asarray(amax) < 0).any():
        raise InputError(
            f"the largest inputs of '{printable(name)}' must be {K} finite numbers, none negative"
        )
    return amax
