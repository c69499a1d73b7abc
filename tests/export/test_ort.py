"""`--export ort`: files that ONNX Runtime runs with our kernels, from Python and from C++."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from lowbit_models import relative_error
from onnx import TensorProto, helper, numpy_helper

import qgraph
from qgraph.errors import InputError, UsageError
from qgraph.evaluate.runners import OnnxRuntimeRunner, ReferenceRunner, open_runner
from qgraph.runtime.build import ROOT, find_compiler, ort_library

HERE = Path(__file__).parent
QUICK: dict[str, Any] = {"include": ("*",), "verify": False, "export": ("ort",)}
# What is around the weights differs: a global scale, means, zero points. The formats are tested in codegen.
WEIGHTS = ["nvfp4", "ternary", "int4"]


def model_of(K: int, N: int, shape: list[str | int], table: int = 0) -> onnx.ModelProto:
    """y = x W + b, or with a table of so many rows y = table[ids] W + b."""
    rng = np.random.default_rng(K * 1000 + N)
    arrays = {
        "W": rng.standard_normal((K, N)).astype(np.float32),
        "b": rng.standard_normal(N).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["p"], "linear"),
        helper.make_node("Add", ["p", "b"], ["y"], "bias"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*shape, K])]
    if table:
        arrays["table"] = rng.standard_normal((table, K)).astype(np.float32)
        nodes.insert(0, helper.make_node("Gather", ["table", "ids"], ["x"], "lookup"))
        inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, shape)]
    graph = helper.make_graph(
        nodes,
        "one",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*shape, N])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def exported(folder: Path, model: onnx.ModelProto, **options: Any) -> qgraph.pipeline.CompileResult:
    onnx.save(model, folder / "model.onnx")
    return qgraph.compile(folder / "model.onnx", **(QUICK | options))


def run_in_ort(path: Path) -> OnnxRuntimeRunner:
    return OnnxRuntimeRunner(path, kernels=True)


def session(path: Path, threads: int = 1) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(ort_library()))
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


# ---- numbers: against ONNX's reference evaluator on the low-bit file


@pytest.mark.parametrize("scheme", WEIGHTS)
def test_weights_of_every_format(scheme: str, tmp_path: Path) -> None:
    result = exported(tmp_path, model_of(200, 33, ["batch", "sequence"]), scheme=scheme)
    runner = run_in_ort(result.exports["ort"])
    for shape in ((1, 1), (1, 9), (3, 11)):
        x = np.random.default_rng(1).standard_normal((*shape, 200)).astype(np.float32)
        want = ReferenceRunner(result.onnx).run({"x": x})["y"]
        assert relative_error(runner.run({"x": x})["y"], want) < 1e-5, shape


def test_activations_in_int8(tmp_path: Path) -> None:
    """The rounding is a part of the product's artifact, and no node of its own."""
    result = exported(tmp_path, model_of(200, 33, ["rows"]), scheme="int4-w4a8")
    nodes = onnx.load(result.exports["ort"]).graph.node
    assert [node.op_type for node in nodes if node.domain] == ["QLinearInt4"]
    x = np.random.default_rng(1).standard_normal((19, 200)).astype(np.float32)
    want = ReferenceRunner(result.onnx).run({"x": x})["y"]
    assert relative_error(run_in_ort(result.exports["ort"]).run({"x": x})["y"], want) < 1e-5


def test_activations_in_nvfp4(tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((19, 40)).astype(np.float32)
    result = exported(tmp_path, model_of(40, 33, ["rows"]), scheme="nvfp4-w4a4", calibration=[{"x": x}])
    want = ReferenceRunner(result.onnx).run({"x": x})["y"]
    assert relative_error(run_in_ort(result.exports["ort"]).run({"x": x})["y"], want) < 1e-5


def test_lookups(tmp_path: Path) -> None:
    model = model_of(48, 40, ["batch", "sequence"], table=100)
    result = exported(tmp_path, model, scheme="nvfp4", embeddings="nvfp4")
    assert {n.op_type for n in onnx.load(result.exports["ort"]).graph.node if n.domain} == {
        "QLinearNVFP4",
        "QGatherNVFP4",
    }
    runner = run_in_ort(result.exports["ort"])
    ids = np.random.default_rng(0).integers(-100, 100, (3, 7))
    want = ReferenceRunner(result.onnx).run({"ids": ids})["y"]
    assert relative_error(runner.run({"ids": ids})["y"], want) < 1e-5
    with pytest.raises(Exception, match=r"qgraph: node 'lookup': .*out of range"):
        runner.run({"ids": np.array([[100]])})


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(["batch", "sequence"], TensorProto.INT64), ([2], TensorProto.INT32), ([], TensorProto.INT64)],
)
def test_a_tied_embedding(shape: list[str | int], dtype: int, tmp_path: Path) -> None:
    """Columns of the layer's weight, looked up as rows: nothing is turned on the way to the layer."""
    model = model_of(48, 100, shape, table=100)
    graph = model.graph
    graph.input[0].type.tensor_type.elem_type = dtype
    del graph.initializer[:2]
    graph.node[1].CopyFrom(helper.make_node("Transpose", ["table"], ["W"], "turn", perm=[1, 0]))
    graph.node[2].CopyFrom(helper.make_node("MatMul", ["x", "W"], ["y"], "linear"))
    result = exported(tmp_path, model, scheme="int4")
    assert [node.op_type for node in onnx.load(result.exports["ort"]).graph.node] == [
        "QGatherColumnsInt8",
        "QLinearInt8",
    ]
    ids = np.random.default_rng(0).integers(-100, 100, [2, 3][: len(shape)])
    feeds = {"ids": ids.astype(helper.tensor_dtype_to_np_dtype(dtype))}
    want = ReferenceRunner(result.onnx).run(feeds)["y"]
    assert relative_error(run_in_ort(result.exports["ort"]).run(feeds)["y"], want) < 1e-5


def test_columns_that_somebody_wants_as_such(tmp_path: Path) -> None:
    from lowbit_models import export_to, lookup_model, random_weight

    from qgraph.passes.save import save_lowbit

    q = random_weight("ternary", 40, 33)
    save_lowbit(lookup_model(q, columns=True), tmp_path / "lowbit.onnx")
    export_to(tmp_path / "ort.onnx", "ort", lookup_model(q, columns=True))
    ids = {"ids": np.random.default_rng(0).integers(0, 33, (2, 5))}
    got = run_in_ort(tmp_path / "ort.onnx").run(ids)["rows"]
    assert relative_error(got, ReferenceRunner(tmp_path / "lowbit.onnx").run(ids)["rows"]) < 1e-6


@pytest.mark.parametrize("taken", ["x", "b", "y"])
def test_a_name_that_an_artifact_would_have(taken: str, tmp_path: Path) -> None:
    model = model_of(48, 40, ["rows"])
    text = model.SerializeToString()
    graph, name = model.graph, "linear.artifact"
    for item in [*graph.input, *graph.output, *graph.initializer]:
        item.name = name if item.name == taken else item.name
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [name if each == taken else each for each in names]
    assert model.SerializeToString() != text
    # A bias that is no layer's own stays an initializer.
    graph.node[1].op_type = "Mul"
    result = exported(tmp_path, model, scheme="int4")
    x = np.random.default_rng(1).standard_normal((3, 48)).astype(np.float32)
    feeds = {graph.input[0].name: x}
    (want,) = ReferenceRunner(result.onnx).run(feeds).values()
    got = run_in_ort(result.exports["ort"]).run(feeds)[graph.output[0].name]
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("options", [{}, {"kv_cache": "int8"}])
def test_a_decoder_with_its_cache(options: dict[str, Any], tmp_path: Path) -> None:
    """A prompt and a step behind it. What is rounded on the way may turn out another way round: of that,
    the reference gets what ONNX Runtime has."""
    from tiny_decoder import tiny_decoder

    result = exported(tmp_path, tiny_decoder(cache=True), **({"scheme": "ternary"} | options))
    limit = 0.05 if options else 1e-5
    runners = [run_in_ort(result.exports["ort"]), ReferenceRunner(result.onnx)]
    rng = np.random.default_rng(0)
    past = {
        spec.name: np.zeros((2, 2, 0, 32), np.float32)
        for spec in runners[0].specs
        if spec.name.startswith("past")
    }
    for held, new in ((0, 6), (6, 1)):
        feeds = {
            "input_ids": rng.integers(0, 61, (2, new)),
            "attention_mask": np.ones((2, held + new), np.int64),
            "position_ids": np.broadcast_to(np.arange(held, held + new), (2, new)),
            **past,
        }
        got, want = (runner.run(feeds) for runner in runners)
        assert relative_error(got["logits"], want["logits"]) < limit
        past = {name: got[name.replace("past_key_values", "present")] for name in past}


def test_shapes_that_are_empty_or_scalar(tmp_path: Path) -> None:
    result = exported(tmp_path, model_of(32, 8, ["batch", "sequence"]), scheme="nvfp4")
    got = session(result.exports["ort"]).run(None, {"x": np.zeros((2, 0, 32), np.float32)})
    assert got[0].shape == (2, 0, 8)


def test_compute_is_that_of_the_artifact(tmp_path: Path) -> None:
    """With digits: the same bits as the runtime's own."""
    result = exported(tmp_path, model_of(512, 64, ["rows"]), scheme="nvfp4", compute="int8")
    x = np.random.default_rng(1).standard_normal((40, 512)).astype(np.float32)
    got = run_in_ort(result.exports["ort"]).run({"x": x})["y"]
    assert relative_error(got, result.load().run({"x": x})["y"]) < 1e-6
    assert relative_error(got, ReferenceRunner(result.onnx).run({"x": x})["y"]) > 1e-5


@pytest.mark.parametrize(
    "options", [{"scheme": "nvfp4", "compute": "int8"}, {"scheme": "ternary", "packing": "small"}]
)
def test_what_is_for_some_nodes_alone(tmp_path: Path, options: dict[str, str]) -> None:
    """Nodes are compiled one by one; of these a lookup knows neither digits nor packings."""
    model = model_of(256, 33, ["batch", "sequence"], table=50)
    result = exported(tmp_path, model, embeddings="nvfp4", **options)
    ids = np.random.default_rng(1).integers(0, 50, (2, 7))
    want = result.load().run({"ids": ids})["y"]
    assert relative_error(run_in_ort(result.exports["ort"]).run({"ids": ids})["y"], want) < 1e-5


def test_equal_layers_are_stored_once(tmp_path: Path) -> None:
    """Three products by one weight, the last with a bias."""
    model = model_of(64, 64, ["rows"])
    linear = model.graph.node[0]
    linear.output[0] = "p0"
    for i in (1, 2):
        name = "p" if i == 2 else f"p{i}"
        model.graph.node.insert(i, helper.make_node("MatMul", [f"p{i - 1}", "W"], [name], f"again{i}"))
    result = exported(tmp_path, model, scheme="int8")
    graph = onnx.load(result.exports["ort"]).graph
    artifacts = [node.input[1] for node in graph.node]
    assert {node.op_type for node in graph.node} == {"QLinearInt8"} and len(graph.node) == 3
    assert artifacts[0] == artifacts[1] != artifacts[2]
    assert {t.name for t in graph.initializer} == set(artifacts)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    want = ReferenceRunner(result.onnx).run({"x": x})["y"]
    assert relative_error(run_in_ort(result.exports["ort"]).run({"x": x})["y"], want) < 1e-5


def test_activations_are_part_of_a_layer_where_nothing_else_reads_it(tmp_path: Path) -> None:
    model = model_of(64, 48, ["rows"])
    model.graph.node[1].output[0] = "b1"
    gelu = helper.make_node("Gelu", ["b1"], ["g"], "gelu", approximate="tanh")
    twice = helper.make_node("Add", ["g", "b1"], ["y"], "both")
    model.graph.node.extend([gelu, twice])
    result = exported(tmp_path, model, scheme="int8")
    kinds = [node.op_type for node in onnx.load(result.exports["ort"]).graph.node]
    assert kinds == ["QLinearInt8", "Gelu", "Add"]
    del model.graph.node[-1]
    model.graph.node[-1].output[0] = "y"
    result = exported(tmp_path, model, scheme="int8")
    assert [node.op_type for node in onnx.load(result.exports["ort"]).graph.node] == ["QLinearInt8"]
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    want = ReferenceRunner(result.onnx).run({"x": x})["y"]
    assert relative_error(run_in_ort(result.exports["ort"]).run({"x": x})["y"], want) < 1e-5


# ---- ONNX Runtime's threads


def test_results_are_the_same_on_any_threads(tmp_path: Path) -> None:
    result = exported(tmp_path, model_of(256, 300, ["rows"]), scheme="nvfp4")
    x = np.random.default_rng(1).standard_normal((1100, 256)).astype(np.float32)
    one, four = (session(result.exports["ort"], threads) for threads in (1, 4))
    want = one.run(None, {"x": x})[0]
    with ThreadPoolExecutor(8) as pool:  # runs of one session at the same time
        for got in pool.map(lambda _: four.run(None, {"x": x})[0], range(100)):
            assert got.tobytes() == want.tobytes()


# ---- what goes wrong


def test_code_in_a_file_is_run_where_that_was_asked_for(tmp_path: Path) -> None:
    """An ONNX file is data to whoever opens it, but for the engine that is for these."""
    result = exported(tmp_path, model_of(32, 8, ["rows"]), scheme="nvfp4")
    path, x = result.exports["ort"], {"x": np.ones((1, 32), np.float32)}
    with pytest.raises(InputError, match=r"not a registered function/op.*; engine 'ort' runs files of"):
        open_runner(path)
    assert open_runner(path, engine="ort").run(x)["y"].shape == (1, 8)


def packed(path: Path, artifact: bytes | None, width: int = 32) -> Path:
    """A file with one packed node; without an artifact that is an input."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", width])]
    initializers = []
    if artifact is None:
        inputs.append(helper.make_tensor_value_info("a", TensorProto.UINT8, ["bytes"]))
    else:
        initializers.append(numpy_helper.from_array(np.frombuffer(artifact, np.uint8), "a"))
    node = helper.make_node("QLinearNVFP4", ["x", "a"], ["y"], "layer", domain="ai.qgraph")
    graph = helper.make_graph(
        [node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], initializers
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("ai.qgraph", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), path)
    return path


def test_errors_name_the_node(tmp_path: Path) -> None:
    result = exported(tmp_path, model_of(32, 8, ["rows"]), scheme="nvfp4")
    (tensor,) = [t for t in onnx.load(result.exports["ort"]).graph.initializer if t.data_type == 2]
    good = numpy_helper.to_array(tensor).tobytes()
    assert session(packed(tmp_path / "good.onnx", good)).run(None, {"x": np.ones((1, 32), np.float32)})
    damaged = bytearray(good)
    damaged[-1] ^= 1
    for name, artifact, message in (
        ("damaged", bytes(damaged), "damaged"),
        ("empty", b"", "is empty"),
        ("input", None, "not an initializer"),
    ):
        with pytest.raises(Exception, match=rf"qgraph: node 'layer': .*{message}"):
            session(packed(tmp_path / f"{name}.onnx", artifact))
    with pytest.raises(Exception, match="qgraph: node 'layer': the last dimension of its input is not 32"):
        session(packed(tmp_path / "wide.onnx", good, 48)).run(None, {"x": np.ones((1, 48), np.float32)})


def test_an_artifact_of_another_form(tmp_path: Path) -> None:
    result = exported(tmp_path, model_of(32, 8, ["rows"], table=50), scheme="nvfp4", export=())
    with pytest.raises(Exception, match="data type that it was compiled for"):
        session(packed(tmp_path / "m.onnx", result.artifact.read_bytes())).run(
            None, {"x": np.ones((1, 32), np.float32)}
        )
    result = exported(tmp_path, model_of(32, 8, ["rows", "columns"]), scheme="nvfp4", export=())
    with pytest.raises(Exception, match="a model of another form: export it anew"):
        session(packed(tmp_path / "m.onnx", result.artifact.read_bytes()))


def test_an_older_onnx_runtime_is_refused() -> None:
    """By a status, which only the function of the first version can make."""
    library = ctypes.CDLL(str(ort_library()))
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    said = []
    function = create(lambda code, message: said.append((code, message)) or 1)
    table = (ctypes.c_void_p * 1)(ctypes.cast(function, ctypes.c_void_p).value)
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda version: ctypes.addressof(table) if version == 1 else None
    )
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p).value, None)
    library.RegisterCustomOps.restype = ctypes.c_void_p
    assert library.RegisterCustomOps(None, base) == 1
    assert said == [(1, b"qgraph: this needs ONNX Runtime 1.17 or later")]


def test_targets_that_load_no_code(tmp_path: Path) -> None:
    onnx.save(model_of(32, 8, ["rows"]), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=r"export 'ort' runs on CPUs: give --target cpu,cuda"):
        qgraph.quantize(tmp_path / "m.onnx", export=("ort",), target="cuda", include=("*",))
    with pytest.raises(UsageError, match="export 'ort' has code to be loaded, and a program on wasm32 loads"):
        qgraph.compile(tmp_path / "m.onnx", export=("ort",), target="wasm32", format="static-lib")


# ---- the library


def test_operators_are_those_of_our_files() -> None:
    from qgraph.passes.lowbit_functions import ROUNDINGS
    from qgraph.passes.lowbit_weights import COLUMNS, LINEARS, LOOKUPS

    source = (ROOT / "ort" / "custom_ops.cc").read_text()
    assert set(re.findall(r'describe\("(\w+)"', source)) == {
        *LINEARS,
        *LOOKUPS,
        *COLUMNS,
        *ROUNDINGS.values(),
    }


def test_the_library_shows_one_function_alone() -> None:
    def run(*command: str | Path) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    shown = run("nm", "-D", "--defined-only", ort_library()).split()
    assert shown[2::3] == ["RegisterCustomOps"]
    system = ("libc.so", "libm.so", "libstdc++.so", "libgcc_s.so", "ld-linux", "linux-vdso")
    needed = [line.split()[0].rsplit("/", 1)[-1] for line in run("ldd", ort_library()).splitlines()]
    assert needed and all(name.startswith(system) for name in needed)


def test_beside_a_library_that_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tmp_path / "libqgraph.so"
    given.touch()
    monkeypatch.setenv("QGRAPH_RUNTIME_LIBRARY", str(given))
    with pytest.raises(qgraph.QGraphError, match=r"there is no .*libqgraph_ort\.so"):
        ort_library()
    (tmp_path / "libqgraph_ort.so").touch()
    assert ort_library() == tmp_path / "libqgraph_ort.so"


def test_from_cpp(tmp_path: Path) -> None:
    import onnxruntime

    model = model_of(48, 40, ["batch", "sequence"], table=100)
    result = exported(tmp_path, model, scheme="nvfp4", embeddings="nvfp4")
    program = tmp_path / "program"
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}"]
    subprocess.run([*find_compiler(), *options, HERE / "run_with_ort.cc", "-ldl", "-o", program], check=True)
    (runtime,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*")
    ids = np.array([[3, 1, 4], [1, 5, 9]])
    command = [program, runtime, ort_library(), result.exports["ort"], "2", *map(str, ids.flat)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    want = session(result.exports["ort"]).run(None, {"ids": ids})[0]
    got = np.array(done.stdout.split(), np.float32).reshape(want.shape)
    assert relative_error(got, want) < 1e-6
    command[-1] = "100"
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "qgraph: node 'lookup'" in done.stderr
