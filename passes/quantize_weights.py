"""Replaces the selected MatMuls and lookups by low-bit ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph.errors import InputError, UsageError
from qgraph.formats import QTensor
from qgraph.passes.base import GraphPass, is_op, replace_node
from qgraph.passes.linear_groups import (
    Arrays,
    Calibrator,
    LinearGroup,
    MeanShiftSite,
    Stage,
    linear_groups,
)
from qgraph.passes.lowbit_functions import DOMAIN
from qgraph.passes.lowbit_weights import FORMS, TABLES, from_arrays, to_arrays, to_tensors
from qgraph.passes.mean_shift import SHIFTS, install, stages
from qgraph.passes.quantize_activations import quantize_input
from qgraph.passes.select_layers import DECISION, DECISIONS, KEPT, picks_columns
from qgraph.schemes import SCHEMES, Scheme, get_scheme
from qgraph.solvers import default_solver, get_solver
from qgraph.solvers._tiles import check_weight
from qgraph.solvers.hessian import compensated_target, compensation_damping, relative_output_error
from qgraph.solvers.statistics import Statistics

# How far weights follow what would undo the errors before them, by the format of the activations. Measured on
# MiniLM and stories260K: all the way is worse than not at all behind the noise of 4-bit activations.
_STRENGTH = {"nvfp4": 0.5}

_LOST = 0.9  # relative error of a weight from which on the report calls it lost

QUANTIZED = "qgraph.quantized"  # key of model.meta: list[QuantizedWeight], one a weight, in graph order


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight after quantization, and what that cost."""

    weight: str  # name of the float32 initializer it was
    nodes: tuple[str, ...]  # that multiply by it, or look rows of it up
    shape: tuple[int, int]  # (K, N); of a table (V, H)
    relative_error: float  # |W - W'|^2 / |W|^2, 0 for an exact or zero weight
    sqnr_db: float  # -10 log10 of it, infinite for an exact weight
    bits_per_weight: float  # all scales counted
    nbytes: int
    original_nbytes: int
    output_error: float | None = None  # E|x W - x W'|^2 / E|x W|^2 over the calibration data
    tokens: int = 0  # of calibration data that the layer saw


class QuantizeWeights(GraphPass):
    """Turns every MatMul that `SelectLayers` chose into `ai.qgraph::QLinear<Format>(x, codes, block_scale,
    ..)`, every Gather into `ai.qgraph::QGatherNVFP4(ids, codes, block_scale, global_scale)`, and one from the
    weight of such a MatMul into `ai.qgraph::QGatherColumns<Format>(ids, codes, block_scale, ..)`.

    Rules: the scheme of a layer is that of its `LayerDecision`, or else `scheme`; a weight that several nodes
    share is quantized once; the blocks of a table [V, H] run along its rows, so that a solver sees it as
    [K, N] = [H, V], and without calibration; where the scheme rounds activations, the input of a MatMul comes
    through one `DynamicQDQ` node (quantize_activations.py) that all its readers share; the float weight goes
    when nothing reads it any more; the node keeps its name, output and metadata, and gets `qgraph.scheme`
    (the format of its weight), `qgraph.bits_per_weight`, `qgraph.sqnr_db`, `qgraph.source_weight`, with
    calibration `qgraph.output_error`. What was done is stored in `model.meta[QUANTIZED]`.

    Args:
        solver: for layers of `scheme`; empty is the scheme's first that has what it needs.
        calibrator: knows the statistics of the layers' inputs, and leads from layer to layer.
        on_layer(i, n, weight): called before the i-th of n weights (from 0) is quantized, and with i = n at
            the end.

    Raises InputError naming the weight that is not finite, UsageError for an unknown scheme or solver, or one
    that needs a calibrator and has none.
    """

    def __init__(
        self,
        scheme: str,
        solver: str = "",
        *,
        calibrator: Calibrator | None = None,
        threads: int | None = None,
        on_layer: Callable[[int, int, str], None] = lambda i, n, name: None,
    ) -> None:
        super().__init__()
        self.scheme = get_scheme(scheme)
        self.calibrator = calibrator
        self.threads = threads
        self.on_layer = on_layer
        self.solver = self.resolve(self.scheme, solver)
        of_tables = SCHEMES[TABLES].solvers
        given = [self.solver] if self.solver in of_tables else []
        self.table_solver = default_solver([*given, *of_tables], calibrated=False)

    def resolve(self, scheme: Scheme, solver: str) -> str:
        """The solver of layers of `scheme`. UsageError when it is not for them, or needs a calibrator."""
        calibrated = self.calibrator is not None
        solver = solver or default_solver(scheme.solvers, calibrated)
        if solver and scheme.weight_format not in get_solver(solver).modules:
            raise UsageError(
                f"solver '{solver}' is not for scheme '{scheme.name}'; known: {', '.join(scheme.solvers)}"
            )
        if not calibrated and (scheme.needs_calibration or (solver and get_solver(solver).calibrated)):
            raise UsageError(f"scheme '{scheme.name}' with solver '{solver}' needs calibration data")
        return solver

    def requires(self, model: ir.Model) -> None:
        """`SelectLayers` has run."""
        if DECISIONS not in model.meta:
            raise ir.passes.PreconditionError("QuantizeWeights runs after SelectLayers")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if self.scheme.weight_format is None:
            for node in model.graph.all_nodes():
                if DECISION in node.meta and not node.meta[DECISION].scheme:
                    node.meta[DECISION] = replace(node.meta[DECISION], quantize=False)
                    node.metadata_props[KEPT] = f"scheme {self.scheme.name}"
        work = _Work(self, model, _chosen(model))
        for weight in work.tables:
            work.quantize_table(weight)
        if self.calibrator is not None:
            self.calibrator.walk(model, stages(model.graph, work.groups), work)
        else:
            for group in work.groups:
                work.install(group, work.solve(group, None))
        self.on_layer(len(work.order), len(work.order), "")
        model.meta[QUANTIZED] = work.done()
        for shift in model.meta.get(SHIFTS, ()):
            gain = f"{shift.share:.2%} of an error of {shift.relative_error:.2%}"
            self.refuse(shift.node, f"the mean set right, which is {gain}")
        return ir.passes.PassResult(model, bool(work.order))

    def ensures(self, model: ir.Model) -> None:
        """Every layer that was chosen is low-bit now."""
        left = [node.name for node in _chosen(model)]
        if left:
            raise ir.passes.PostconditionError(f"chosen but not quantized: {left}")


class _Work:
    """One run of the pass: the `GroupHandler` of a calibrator."""

    def __init__(self, options: QuantizeWeights, model: ir.Model, nodes: list[ir.Node]) -> None:
        self.options, self.model = options, model
        self.order: dict[str, ir.Value] = {}  # weights in graph order
        self.readers: dict[str, list[ir.Node]] = {}
        self.tables: list[str] = []
        for node in nodes:
            weight = node.inputs[0 if is_op(node, "Gather") else 1]
            assert weight is not None and weight.name is not None
            if is_op(node, "Gather") and not picks_columns(node) and weight.name not in self.order:
                self.tables.append(weight.name)
            self.order[weight.name] = weight
            self.readers.setdefault(weight.name, []).append(node)
        # What a weight [K, N] becomes: the scheme and the solver of the nodes that read it.
        self.recipes = {name: self._recipe(name) for name in self.order if name not in self.tables}
        # Of a shared weight either all readers look up rows or none does: SelectLayers sees to it.
        self.groups = linear_groups([node for node in nodes if is_op(node, "MatMul")])
        self._done: dict[str, QuantizedWeight] = {}

    def _recipe(self, name: str) -> tuple[Scheme, str]:
        """The scheme and the solver that all readers of a weight were given; UsageError where they differ."""
        recipes: dict[tuple[str, str], ir.Node] = {}  # with one of the readers
        for node in self.readers[name]:
            recipes[node.meta[DECISION].scheme, node.meta[DECISION].solver] = node
        if len(recipes) > 1:
            one, other, *_ = recipes.values()
            raise UsageError(
                f"layers '{one.name}' and '{other.name}' share a weight and cannot differ in scheme or "
                "solver: give a pattern that matches both, or neither"
            )
        ((scheme_name, solver),) = recipes
        if not scheme_name:
            return self.options.scheme, self.options.solver
        scheme = get_scheme(scheme_name)
        return scheme, self.options.resolve(scheme, solver)

    def done(self) -> list[QuantizedWeight]:
        """What was done, in graph order."""
        return [self._done[name] for name in self.order]

    def quantize_table(self, name: str) -> None:
        """Quantize a table that rows are looked up in."""
        self._announce(name)
        W = self._float_weight(name).T
        solver = get_solver(self.options.table_solver)
        q = solver(W, format=TABLES, name=name, threads=self.options.threads)
        self._replace(name, q, [_relative_error(W, q.dequantize())], 0)

    def solve(self, group: LinearGroup, statistics: Statistics | None) -> Arrays:
        """See GroupHandler; without statistics the solver goes by the weights alone."""
        record = Arrays()
        for i, name in enumerate(group.weights):
            self._announce(name)
            scheme, solver_name = self.recipes[name]
            solver = get_solver(solver_name)
            W = target = self._float_weight(name)
            H = None if statistics is None else statistics.second_moment
            if solver.calibrated and statistics is not None and statistics.cross is not None:
                residual = statistics.residuals.get(group.residuals[i]) if group.residuals else None
                target = compensated_target(
                    W,
                    statistics.second_moment,
                    statistics.cross,
                    residual,
                    damping=compensation_damping(group.K, statistics.tokens),
                    strength=_STRENGTH.get(self.options.scheme.activation_format or "", 1.0),
                )
            tokens = 0 if statistics is None else statistics.tokens
            q = solver(
                target,
                format=str(scheme.weight_format),
                H=H,
                tokens=tokens,
                name=name,
                threads=self.options.threads,
            )
            back = q.dequantize()
            errors = [_relative_error(W, back)]
            if H is not None:
                errors.append(relative_output_error(target, back, H, self.options.threads))
            record |= {f"{i}.{part}": array for part, array in to_arrays(q).items()}
            record[f"{i}.errors"] = np.array(errors)
        record["tokens"] = np.array([0 if statistics is None else statistics.tokens])
        if statistics is not None and self.options.scheme.needs_calibration:
            record["input_amax"] = np.array([statistics.largest], np.float32)
        return record

    def apply(self, stage: Stage, record: Arrays) -> dict[str, npt.NDArray[np.float32]]:
        """See GroupHandler."""
        if isinstance(stage, MeanShiftSite):
            return install(self.model, stage, record)
        return {name: q.dequantize() for name, q in self.install(stage, record).items()}

    def install(self, group: LinearGroup, record: Arrays) -> dict[str, QTensor]:
        """Put a record into the model. Returns the quantized weights by name."""
        weights = {}
        activations = self.options.scheme.activation_format
        if activations is not None:
            amax = float(record["input_amax"][0]) if "input_amax" in record else None
            layers = [n for name in group.weights for n in self.readers[name] if is_op(n, "MatMul")]
            for value in {layer.inputs[0]: None for layer in layers}:
                assert value is not None
                rounded = quantize_input(value, activations, amax)
                for layer in layers:
                    if layer.inputs[0] is value:
                        layer.replace_input_with(0, rounded)
        for i, name in enumerate(group.weights):
            parts = {key.removeprefix(f"{i}."): array for key, array in record.items()}
            q = from_arrays(str(self.recipes[name][0].weight_format), self._shape(name), parts)
            errors = [float(error) for error in record[f"{i}.errors"]]
            self._replace(name, q, errors, int(record["tokens"][0]))
            weights[name] = q
        return weights

    def _announce(self, name: str) -> None:
        self.options.on_layer(len(self._done), len(self.order), name)

    def _float_weight(self, name: str) -> npt.NDArray[np.float32]:
        tensor = self.order[name].const_value
        assert tensor is not None
        return tensor.numpy()

    def _shape(self, name: str) -> tuple[int, int]:
        tensor = self.order[name].const_value
        assert tensor is not None
        K, N = tensor.shape.numpy()
        return K, N

    def _replace(self, name: str, q: QTensor, errors: list[float], tokens: int) -> None:
        """Put the low-bit nodes in the place of those that read the weight.

        errors: of the weight and, with calibration, of the output.
        """
        relative_error, output_error = errors[0], errors[1] if len(errors) > 1 else None
        weight, nodes = self.order[name], self.readers[name]
        graph, tensor = weight.graph, weight.const_value
        assert isinstance(graph, ir.Graph) and tensor is not None
        table = name in self.tables
        sqnr_db = -10 * float(np.log10(relative_error)) if relative_error else float("inf")
        if relative_error > _LOST:
            self.options.refuse(
                nodes[0], f"{relative_error:.0%} of its weight is lost in {q.format}: exclude the layer"
            )
        parts = _initializers(graph, name, q, turned=table)
        form = FORMS[q.format]
        for node in nodes:
            lookup = is_op(node, "Gather")
            of_lookup = form.lookup if table else form.columns
            lowbit = ir.node(
                of_lookup if lookup else form.linear,
                [node.inputs[1 if lookup else 0], *parts],
                domain=DOMAIN,
                name=node.name,
                doc_string=node.doc_string,
            )
            replace_node(node, [lowbit])
            lowbit.metadata_props.update(
                {
                    "qgraph.scheme": q.format,
                    "qgraph.bits_per_weight": f"{q.bits_per_weight():.4f}",
                    "qgraph.sqnr_db": f"{sqnr_db:.2f}",
                    "qgraph.source_weight": name,
                }
            )
            if output_error is not None and not lookup:
                lowbit.metadata_props["qgraph.output_error"] = f"{output_error:.6g}"
        if not weight.uses() and not weight.is_graph_output():
            del graph.initializers[name]
        self._done[name] = QuantizedWeight(
            weight=name,
            nodes=tuple(str(node.name) for node in nodes),
            shape=q.shape[::-1] if table else q.shape,
            relative_error=relative_error,
            sqnr_db=sqnr_db,
            output_error=output_error,
            tokens=tokens,
            bits_per_weight=q.bits_per_weight(),
            nbytes=q.nbytes(),
            original_nbytes=tensor.nbytes,
        )


def check_weights(model: ir.Model) -> None:
    """InputError, naming the weight, for one that was chosen and that no solver takes. For before
    calibration, which would only tell of the activations that come of it, and late."""
    for node in _chosen(model):
        weight = node.inputs[0 if is_op(node, "Gather") else 1]
        assert weight is not None and weight.const_value is not None
        check_weight(weight.const_value.numpy(), str(weight.name))


def _chosen(model: ir.Model) -> list[ir.Node]:
    """The nodes that `SelectLayers` chose and that are still there."""
    return [n for n in model.graph.all_nodes() if DECISION in n.meta and n.meta[DECISION].quantize]


def _initializers(graph: ir.Graph, name: str, q: QTensor, turned: bool) -> list[ir.Value]:
    """The stored parts of `q`, or of its transpose, registered as `<name>.codes`, `<name>.block_scale` and so
    on."""
    taken = (
        {v.name for node in graph for v in node.outputs}
        | {v.name for v in graph.inputs}
        | set(graph.initializers)
    )
    values = []
    for tensor in to_tensors(q, name, turned):
        if tensor.name in taken:
            raise InputError(
                f"the model already has a value '{tensor.name}', which quantizing '{name}' would add"
            )
        value = ir.Value(
            name=tensor.name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        graph.register_initializer(value)
        values.append(value)
    return values


def _relative_error(W: npt.NDArray[np.float32], back: npt.NDArray[np.float32]) -> float:
    """|W - W'|^2 / |W|^2 in float64, by rows so that no float64 copy of W is made; 0 for a zero weight."""
    noise = sum(float(np.square(row, dtype=np.float64).sum()) for row in map(np.subtract, W, back))
    signal = sum(float(np.square(row, dtype=np.float64).sum()) for row in W)
    return noise / signal if signal else 0.0
