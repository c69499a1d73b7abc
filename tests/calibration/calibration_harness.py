"""A toy transformer, a handler that rounds weights coarsely, and statistics the plain way: the whole model at
once, every value an output, sums in float64."""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from qgraph.calibration import Data
from qgraph.passes import prepare_model
from qgraph.passes.linear_groups import LinearGroup, MeanShiftSite, Stage, linear_groups
from qgraph.passes.select_layers import DECISION, SelectLayers
from qgraph.solvers.statistics import Statistics

VOCABULARY, HIDDEN, INNER, HEADS = 50, 32, 64, 2

Array = npt.NDArray


def transformer_proto(layers: int = 2, *, mask: bool = True, tied: bool = False) -> onnx.ModelProto:
    """A post-norm encoder: input_ids [batch, sequence] (and attention_mask) -> y [batch, sequence, HIDDEN].

    tied: all layers share one weight for query, key and value, and one for each other product.
    """
    rng = np.random.default_rng(0)
    weights: dict[str, Array] = {}
    nodes: list[onnx.NodeProto] = []

    def weight(name: str, *shape: int) -> str:
        shared = name.partition(".")[2] if tied and "." in name else name
        if shared not in weights:
            weights[shared] = (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        return shared

    def op(kind: str, *inputs: str, out: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [out], name=f"n_{out}", **attributes))
        return out

    def constant(name: str, value: Array) -> str:
        weights[name] = value
        return name

    norm = [constant("gamma", np.ones(HIDDEN, np.float32)), constant("beta", np.zeros(HIDDEN, np.float32))]
    split = constant("split", np.array([0, 0, HEADS, HIDDEN // HEADS]))
    merge = constant("merge", np.array([0, 0, HIDDEN]))
    root = constant("root", np.array(np.sqrt(HIDDEN / HEADS), np.float32))
    x = op("Gather", weight("table", VOCABULARY, HIDDEN), "input_ids", out="embedded")
    bias = ""
    if mask:
        real = op("Cast", "attention_mask", out="real", to=TensorProto.FLOAT)
        wide = op("Unsqueeze", real, constant("axes", np.array([1, 2])), out="wide")
        bias = op("Mul", op("Sub", wide, constant("one", np.array(1, np.float32)), out="hidden"),
                  constant("large", np.array(1e4, np.float32)), out="bias")  # fmt: skip
    for i in range(layers):
        heads = {}
        for part, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            y = op("MatMul", x, weight(f"{i}.W{part}", HIDDEN, HIDDEN), out=f"{part}{i}")
            y = op("Reshape", y, split, out=f"{part}{i}.split")
            heads[part] = op("Transpose", y, out=f"{part}{i}.heads", perm=order)
        scores = op("Div", op("MatMul", heads["q"], heads["k"], out=f"qk{i}"), root, out=f"scores{i}")
        if mask:
            scores = op("Add", scores, bias, out=f"biased{i}")
        mixed = op("MatMul", op("Softmax", scores, out=f"weights{i}"), heads["v"], out=f"mixed{i}")
        mixed = op("Transpose", mixed, out=f"mixed{i}.tokens", perm=[0, 2, 1, 3])
        attended = op("Reshape", mixed, merge, out=f"attended{i}")
        y = op("MatMul", attended, weight(f"{i}.Wo", HIDDEN, HIDDEN), out=f"o{i}")
        x = op("LayerNormalization", op("Add", x, y, out=f"sum{i}"), *norm, out=f"norm{i}")
        up = op("MatMul", x, weight(f"{i}.Wu", HIDDEN, INNER), out=f"u{i}")
        inner = op("Gelu", up, out=f"inner{i}")
        y = op("MatMul", inner, weight(f"{i}.Wd", INNER, HIDDEN), out=f"d{i}")
        x = op("LayerNormalization", op("Add", x, y, out=f"sum2{i}"), *norm, out=f"norm2{i}")
    op("MatMul", x, weight("Wy", HIDDEN, HIDDEN), out="y")
    shape = ["batch", "sequence"]
    names = ["input_ids", "attention_mask"] if mask else ["input_ids"]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in names],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*shape, HIDDEN])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def transformer(layers: int = 2, *, mask: bool = True, tied: bool = False) -> ir.Model:
    """The same, prepared."""
    return prepared(transformer_proto(layers, mask=mask, tied=tied))


def prepared(proto: onnx.ModelProto) -> ir.Model:
    """The prepared model, its layers selected."""
    model = ir.from_proto(proto)
    prepare_model(model)
    SelectLayers()(model)
    return model


def groups_of(model: ir.Model) -> list[LinearGroup]:
    """The groups of the MatMuls that were selected."""
    chosen = [n for n in model.graph if DECISION in n.meta and n.meta[DECISION].quantize]
    return linear_groups([n for n in chosen if n.op_type == "MatMul"])


def feeds(count: int, length: int = 6, *, mask: bool = True, seed: int = 0) -> list[dict[str, Array]]:
    """Batches of two samples, the second padded where there is a mask."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        one = {"input_ids": rng.integers(0, VOCABULARY, (2, length + i % 3))}
        if mask:
            one["attention_mask"] = np.ones_like(one["input_ids"])
            one["attention_mask"][1, 3 + i % 2 :] = 0
        found.append(one)
    return found


def run_whole(
    model: ir.Model, data: Iterable[Mapping[str, Array]], weights: Mapping[str, Array] | None = None
) -> list[dict[str, Array]]:
    """Every value of the model for each of the feeds, by ONNX Runtime, with some weights replaced."""
    import onnxruntime as ort

    proto = ir.to_proto(model)
    for tensor in proto.graph.initializer:
        if weights and tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    del proto.graph.output[:]
    names = [name for node in proto.graph.node for name in node.output if name]
    types = {v.name: v.dtype for node in model.graph for v in node.outputs}
    for name in names:
        proto.graph.output.append(helper.make_tensor_value_info(name, int(types[name]), None))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options)
    return [{**one, **dict(zip(names, session.run(None, dict(one)), strict=True))} for one in data]


def rows_of(runs: Sequence[Mapping[str, Array]], values: Sequence[str], *, mask: bool = True) -> Array:
    """float64 [tokens, K]: the rows of `values` that are no padding."""
    rows = []
    for run in runs:
        for name in values:
            x = run[name].astype(np.float64)
            if mask and "attention_mask" in run and x.shape[:2] == run["attention_mask"].shape:
                rows.append(x[run["attention_mask"] != 0])
            else:
                rows.append(x.reshape(-1, x.shape[-1]))
    return np.concatenate(rows)


def check(found: Statistics, x: Array, x_float: Array | None = None, amax: Array | None = None) -> None:
    """Statistics against rows x [tokens, K] in float64."""
    scale = np.abs(x).max() ** 2
    assert found.tokens == len(x)
    np.testing.assert_allclose(found.second_moment, x.T @ x / len(x), atol=2e-6 * scale)
    np.testing.assert_array_equal(found.second_moment, found.second_moment.T)
    np.testing.assert_allclose(found.mean, x.mean(axis=0), atol=2e-6 * scale)
    np.testing.assert_allclose(
        found.amax, np.abs(x).max(axis=0) if amax is None else amax, rtol=1e-5, atol=1e-6
    )
    if x_float is None:
        assert found.cross is None
    else:
        assert found.cross is not None
        np.testing.assert_allclose(found.cross, x.T @ (x_float - x) / len(x), atol=2e-6 * scale)


class Coarse:
    """A GroupHandler that rounds weights to eighths, and takes notes. The model is left as it is.

    on_step: hears of every call, as ("solve", i), ("apply", i).
    """

    def __init__(
        self, model: ir.Model, on_step: Callable[[str, int], None] = lambda what, index: None
    ) -> None:
        self.weights = {str(k): v.const_value.numpy() for k, v in model.graph.initializers.items()}
        self.on_step = on_step
        self.solved: dict[tuple[str, ...], Statistics] = {}
        self.applied: list[tuple[str, ...]] = []
        self.records: list[dict[str, Array]] = []

    def solve(self, group: LinearGroup, statistics: Statistics) -> dict[str, Array]:
        self.on_step("solve", len(self.applied))
        self.solved[group.weights] = statistics
        record = {name: np.round(self.weights[name] * 8) / np.float32(8) for name in group.weights}
        # What is recorded depends on every bit of the statistics.
        return {**record, "H": statistics.second_moment, "mean": statistics.mean, "amax": statistics.amax}

    def apply(self, stage: Stage, record: dict[str, Array]) -> dict[str, Array]:
        self.on_step("apply", len(self.applied))
        self.applied.append(stage.weights)
        self.records.append(record)
        if isinstance(stage, MeanShiftSite):
            return {stage.shift: record["shift"]}
        return {name: record[name] for name in stage.weights}

    def coarse(self, groups: Iterable[LinearGroup]) -> dict[str, Array]:
        """The rounded weights of these groups."""
        names = [name for group in groups for name in group.weights]
        return {name: np.round(self.weights[name] * 8) / np.float32(8) for name in names}


def same_statistics(a: Statistics, b: Statistics) -> bool:
    """Bit for bit."""
    arrays = [(s.second_moment, s.mean, s.amax) for s in (a, b)]
    if a.tokens != b.tokens or (a.cross is None) != (b.cross is None):
        return False
    cross = a.cross is None or b.cross is None or np.array_equal(a.cross, b.cross)
    return cross and all(np.array_equal(x, y) for x, y in zip(*arrays, strict=True))


def data_of(model: ir.Model, source: Iterable[Mapping[str, Array]]) -> Data:
    """The feeds as calibration data."""
    from qgraph.calibration import model_inputs, open_data

    return open_data(list(source), model_inputs(model))
