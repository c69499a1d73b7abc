"""Statistics of a walk through the model, against the whole model run the plain way."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from calibration_harness import (
    HIDDEN,
    Coarse,
    check,
    data_of,
    feeds,
    groups_of,
    prepared,
    rows_of,
    run_whole,
    same_statistics,
    transformer,
    transformer_proto,
)

from qgraph.calibration import StreamingCalibrator, channel_amax, collect
from qgraph.errors import InputError, UnsupportedError, UsageError
from qgraph.passes.select_layers import SelectLayers


def walk(model: ir.Model, batches: list, **options: object) -> Coarse:
    handler = Coarse(model)
    options.setdefault("sequential", True)
    StreamingCalibrator(data_of(model, batches), **options).walk(model, groups_of(model), handler)
    return handler


def test_float_statistics() -> None:
    """Of every group, padding left out, as the float model has them; whatever the memory."""
    model, batches = transformer(), feeds(5)
    groups, runs = groups_of(model), run_whole(model, batches)
    assert [len(group.weights) for group in groups] == [3, 1, 1, 1, 3, 1, 1, 1, 1]
    for memory in (1 << 30, 1):
        handler = walk(model, batches, sequential=False, memory=memory)
        assert handler.applied == [group.weights for group in groups]
        for group in groups:
            check(handler.solved[group.weights], rows_of(runs, group.values))


def test_padding_counts_for_nothing() -> None:
    """Other tokens under the mask leave the statistics as they are, and more padding too."""
    model = transformer()
    batches, longer = feeds(3), []
    for one in batches:
        ids = np.where(one["attention_mask"] != 0, one["input_ids"], 7)
        longer.append({
            "input_ids": np.pad(ids, ((0, 0), (0, 4)), constant_values=9),
            "attention_mask": np.pad(one["attention_mask"], ((0, 0), (0, 4))),
        })  # fmt: skip
    a, b = (walk(model, data, sequential=False) for data in (batches, longer))
    for name, statistics in a.solved.items():
        other = b.solved[name]
        assert statistics.tokens == other.tokens == sum(int(one["attention_mask"].sum()) for one in batches)
        np.testing.assert_allclose(statistics.second_moment, other.second_moment, atol=1e-5)


def test_sequential_is_the_modified_model() -> None:
    """Each group is measured with exactly the groups before it quantized."""
    model, batches = transformer(), feeds(4)
    groups, handler = groups_of(model), walk(model, batches)
    for i, group in enumerate(groups):
        runs = run_whole(model, batches, handler.coarse(groups[:i]))
        check(handler.solved[group.weights], rows_of(runs, group.values))
    assert handler.applied == [group.weights for group in groups]


def test_corrected_compares_with_the_float_model() -> None:
    model, batches = transformer(), feeds(4)
    groups, handler = groups_of(model), walk(model, batches, corrected=True)
    floats = run_whole(model, batches)
    for i, group in enumerate(groups):
        x = rows_of(run_whole(model, batches, handler.coarse(groups[:i])), group.values)
        x_float = rows_of(floats, group.values)
        check(handler.solved[group.weights], x, None if i == 0 else x_float)
    assert np.abs(handler.solved[groups[-1].weights].cross).max() > 0.01  # there is something to correct


def coarse_inputs(x: np.ndarray, largest: float) -> np.ndarray:
    step = np.float32(largest / 7)
    return np.round(x / step) * step


@pytest.mark.parametrize("rounding", [None, coarse_inputs])
def test_corrected_compares_residuals_with_the_float_model(rounding) -> None:
    model, batches = transformer(), feeds(4)
    groups = groups_of(model)
    handler, floats = walk(model, batches, corrected=True, rounding=rounding), run_whole(model, batches)
    found = {name for group in groups for name in group.residuals if name}
    assert found == {"embedded", "norm0", "norm20", "norm1"}  # of the attention's and the MLP's outputs
    for i, group in enumerate(groups):
        statistics = handler.solved[group.weights]
        assert set(statistics.residuals) == ({name for name in group.residuals if name} if i else set())
        if rounding is not None:
            continue  # what goes in is rounded there: not for this reference
        now = run_whole(model, batches, handler.coarse(groups[:i]))
        x = rows_of(now, group.values)
        for name, moment in statistics.residuals.items():
            wanted = x.T @ (rows_of(floats, [name]) - rows_of(now, [name])) / len(x)
            np.testing.assert_allclose(moment, wanted, atol=1e-5)
    moments = [m for s in handler.solved.values() for name, m in s.residuals.items() if name != "embedded"]
    assert moments and all(np.abs(moment).max() > 0.001 for moment in moments)


def test_rounded_inputs_of_the_float_model() -> None:
    model, batches = transformer(), feeds(4)
    handler, runs = walk(model, batches, sequential=False, rounding=coarse_inputs), run_whole(model, batches)
    for group in groups_of(model):
        x = rows_of(runs, group.values)
        amax = np.abs(x).max(axis=0)
        rounded = coarse_inputs(x.astype(np.float32), float(np.float32(amax.max()))).astype(np.float64)
        check(handler.solved[group.weights], rounded, x, amax)


@pytest.mark.parametrize("corrected", [False, True])
def test_rounded_inputs_are_what_later_layers_see(corrected: bool) -> None:
    """As if every layer before read its input through a rounding."""
    model, batches = transformer(), feeds(4)
    groups = groups_of(model)
    handler = walk(model, batches, rounding=coarse_inputs, corrected=corrected)
    floats, steps = run_whole(model, batches), {}
    for i, group in enumerate(groups):
        runs = run_whole(with_roundings(model, groups[:i], steps), batches, handler.coarse(groups[:i]))
        x = rows_of(runs, group.values)
        amax = np.abs(x).max(axis=0)
        largest = handler.solved[group.weights].largest
        assert largest == pytest.approx(amax.max(), rel=1e-5)
        steps[group.weights] = np.float32(largest / 7)
        rounded = coarse_inputs(x.astype(np.float32), largest).astype(np.float64)
        # A value within rounding of a tie may fall to the other side: nearly all rows are the same.
        found = handler.solved[group.weights]
        reference = rows_of(floats, group.values) if corrected and i else x
        np.testing.assert_allclose(found.second_moment, rounded.T @ rounded / len(x), atol=2e-2)
        np.testing.assert_allclose(found.cross, rounded.T @ (reference - rounded) / len(x), atol=2e-2)
        np.testing.assert_allclose(found.amax, amax, rtol=1e-4, atol=1e-5)


def with_roundings(model: ir.Model, groups: list, steps: dict) -> ir.Model:
    """The model with Round(x / step) * step before the layers of these groups."""
    proto = ir.to_proto(model)
    nodes, step_of = [], {name: (group, steps[group.weights]) for group in groups for name in group.nodes}
    for node in proto.graph.node:
        if node.name in step_of:
            step, out = f"{node.name}.step", f"{node.name}.in"
            proto.graph.initializer.append(onnx.numpy_helper.from_array(step_of[node.name][1], step))
            for kind, inputs, result in (
                ("Div", [node.input[0], step], f"{out}.a"),
                ("Round", [f"{out}.a"], f"{out}.b"),
                ("Mul", [f"{out}.b", step], out),
            ):
                nodes.append(onnx.helper.make_node(kind, inputs, [result], name=result))
            node.input[0] = out
        nodes.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    changed = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for node in changed.graph:
        for value in node.outputs:
            value.dtype = value.dtype or ir.DataType.FLOAT
    return changed


def test_layers_that_share_a_weight() -> None:
    """Their values are measured together; later groups see all of them quantized, from the first layer on."""
    model, batches = transformer(3, tied=True), feeds(3)
    groups = groups_of(model)
    assert max(len(group.values) for group in groups) == 3
    handler, floats = walk(model, batches, corrected=True), run_whole(model, batches)
    for i, group in enumerate(groups):
        x = rows_of(run_whole(model, batches, handler.coarse(groups[:i])), group.values)
        # Rows come batch by batch, within it value by value: the order that rows_of has too.
        check(handler.solved[group.weights], x, None if i == 0 else rows_of(floats, group.values))


def test_readers_of_a_weight_that_stay_float() -> None:
    """A lookup tied to a layer keeps the float table when the layer is quantized, here before another one."""
    proto = transformer_proto(1)
    (gather,) = (node for node in proto.graph.node if node.op_type == "Gather")
    (last,) = (node for node in proto.graph.node if node.output[0] == "q0")
    square = np.random.default_rng(3).standard_normal((HIDDEN, HIDDEN)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(square, "square"))
    gather.input[0] = last.input[1] = "square"
    model, batches = prepared(proto), feeds(3)
    for one in batches:
        one["input_ids"] %= HIDDEN
    SelectLayers(include=["*"], exclude=["n_y"])(model)
    groups, handler = groups_of(model), walk(model, batches)
    assert "square" in {name for group in groups for name in group.weights}
    lookup = next(node for node in model.graph if node.op_type == "Gather")
    assert lookup.inputs[0].name == "square"
    floats = ir.from_proto(ir.to_proto(model))
    table = floats.graph.initializers["square"]
    copy = ir.Value(name="table", shape=table.shape, type=table.type, const_value=table.const_value)
    floats.graph.register_initializer(copy)
    next(node for node in floats.graph if node.op_type == "Gather").replace_input_with(0, copy)
    for i, group in enumerate(groups):
        runs = run_whole(floats, batches, handler.coarse(groups[:i]))
        check(handler.solved[group.weights], rows_of(runs, group.values))


def test_tiny_layers() -> None:
    """A weight that is no larger than a shape is quantized for the layers after it all the same."""
    info = onnx.helper.make_tensor_value_info
    rng = np.random.default_rng(0)
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["x", "A"], ["a"], name="first"),
            onnx.helper.make_node("MatMul", ["a", "B"], ["b"], name="second"),
        ],
        "tiny",
        [info("x", onnx.TensorProto.FLOAT, ["n", 4])],
        [info("b", onnx.TensorProto.FLOAT, ["n", 3])],
        [
            onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
            for name, shape in (("A", (4, 2)), ("B", (2, 3)))
        ],
    )
    opsets = [onnx.helper.make_opsetid("", 23)]
    model = prepared(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11))
    SelectLayers(include=["*"])(model)
    x = rng.standard_normal((9, 4)).astype(np.float32)
    handler = walk(model, [{"x": x}])
    coarse = handler.coarse(groups_of(model)[:1])["A"]
    check(handler.solved[("B",)], (x @ coarse).astype(np.float64))


def test_memory_is_that_of_a_layer() -> None:
    """However many layers there are: at any time the weights of few, float or quantized, are in memory."""
    most = []
    for layers in (3, 9):
        model, alive, peak = transformer(layers), Counter(), Counter()

        def track(array: np.ndarray, alive: Counter = alive, peak: Counter = peak) -> np.ndarray:
            array = array.copy()
            alive["bytes"] += array.nbytes
            peak["bytes"] = max(peak["bytes"], alive["bytes"])
            weakref.finalize(array, alive.subtract, {"bytes": array.nbytes})
            return array

        class Lazy:
            def __init__(self, tensor: ir.TensorProtocol) -> None:
                self.tensor, self.nbytes, self.shape = tensor, tensor.nbytes, tensor.shape
                self.dtype, self.size, self.name = tensor.dtype, tensor.size, tensor.name

            def numpy(self, track=track) -> np.ndarray:
                return track(self.tensor.numpy())

        floats = {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}
        for value in model.graph.initializers.values():
            if value.name != "table":
                value.const_value = Lazy(value.const_value)

        class Handler:
            def solve(self, group, statistics, alive=alive) -> dict:
                assert alive["bytes"] == 0, "a solver has the memory to itself"
                return {}

            def apply(self, group, record, track=track, floats=floats) -> dict:
                return {name: track(floats[name]) for name in group.weights}

        groups = groups_of(model)
        data = data_of(model, feeds(2))
        StreamingCalibrator(data, sequential=True, corrected=True).walk(model, groups, Handler())
        gc.collect()
        most.append(peak["bytes"])
    assert most[0] == most[1] and alive["bytes"] == 0


def test_one_sample() -> None:
    model = transformer()
    one = [{"input_ids": np.array([[3]]), "attention_mask": np.array([[1]])}]
    for options in ({"sequential": False}, {"corrected": True}, {"rounding": coarse_inputs}):
        handler = walk(model, one, **options)
        first = handler.solved[groups_of(model)[0].weights]
        assert first.tokens == 1 and np.linalg.matrix_rank(first.second_moment, tol=1e-6) == 1


def test_dead_channels() -> None:
    """Channels that are always zero have zero rows, columns and maxima."""
    proto = transformer_proto()
    for tensor in proto.graph.initializer:
        if tensor.name == "table":
            table = onnx.numpy_helper.to_array(tensor).copy()
            table[:, [4, 9]] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(table, "table"))
    handler = walk(prepared(proto), feeds(2))
    first = next(iter(handler.solved.values()))
    assert not first.second_moment[[4, 9]].any() and not first.second_moment[:, [4, 9]].any()
    assert not first.amax[[4, 9]].any() and first.amax.any()


@pytest.mark.parametrize("options", [{"sequential": False}, {"corrected": True, "rounding": coarse_inputs}])
def test_threads_change_nothing(options: dict) -> None:
    model, batches = transformer(), feeds(7)
    handlers = [walk(model, batches, threads=threads, **options) for threads in (1, 2, 5)]
    for name, statistics in handlers[0].solved.items():
        assert all(same_statistics(statistics, other.solved[name]) for other in handlers[1:])


def test_the_model_may_change_on_the_way() -> None:
    """What the handler does to the model does not reach a walk that has begun."""
    model, batches = transformer(), feeds(3)
    wanted = walk(model, batches)
    handler, groups = Coarse(model), groups_of(model)

    def spoil(what: str, index: int) -> None:
        if what == "apply":
            for node in model.graph:
                if node.name in groups[index].nodes:
                    node.op_type = "Broken"
            for name in groups[index].weights:
                del model.graph.initializers[name]

    handler.on_step = spoil
    StreamingCalibrator(data_of(model, batches), sequential=True).walk(model, groups, handler)
    assert all(same_statistics(s, handler.solved[name]) for name, s in wanted.solved.items())


@pytest.mark.parametrize("sequential", [False, True])
def test_activations_that_are_not_finite(sequential: bool) -> None:
    """The message names the value and the sample."""
    proto = transformer_proto()
    for tensor in proto.graph.initializer:
        if tensor.name == "table":
            table = onnx.numpy_helper.to_array(tensor).copy()
            table[13] = np.inf
            tensor.CopyFrom(onnx.numpy_helper.from_array(table, "table"))
    model = prepared(proto)
    batches = feeds(3)
    for one in batches:
        one["input_ids"][one["input_ids"] == 13] = 0
    batches[2]["input_ids"][0, 1] = 13
    with pytest.raises(InputError, match="'embedded' is not finite for sample 2 of calibration data"):
        walk(model, batches, sequential=sequential)
    batches[2]["input_ids"][0, 1] = 0
    batches[2]["input_ids"][1, -1] = 13  # padding: the embedding of it does not count; but attention sees it
    with pytest.raises(InputError, match="'attended0' is not finite"):
        walk(model, batches, sequential=sequential)


def test_activations_too_large_to_square() -> None:
    proto = transformer_proto()
    for tensor in proto.graph.initializer:
        if tensor.name == "table":
            table = onnx.numpy_helper.to_array(tensor) * np.float32(1e20)
            tensor.CopyFrom(onnx.numpy_helper.from_array(table, "table"))
    with pytest.raises(InputError, match=r"'embedded' reaches .*beyond float32"):
        walk(prepared(proto), feeds(1))


def test_tokens_outside_the_vocabulary() -> None:
    model, batches = transformer(), feeds(2)
    batches[1]["input_ids"][0, 0] = 1000
    with pytest.raises(InputError, match="sample 1 of calibration data: the model cannot be run"):
        walk(model, batches)


def test_padding_alone_is_no_data() -> None:
    model, batches = transformer(), feeds(1)
    batches[0]["attention_mask"][:] = 0
    with pytest.raises(InputError, match="all is padding"):
        walk(model, batches)


def test_progress_counts_groups() -> None:
    model, heard = transformer(), []
    walk(model, feeds(1), on_group=lambda *step: heard.append(step))
    groups = groups_of(model)
    assert heard == [(i, 9, group.weights[0]) for i, group in enumerate(groups)] + [(9, 9, "")]


def test_options_that_do_not_fit() -> None:
    model = transformer()
    with pytest.raises(UsageError, match="'corrected' goes with 'sequential'"):
        walk(model, feeds(1), sequential=False, corrected=True)


def test_no_groups() -> None:
    model = transformer()
    handler = Coarse(model)
    StreamingCalibrator(data_of(model, feeds(1)), sequential=True).walk(model, [], handler)
    assert not handler.applied


def test_collect() -> None:
    """By default the inputs of all layers that would be chosen; of a model in memory or a file."""
    model, batches = transformer(), feeds(4)
    runs = run_whole(model, batches)
    found = collect(model, batches)
    assert set(found) == {name for group in groups_of(model) for name in group.values}
    for name, statistics in found.items():
        check(statistics, rows_of(runs, [name]))
    some = collect(model, batches, ["norm21", "attended0"], memory=1)
    assert list(some) == ["norm21", "attended0"]
    assert all(same_statistics(some[name], found[name]) for name in some)
    for memory in (1, 1 << 30):
        largest = channel_amax(model, data_of(model, batches), memory=memory)
        assert largest.keys() == found.keys()
        assert all(np.array_equal(largest[name], found[name].amax) for name in found)


def test_collect_from_a_file(tmp_path) -> None:
    onnx.save(transformer_proto(), tmp_path / "toy.onnx")
    found = collect(tmp_path / "toy.onnx", feeds(2), ["embedded"])
    assert found["embedded"].second_moment.shape == (HIDDEN, HIDDEN)


def test_collect_refuses() -> None:
    model = transformer()
    for name, message in (("nothing", "has no value 'nothing'"), ("bias", "cannot be measured at 'bias'")):
        with pytest.raises(UsageError, match=message):
            collect(model, feeds(1), [name])


def test_quantized_embeddings() -> None:
    """A lookup that is low-bit already counts with its dequantized table."""
    from qgraph.passes.quantize_weights import QuantizeWeights

    proto = transformer_proto()
    for tensor in proto.graph.initializer:
        if tensor.name == "table":
            big = np.random.default_rng(5).standard_normal((200, HIDDEN)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(big, "table"))
    model, floats = prepared(proto), prepared(proto)
    SelectLayers(embeddings="nvfp4", exclude=["MatMul"])(model)
    QuantizeWeights("nvfp4", "rtn")(model)
    assert any(node.op_type == "QGatherNVFP4" for node in model.graph)
    readers = {value: len(value.uses()) for node in model.graph for value in node.inputs if value is not None}
    from qgraph.solvers import get_solver

    back = get_solver("rtn")(big.T).dequantize().T
    runs = run_whole(floats, feeds(2), {"table": np.ascontiguousarray(back)})
    found = collect(model, feeds(2), ["embedded", "norm21"])
    for name, statistics in found.items():
        check(statistics, rows_of(runs, [name]))
    assert all(len(value.uses()) == count for value, count in readers.items())  # the model is untouched


def test_quantized_layers_are_refused() -> None:
    from qgraph.passes.quantize_weights import QuantizeWeights

    model = transformer()
    QuantizeWeights("nvfp4", "rtn")(model)
    with pytest.raises(UnsupportedError, match="calibration runs float models"):
        collect(model, feeds(1), ["embedded"])
