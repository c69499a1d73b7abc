"""Cutting a graph: what goes into a segment, and that the cut does not show in any bit."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from calibration_harness import feeds, prepared, run_whole, transformer, transformer_proto
from onnx import TensorProto, helper

from qgraph.calibration.segments import FrozenGraph, leading_dims_match, masked_rows
from qgraph.errors import UnsupportedError


def weights_for(graph: FrozenGraph, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    return {name: graph.weights[name].numpy() for name in names}


def test_a_cut_anywhere_changes_no_bit() -> None:
    """Every value in turn as the end of one segment and the start of the next."""
    model, (one,) = transformer(1), feeds(1)
    graph = FrozenGraph(model)
    whole = graph.segment(graph.producer, set(), "all")
    values = whole.run(one, {}, weights_for(graph, whole.weights))
    for name in graph.producer:
        first = graph.segment([name], set(), name)
        left = first.run(one, {}, weights_for(graph, first.weights))[name]
        assert left.tobytes() == values[name].tobytes()
        _, alive = graph.needed(["y"], {name})
        second = graph.segment(["y"], alive, name)
        if second.session is not None:
            y = second.run(one, {name: left}, weights_for(graph, second.weights))["y"]
            assert y.tobytes() == values["y"].tobytes(), name


def test_the_whole_graph_is_what_onnxruntime_computes() -> None:
    model, (one,) = transformer(2), feeds(1)
    graph = FrozenGraph(model)
    whole = graph.segment(["y"], set(), "all")
    np.testing.assert_allclose(
        whole.run(one, {}, weights_for(graph, whole.weights))["y"], run_whole(model, [one])[0]["y"], atol=1e-5
    )


def test_a_segment_has_but_its_own() -> None:
    """Nodes and weights of other layers are not in it."""
    graph = FrozenGraph(transformer(3))
    segment = graph.segment(["inner1"], {"norm1"}, "up")
    assert segment.weights == ("1.Wu",) and segment.borders == ("norm1",) and segment.feeds == ()
    assert graph.segment(["norm1"], {"norm1"}, "nothing").session is None


def test_ranks() -> None:
    """How many groups a value waits for."""
    graph = FrozenGraph(transformer(2))
    ranks = graph.ranks([["0.Wq", "0.Wk", "0.Wv"], ["0.Wo"], ["0.Wu"]])
    assert [ranks[name] for name in ("embedded", "q0", "attended0", "o0", "norm0", "u0", "y")] == [
        0, 1, 1, 2, 2, 3, 3,
    ]  # fmt: skip


def test_a_later_opset_runs_where_its_operators_are_older() -> None:
    """ONNX Runtime takes opset 26 and IR 13 at most; operators that came later are refused by name."""
    proto = transformer_proto(1)
    proto.opset_import[0].version, proto.ir_version = 28, 14
    model = ir.from_proto(proto)
    shapes = transformer(1)
    for node, other in zip(model.graph, shapes.graph, strict=False):
        for value, known in zip(node.outputs, other.outputs, strict=True):
            value.type, value.shape = known.type, known.shape
    graph = FrozenGraph(model)
    assert graph.segment(["embedded"], set(), "all").session is not None
    next(node for node in model.graph if node.op_type == "Gelu").op_type = "SwiGLU"
    with pytest.raises(UnsupportedError, match=r"SwiGLU\) is as of opset 28"):
        FrozenGraph(model)


def test_subgraphs_are_refused() -> None:
    info = helper.make_tensor_value_info
    x, y, z = (info(name, TensorProto.FLOAT, [2]) for name in "xyz")
    then = helper.make_graph([helper.make_node("Neg", ["x"], ["z"])], "then", [], [z])
    branch = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=then, name="branch")
    graph = helper.make_graph([branch], "g", [info("c", TensorProto.BOOL, []), x], [y])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))
    with pytest.raises(UnsupportedError, match=r"node 'branch' .*without subgraphs"):
        FrozenGraph(model)


def value(*dims: int | str) -> ir.Value:
    return ir.Value(name="v", shape=ir.Shape(dims), type=ir.TensorType(ir.DataType.FLOAT))


@pytest.mark.parametrize(
    ("dims", "mask", "match"),
    [
        (("b", "s", 8), ("b", "s"), True),
        (("b*s", 8), ("b", "s"), True),
        (("s*b", 8), ("b", "s"), True),
        ((2, 6, 8), (2, 6), True),
        ((12, 8), (2, 6), True),
        (("b", "s", 8), ("b", "p + s"), True),  # a mask over a cache too
        (("b", 8), ("b", "s"), False),  # one row a sample
        (("b", 12, 8), ("b", "s"), False),
        (("b", 12, "s", 8), ("b", "s"), False),
        (("s", "s", 8), ("b", "s"), False),
        (("b", "t", 8), ("b", "s"), False),
        ((13, 8), (2, 6), False),
        (("b", "s", 8), ("b", 1, 1, "s"), False),
    ],
)
def test_which_values_a_mask_is_for(dims: tuple, mask: tuple, match: bool) -> None:
    assert leading_dims_match(value(*dims), value(*mask)) is match
    assert not leading_dims_match(value(*dims), None)


def test_masked_rows() -> None:
    x = np.arange(24).reshape(2, 3, 4)
    tokens = np.array([[True, False, True], [False, False, True]])
    assert masked_rows(x, tokens).tolist() == [x[0, 0].tolist(), x[0, 2].tolist(), x[1, 2].tolist()]
    assert masked_rows(x.reshape(6, 4), tokens).tolist() == masked_rows(x, tokens).tolist()
    assert masked_rows(x, None).shape == (6, 4)
    assert masked_rows(x, np.ones((2, 5), bool)).shape == (6, 4)  # covers a cache that is not empty


def test_weights_are_referred_to() -> None:
    """Until a segment asks for one, none is read; one that was replaced in the model is still the old one."""
    model = prepared(transformer_proto(1))
    read = []

    class Watched:
        def __init__(self, tensor: ir.TensorProtocol) -> None:
            self.tensor, self.nbytes = tensor, tensor.nbytes

        def numpy(self) -> np.ndarray:
            read.append(self.tensor.name)
            return self.tensor.numpy()

    graph = FrozenGraph(model)
    graph.weights = {name: Watched(tensor) for name, tensor in graph.weights.items()}
    del model.graph.initializers["0.Wu"]
    segment = graph.segment(["u0"], {"norm0"}, "up")
    assert read == [] and segment.weights == ("0.Wu",)
