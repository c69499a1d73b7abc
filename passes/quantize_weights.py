"""Replaces the selected MatMuls and lookups by low-bit ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qgraph.errors import InputError
from qgraph.formats import QTensor
from qgraph.formats.packing import pack_nibbles
from qgraph.passes.base import GraphPass, is_op, replace_node
from qgraph.passes.lowbit_functions import DOMAIN, LOOKUPS, OPERATORS
from qgraph.passes.select_layers import DECISION, DECISIONS, KEPT
from qgraph.schemes import get_scheme
from qgraph.solvers import get_solver

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


class QuantizeWeights(GraphPass):
    """Turns every MatMul that `SelectLayers` chose into `ai.qgraph::QLinearNVFP4(x, codes, block_scale,
    global_scale)`, and every Gather into `ai.qgraph::QGatherNVFP4(ids, codes, block_scale, global_scale)`.

    Rules: a weight that several nodes share is quantized once; the blocks of a table [V, H] run along its
    rows, so that a solver sees it as [K, N] = [H, V]; the float weight goes when nothing reads it any more;
    the node keeps its name, output and metadata, and gets `qgraph.scheme`, `qgraph.bits_per_weight`,
    `qgraph.sqnr_db`, `qgraph.source_weight`. What was done is stored in `model.meta[QUANTIZED]`.

    on_layer(i, n, weight): called before the i-th of n weights (from 0) is quantized, and with i = n at the
    end.

    Raises InputError naming the weight that is not finite, UsageError for an unknown scheme or solver.
    """

    def __init__(
        self,
        scheme: str,
        solver: str = "",
        *,
        threads: int | None = None,
        on_layer: Callable[[int, int, str], None] = lambda i, n, name: None,
    ) -> None:
        super().__init__()
        self.scheme = get_scheme(scheme)
        self.solver = solver or self.scheme.default_solver
        self.threads = threads
        self.on_layer = on_layer
        if self.scheme.weight_format is not None:
            get_solver(self.solver)

    def requires(self, model: ir.Model) -> None:
        """`SelectLayers` has run."""
        if DECISIONS not in model.meta:
            raise ir.passes.PreconditionError("QuantizeWeights runs after SelectLayers")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if self.scheme.weight_format is None:
            model.meta[QUANTIZED] = []
            named = {decision.node_name for decision in model.meta[DECISIONS]}
            for node in model.graph.all_nodes():
                if node.name in named:
                    node.metadata_props[KEPT] = f"scheme {self.scheme.name}"
            return ir.passes.PassResult(model, bool(named))
        by_weight: dict[ir.Value, list[ir.Node]] = {}
        for node in _chosen(model):
            weight = node.inputs[0 if is_op(node, "Gather") else 1]
            assert weight is not None
            by_weight.setdefault(weight, []).append(node)

        done = []
        for i, (weight, nodes) in enumerate(by_weight.items()):
            self.on_layer(i, len(by_weight), str(weight.name))
            done.append(self._quantize(weight, nodes))
        self.on_layer(len(by_weight), len(by_weight), "")
        model.meta[QUANTIZED] = done
        return ir.passes.PassResult(model, bool(done))

    def ensures(self, model: ir.Model) -> None:
        """Every layer that was chosen is low-bit now."""
        left = [node.name for node in _chosen(model)] if self.scheme.weight_format else []
        if left:
            raise ir.passes.PostconditionError(f"chosen but not quantized: {left}")

    def _quantize(self, weight: ir.Value, nodes: list[ir.Node]) -> QuantizedWeight:
        name, graph, tensor = str(weight.name), weight.graph, weight.const_value
        assert isinstance(graph, ir.Graph) and tensor is not None
        lookup = is_op(nodes[0], "Gather")  # of a shared weight all or none: SelectLayers sees to it
        W = tensor.numpy().T if lookup else tensor.numpy()
        q = get_solver(self.solver)(W, name=name, threads=self.threads)
        relative_error = _relative_error(W, q)
        sqnr_db = -10 * float(np.log10(relative_error)) if relative_error else float("inf")
        parts = _initializers(graph, name, q, turned=lookup)
        for node in nodes:
            lowbit = ir.node(
                (LOOKUPS if lookup else OPERATORS)[q.format],
                [node.inputs[1 if lookup else 0], *parts],
                domain=DOMAIN,
                name=node.name,
                doc_string=node.doc_string,
            )
            replace_node(node, [lowbit])
            lowbit.metadata_props.update(
                {
                    "qgraph.scheme": self.scheme.name,
                    "qgraph.bits_per_weight": f"{q.bits_per_weight():.4f}",
                    "qgraph.sqnr_db": f"{sqnr_db:.2f}",
                    "qgraph.source_weight": name,
                }
            )
        if not weight.uses() and not weight.is_graph_output():
            del graph.initializers[name]
        return QuantizedWeight(
            weight=name,
            nodes=tuple(str(node.name) for node in nodes),
            shape=q.shape[::-1] if lookup else q.shape,
            relative_error=relative_error,
            sqnr_db=sqnr_db,
            bits_per_weight=q.bits_per_weight(),
            nbytes=q.nbytes(),
            original_nbytes=W.nbytes,
        )


def _chosen(model: ir.Model) -> list[ir.Node]:
    """The nodes that `SelectLayers` chose and that are still there."""
    return [n for n in model.graph.all_nodes() if DECISION in n.meta and n.meta[DECISION].quantize]


def _initializers(graph: ir.Graph, name: str, q: QTensor, turned: bool) -> list[ir.Value]:
    """The stored parts of `q`, or of its transpose, registered as `<name>.codes`, `<name>.block_scale` and
    `<name>.global_scale`."""
    codes, block_scale = q.codes, q.block_scale
    if turned:
        codes, block_scale = codes.T, np.ascontiguousarray(block_scale.T)
    tensors = [
        ir.PackedTensor(pack_nibbles(codes), ir.DataType.FLOAT4E2M1, shape=codes.shape, name=f"{name}.codes"),
        ir.Tensor(block_scale, dtype=ir.DataType.FLOAT8E4M3FN, name=f"{name}.block_scale"),
        ir.Tensor(np.array(q.global_scale), dtype=ir.DataType.FLOAT, name=f"{name}.global_scale"),
    ]
    taken = (
        {v.name for node in graph for v in node.outputs}
        | {v.name for v in graph.inputs}
        | set(graph.initializers)
    )
    values = []
    for tensor in tensors:
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


def _relative_error(W: np.ndarray, q: QTensor) -> float:
    """|W - W'|^2 / |W|^2 in float64, by rows so that no float64 copy of W is made; 0 for a zero weight."""
    back = q.dequantize()
    np.subtract(W, back, out=back)
    noise = sum(float(np.square(row, dtype=np.float64).sum()) for row in back)
    signal = sum(float(np.square(row, dtype=np.float64).sum()) for row in W)
    return noise / signal if signal else 0.0
