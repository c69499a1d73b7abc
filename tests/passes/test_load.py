"""Files that are damaged, hostile or laid out strangely. Each refusal is one line, quickly."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from prepare_harness import parse_proto

from qgraph.errors import InputError, QGraphError, ResourceError, UnsupportedError
from qgraph.passes import load_model

SIMPLE = "(float[n,4] x) => (float[n,4] y) { h = MatMul(x, w) y = Relu(h) }"
W = np.arange(16, dtype=np.float32).reshape(4, 4)


def simple(**changes: str) -> onnx.ModelProto:
    return parse_proto(SIMPLE, w=W)


def save(tmp_path: Path, proto: onnx.ModelProto, name: str = "model.onnx") -> Path:
    path = tmp_path / name
    path.write_bytes(proto.SerializeToString())
    return path


def refused(path: Path, kind: type[QGraphError] = InputError) -> str:
    start = time.monotonic()
    with pytest.raises(QGraphError) as caught:
        load_model(path)
    assert type(caught.value) is kind
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert message.isprintable(), message
    assert path.name in message
    return message


def test_loads(tmp_path: Path) -> None:
    model = load_model(save(tmp_path, simple()))
    assert [n.op_type for n in model.graph] == ["MatMul", "Relu"]
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), W)


# -- the file itself ----------------------------------------------------------------------------------------


def test_missing(tmp_path: Path) -> None:
    assert refused(tmp_path / "no.onnx").endswith("no such file")


def test_directory(tmp_path: Path) -> None:
    assert "not a file" in refused(tmp_path)


def test_empty(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"")
    assert "empty" in refused(tmp_path / "a.onnx")


def test_below_a_file(tmp_path: Path) -> None:
    refused(save(tmp_path, simple()) / "below.onnx")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable(tmp_path: Path) -> None:
    path = save(tmp_path, simple())
    path.chmod(0)
    refused(path, ResourceError)


@pytest.mark.parametrize(
    "data", [b"hello, this is text\n" * 20, b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(1000)]
)
def test_not_onnx(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.onnx").write_bytes(data)
    refused(tmp_path / "a.onnx")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    """Any proper prefix is refused, by the parser or by what is missing then."""
    data = simple().SerializeToString()
    path = tmp_path / "a.onnx"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(QGraphError):
            load_model(path)


def test_random_damage_never_crashes(tmp_path: Path) -> None:
    """A changed byte gives a model or a QGraphError, nothing else."""
    data = simple().SerializeToString()
    rng = np.random.default_rng(0)
    path = tmp_path / "a.onnx"
    for _ in range(400):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            load_model(path)
        except QGraphError as error:
            assert str(error).isprintable()


# -- the graph ----------------------------------------------------------------------------------------------


def graph_of(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("y",), **extra) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        list(nodes),
        "g",
        [info("x", onnx.TensorProto.FLOAT, ["n", 4])],
        [info(o, onnx.TensorProto.FLOAT, None) for o in outputs],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 23)], **extra)


node = helper.make_node


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("Relu", ["y"], ["a"]), node("Relu", ["a"], ["y"])], "cycle"),
        ([node("Relu", ["x"], ["y"]), node("Neg", ["x"], ["y"])], "defined twice"),
        ([node("Relu", ["x"], ["x"])], "defined twice"),
        ([node("Relu", ["zz"], ["y"])], "reads 'zz', which nothing defines"),
        ([node("Relu", ["x"], ["a"])], "output 'y' of graph 'g' is not computed"),
        ([node("Relu", ["x", "x"], ["y"])], "has 2 inputs; the operator takes 1 to 1"),
        ([node("Relu", ["x"], ["y", "z"])], "has 2 outputs"),
        ([node("Concat", ["x", "x"], ["y"])], "lacks its attribute 'axis'"),
        ([node("Concat", ["x", "x"], ["y"], axis="one")], "attribute 'axis' has the wrong type"),
        ([node("Relu", ["x"], ["y"], colour=1)], "unknown attribute 'colour'"),
    ],
)
def test_wrong_graphs(tmp_path: Path, nodes: list, message: str) -> None:
    assert message in refused(save(tmp_path, graph_of(*nodes)))


def test_unsorted_graphs_are_sorted(tmp_path: Path) -> None:
    proto = graph_of(node("Relu", ["a"], ["y"]), node("Neg", ["x"], ["a"]))
    assert [n.op_type for n in load_model(save(tmp_path, proto)).graph] == ["Neg", "Relu"]


def test_terminal_sequences_in_names_are_escaped(tmp_path: Path) -> None:
    message = refused(save(tmp_path, graph_of(node("Relu", ["\x1b[31mred\x00"], ["y"]))))
    assert "\\x1b[31mred\\x00" in message


def test_long_names_are_cut(tmp_path: Path) -> None:
    assert len(refused(save(tmp_path, graph_of(node("Relu", ["z" * 5_000_000], ["y"]))))) < 1000


@pytest.mark.parametrize(("opset", "kind"), [(99, UnsupportedError), (5, UnsupportedError)])
def test_opsets_out_of_range(tmp_path: Path, opset: int, kind: type) -> None:
    proto = simple()
    proto.opset_import[0].version = opset
    assert "opset 23" in refused(save(tmp_path, proto), kind)


def test_no_default_opset(tmp_path: Path) -> None:
    proto = simple()
    proto.opset_import[0].domain = "com.acme"
    assert "imports no opset" in refused(save(tmp_path, proto))


# -- tensors ------------------------------------------------------------------------------------------------


def test_short_and_long_tensors(tmp_path: Path) -> None:
    for size in (60, 68, 0):
        proto = simple()
        proto.graph.initializer[0].raw_data = bytes(size)
        assert "tensor 'w' of shape [4, 4] needs 64 items" in refused(save(tmp_path, proto))


def test_overflowing_dimensions(tmp_path: Path) -> None:
    proto = simple()
    proto.graph.initializer[0].dims[:] = [2**62, 2**62]
    refused(save(tmp_path, proto))
    proto.graph.initializer[0].dims[:] = [-4, -4]
    assert "negative" in refused(save(tmp_path, proto))


def test_unknown_type(tmp_path: Path) -> None:
    proto = simple()
    proto.graph.initializer[0].data_type = 99
    assert "unknown data type" in refused(save(tmp_path, proto))


def test_duplicate_initializers(tmp_path: Path) -> None:
    proto = simple()
    proto.graph.initializer.append(proto.graph.initializer[0])
    assert "defined twice" in refused(save(tmp_path, proto))


def test_sparse_initializers(tmp_path: Path) -> None:
    proto = simple()
    proto.graph.sparse_initializer.add().dims[:] = [4, 4]
    assert "sparse" in refused(save(tmp_path, proto), UnsupportedError)


# -- functions ----------------------------------------------------------------------------------------------


def function(name: str, *nodes: onnx.NodeProto) -> onnx.FunctionProto:
    return helper.make_function(
        "f", name, ["x"], ["y"], list(nodes), [helper.make_opsetid("", 23), helper.make_opsetid("f", 1)]
    )


def with_functions(*functions: onnx.FunctionProto) -> onnx.ModelProto:
    proto = graph_of(node("f0", ["x"], ["y"], domain="f"), functions=list(functions))
    proto.opset_import.append(helper.make_opsetid("f", 1))
    return proto


def test_function_bomb(tmp_path: Path) -> None:
    """64 functions, each calling the next twice: 2^64 nodes in 4 kB."""
    last = 64
    functions = [
        function(
            f"f{i}", node(f"f{i + 1}", ["x"], ["a"], domain="f"), node(f"f{i + 1}", ["a"], ["y"], domain="f")
        )
        for i in range(last)
    ]
    functions.append(function(f"f{last}", node("Relu", ["x"], ["y"])))
    start = time.monotonic()
    assert "more than 1000000 nodes" in refused(save(tmp_path, with_functions(*functions)))
    assert time.monotonic() - start < 1


def test_deep_but_small_functions_are_fine(tmp_path: Path) -> None:
    functions = [function(f"f{i}", node(f"f{i + 1}", ["x"], ["y"], domain="f")) for i in range(3000)]
    functions.append(function("f3000", node("Relu", ["x"], ["y"])))
    assert len(load_model(save(tmp_path, with_functions(*functions))).functions) == 3001


def test_recursion(tmp_path: Path) -> None:
    itself = function("f0", node("f0", ["x"], ["y"], domain="f"))
    assert "calls itself" in refused(save(tmp_path, with_functions(itself)))
    pair = [function(f"f{i}", node(f"f{1 - i}", ["x"], ["y"], domain="f")) for i in (0, 1)]
    assert "calls itself" in refused(save(tmp_path, with_functions(*pair)))


# -- external data ------------------------------------------------------------------------------------------


def external(
    tmp_path: Path, location: str = "w.bin", offset: int = 0, length: int = 64, **entries: str
) -> Path:
    proto = simple()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    pairs = {"location": location, "offset": str(offset), "length": str(length), **entries}
    for key, value in pairs.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    return save(folder, proto)


def weights(folder: Path, name: str = "w.bin", extra: bytes = b"") -> Path:
    (folder / name).write_bytes(W.tobytes() + extra)
    return folder / name


def holds_weights(path: Path) -> None:
    np.testing.assert_array_equal(load_model(path).graph.initializers["w"].const_value.numpy(), W)


def test_external_data(tmp_path: Path) -> None:
    path = external(tmp_path)
    weights(path.parent)
    holds_weights(path)


def test_external_data_in_a_folder(tmp_path: Path) -> None:
    path = external(tmp_path, "parts/w.bin")
    (path.parent / "parts").mkdir()
    weights(path.parent / "parts")
    holds_weights(path)


def test_hugging_face_cache_layout(tmp_path: Path) -> None:
    """snapshots/<id>/model.onnx and its data are links into blobs/."""
    path = external(tmp_path)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    path.rename(blobs / "0123")
    weights(blobs, "4567")
    (snapshot / "model.onnx").symlink_to(Path("../../blobs/0123"))
    (snapshot / "w.bin").symlink_to(Path("../../blobs/4567"))
    holds_weights(snapshot / "model.onnx")


@pytest.mark.parametrize(
    "location",
    [
        "../secret",
        "/etc/hostname",
        "a/../../secret",
        "..\\secret",
        "C:\\secret",
        "\\\\host\\secret",
        "",
        "w\0.bin",
        ".",
    ],
)
def test_paths_that_leave_the_folder(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(W.tobytes())
    refused(external(tmp_path, location))


def test_link_that_leaves_the_folder(tmp_path: Path) -> None:
    path = external(tmp_path)
    secret = weights(tmp_path, "secret")
    (path.parent / "w.bin").symlink_to(secret)
    assert "outside the model's directory" in refused(path)


def test_link_to_a_folder_that_leaves(tmp_path: Path) -> None:
    path = external(tmp_path, "in/w.bin")
    (tmp_path / "out").mkdir()
    weights(tmp_path / "out")
    (path.parent / "in").symlink_to(tmp_path / "out")
    assert "outside the model's directory" in refused(path)


def test_hard_link(tmp_path: Path) -> None:
    path = external(tmp_path)
    os.link(weights(tmp_path, "secret"), path.parent / "w.bin")
    assert "hard link" in refused(path)


def test_device_and_folder(tmp_path: Path) -> None:
    path = external(tmp_path)
    os.mkfifo(path.parent / "w.bin")
    assert "not a regular file" in refused(path)
    (path.parent / "w.bin").unlink()
    (path.parent / "w.bin").mkdir()
    assert "not a regular file" in refused(path)


def test_missing_data(tmp_path: Path) -> None:
    assert "is missing" in refused(external(tmp_path))


@pytest.mark.parametrize(("offset", "length"), [(4, 64), (-64, 64), (0, 60), (0, 68), (2**62, 64), (0, -1)])
def test_wrong_extents(tmp_path: Path, offset: int, length: int) -> None:
    path = external(tmp_path, offset=offset, length=length)
    weights(path.parent)
    assert "64 bytes of shape [4, 4]" in refused(path)


def test_malformed_entries(tmp_path: Path) -> None:
    path = external(tmp_path, offset="many")  # type: ignore[arg-type]
    weights(path.parent)
    assert "malformed" in refused(path)
    path = external(tmp_path, basepath="/etc")
    assert "unknown key 'basepath'" in refused(path)


def test_external_tensor_in_an_attribute(tmp_path: Path) -> None:
    proto = graph_of(
        node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(W, "c")),
        node("Add", ["x", "c"], ["y"]),
    )
    tensor = proto.graph.node[0].attribute[0].t
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../secret"
    (tmp_path / "m").mkdir()
    refused(save(tmp_path / "m", proto))
    entry.value = "w.bin"
    weights(tmp_path / "m")
    model = load_model(save(tmp_path / "m", proto))
    value = model.graph[0].attributes["value"].as_tensor()
    assert isinstance(value, ir.ExternalTensor)
    np.testing.assert_array_equal(value.numpy(), W)


# -- tensors in strange fields -----------------------------------------------------------------------------


def with_weight(tensor: onnx.TensorProto) -> onnx.ModelProto:
    proto = parse_proto(SIMPLE, w=W)
    proto.graph.initializer[0].CopyFrom(tensor)
    return proto


def test_floats_stored_as_integers(tmp_path: Path) -> None:
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4, 4], int64_data=[1] * 16)
    assert "tensor 'w' is FLOAT but has data in 'int64_data'" in refused(save(tmp_path, with_weight(tensor)))


def test_data_twice(tmp_path: Path) -> None:
    tensor = onnx.numpy_helper.from_array(W, "w")
    tensor.float_data.extend([1.0] * 16)
    assert "has data in 'float_data'" in refused(save(tmp_path, with_weight(tensor)))


def test_strings(tmp_path: Path) -> None:
    tensor = helper.make_tensor("w", onnx.TensorProto.STRING, [1], [b"a"])
    assert "tensor 'w' holds strings" in refused(save(tmp_path, with_weight(tensor)), UnsupportedError)


@pytest.mark.parametrize(
    "kind", ["FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "INT8", "UINT8", "INT32", "INT64", "UINT64", "BOOL"]
)
def test_typed_fields_load(tmp_path: Path, kind: str) -> None:
    tensor = helper.make_tensor("w", getattr(onnx.TensorProto, kind), [2, 8], [0, 1] * 8)
    assert not tensor.HasField("raw_data")
    model = load_model(save(tmp_path, with_weight(tensor)))
    np.testing.assert_array_equal(
        model.graph.initializers["w"].const_value.numpy().astype(int), np.tile([0, 1], (2, 4))
    )
