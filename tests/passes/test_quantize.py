"""Selecting, quantizing and writing layers: against QTensor, ONNX's checker and its reference evaluator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from qgraph.errors import InputError, UsageError
from qgraph.passes.lowbit_functions import AddLowbitFunctions, InlineLowbitFunctions, lowbit_nodes
from qgraph.passes.quantize_weights import QUANTIZED, QuantizeWeights
from qgraph.passes.save import save_lowbit
from qgraph.passes.select_layers import (
    DECISIONS,
    KEPT,
    LayerDecision,
    Override,
    SelectLayers,
    module_scopes,
)
from qgraph.schemes import SCHEMES
from qgraph.solvers import SOLVERS

RNG = np.random.default_rng(0)
WEIGHT_SOLVERS = [name for name in SCHEMES["nvfp4"].solvers if not SOLVERS[name].calibrated]


def weight(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(text: str, weights: dict[str, np.ndarray], scopes: dict[str, str] | None = None) -> ir.Model:
    """A model from ONNX's text form and initializers; `scopes` are the nodes' module paths."""
    header = '<ir_version: 10, opset_import: ["" : 23]>\n'
    model = ir.from_onnx_text(header + text)
    graph = model.graph
    for name, array in weights.items():
        value = next((i for n in graph for i in n.inputs if i is not None and i.name == name), None)
        assert value is not None, name
        value.const_value = ir.Tensor(array, name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
        if value in graph.inputs:
            graph.inputs.remove(value)
        graph.register_initializer(value)
    for node in graph:
        path = (scopes or {}).get(str(node.name))
        if path:
            parts = path.split(".")
            names = ["", *(".".join(parts[: i + 1]) for i in range(len(parts))), "linear"]
            node.metadata_props["pkg.torch.onnx.name_scopes"] = repr(names)
    return model


def mlp() -> ir.Model:
    """ids -> embedding -> up -> Relu -> down -> product with itself; `up` and `again` share a weight."""
    return build(
        """
        mlp (int64[B, S] ids, float[V, 40] table, float[40, 33] w_up, float[33] b_up, float[33, 40] w_down,
             float[40, 8] w_small)
            => (float[B, S, S] y, float[B, S, 33] z, float[B, S, 8] small) {
            [embed] h = Gather(table, ids)
            [up] u0 = MatMul(h, w_up)
            [bias] u = Add(u0, b_up)
            [act] r = Relu(u)
            [down] d = MatMul(r, w_down)
            [again] z = MatMul(d, w_up)
            [small] small = MatMul(d, w_small)
            [turn] dt = Transpose <perm = [0, 2, 1]> (d)
            [scores] y = MatMul(d, dt)
        }
        """,
        {
            "table": weight(50, 40),
            "w_up": weight(40, 33),
            "b_up": weight(33),
            "w_down": weight(33, 40),
            "w_small": weight(40, 8),
        },
        {
            "embed": "net.embed",
            "up": "net.layer.0.up",
            "down": "net.layer.0.down",
            "again": "net.layer.1.up",
            "scores": "net.layer.1",
        },
    )


def decide(model: ir.Model, **options: list[str]) -> dict[str, LayerDecision]:
    SelectLayers(**options)(model)
    return {d.node_name: d for d in model.meta[DECISIONS]}


def chosen(model: ir.Model, **options: list[str]) -> set[str]:
    return {name for name, d in decide(model, **options).items() if d.quantize}


def quantized(model: ir.Model, solver: str = "sweep", **options: list[str]) -> ir.Model:
    SelectLayers(**options)(model)
    QuantizeWeights("nvfp4", solver)(model)
    AddLowbitFunctions()(model)
    return model


FEEDS = {"ids": np.array([[1, 2, 3], [49, 0, 7]])}


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    names = [o.name for o in proto.graph.output]
    return dict(zip(names, ReferenceEvaluator(proto).run(None, feeds), strict=True))


# Selection


def test_defaults_and_reasons():
    model = mlp()
    decisions = decide(model)
    assert {n for n, d in decisions.items() if d.quantize} == {"up", "down", "again"}
    assert decisions["embed"].reason.startswith("embedding") and decisions["embed"].shape == (50, 40)
    assert "too small" in decisions["small"].reason and "[40, 8]" in decisions["small"].reason
    assert decisions["scores"].reason == "both operands are activations" and decisions["scores"].weight == ""
    assert decisions["up"] == LayerDecision("up", "net.layer.0.up", "MatMul", "w_up", (40, 33), True, "")
    assert list(decisions) == ["embed", "up", "down", "again", "small", "scores"]
    nodes = {n.name: n for n in model.graph}
    assert nodes["small"].metadata_props[KEPT] == decisions["small"].reason
    assert KEPT not in nodes["up"].metadata_props


def test_selecting_again_changes_nothing():
    model = mlp()
    assert SelectLayers()(model).modified
    assert not SelectLayers()(model).modified
    assert SelectLayers(exclude=["up"])(model).modified


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": ["down"]}, {"down"}),
        ({"include": ["net.layer.0.*"]}, {"up", "down"}),
        ({"include": ["net.layer.0"]}, {"up", "down"}),  # a module stands for everything in it
        ({"include": ["w_up"]}, {"up", "again"}),
        ({"include": ["MatMul"]}, {"up", "down", "again", "small"}),  # asked for, so small ones too
        ({"include": [r"re:layer\.\d+\.up$"]}, {"up", "again"}),
        ({"include": ["*"], "exclude": ["small", "net.layer.1"]}, {"up", "down"}),
        ({"exclude": ["re:^w_"]}, set()),
        ({"exclude": ["Gather"]}, {"up", "down", "again"}),
        ({"include": ["up"], "exclude": ["up"]}, set()),
    ],
)
def test_patterns(options: dict[str, list[str]], expected: set[str]):
    assert chosen(mlp(), **options) == expected


def test_the_reason_says_whose_wish_it_was():
    decisions = decide(mlp(), include=["net.layer.0"], exclude=["down"])
    assert decisions["down"].reason == "excluded by the user"
    assert decisions["again"].reason == "not among the layers to include"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"exclude": ["net.layer.0.upp"]},
            r"exclude pattern 'net\.layer\.0\.upp' matches no layer; near matches: net\.layer\.0\.up",
        ),
        ({"include": ["zzzzzzzz"]}, r"include pattern 'zzzzzzzz' matches no layer$"),
        ({"include": ["up", "nope*"]}, r"'nope\*' matches no layer"),
        ({"include": ["embed"]}, "only layers that cannot be quantized, such as 'embed': embedding"),
        ({"exclude": ["re:("]}, "not a regular expression"),
    ],
)
def test_patterns_that_do_nothing_are_refused(options: dict[str, list[str]], message: str):
    with pytest.raises(UsageError, match=message):
        SelectLayers(**options)(mlp())


def test_tied_and_odd_weights():
    model = build(
        """
        odd (int64[B] ids, float[B, 64] x, float[64, 64] tied, float[64, 64] left, float[2, 64, 64] stack,
             float16[64, 64] half, float16[B, 64] xh, float[64, 64] free, float[64, 64] gemm)
            => (float[B, 64] a, float[B, 64] b, float[64, B] c, float[2, B, 64] d, float16[B, 64] e, float[B,
            64] f,
                float[B, 64] g) {
            [look] a = Gather(tied, ids)
            [head] b = MatMul(x, tied)
            [turn] xt = Transpose <perm = [1, 0]> (x)
            [left] c = MatMul(left, xt)
            [stack] d = MatMul(x, stack)
            [half] e = MatMul(xh, half)
            [free] f = MatMul(x, free)
            [gemm] g = Gemm <transB = 1> (x, gemm)
        }
        """,
        {
            "tied": weight(64, 64),
            "left": weight(64, 64),
            "stack": weight(2, 64, 64),
            "half": weight(64, 64).astype(np.float16),
            "free": weight(64, 64),
            "gemm": weight(64, 64),
        },
    )
    free = model.graph.initializers["free"]
    model.graph.inputs.append(free)
    reasons = {name: d.reason for name, d in decide(model).items()}
    assert "shared with Gather" in reasons["head"]
    assert "left operand" in reasons["left"]
    assert "3 dims" in reasons["stack"]
    assert "FLOAT16" in reasons["half"]
    assert "callers may override" in reasons["free"]
    assert "Gemm" in reasons["gemm"]
    assert chosen(model, include=["head"]) == {"head"}
    quantized_model = quantized(model, include=["head"])
    assert "tied" in quantized_model.graph.initializers  # the Gather still reads it
    assert [n.name for n in lowbit_nodes(quantized_model)] == ["head"]


@pytest.mark.parametrize(
    "text", ["", "[", "__import__('os')", "{}", "3", "['', 1, 'a', 'node']", "[" * 5000, "('a', 'b')", "None"]
)
def test_scopes_that_are_no_list_of_names_are_ignored(text: str):
    node = ir.node("MatMul", [None, None], name="n")
    node.metadata_props["pkg.torch.onnx.name_scopes"] = text
    assert module_scopes(node) == (["a"] if "'a', 'node'" in text else [])


def test_nodes_need_names():
    model = mlp()
    model.graph[1].name = None
    with pytest.raises(ir.passes.PreconditionError):
        SelectLayers()(model)


# Quantization


@pytest.mark.parametrize("solver", WEIGHT_SOLVERS)
def test_the_lowbit_model_computes_with_the_solvers_weights(solver: str):
    model = mlp()
    weights = {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}
    back = {name: SOLVERS[solver](weights[name], name=name).dequantize() for name in ("w_up", "w_down")}
    outputs = run(quantized(model, solver), FEEDS)
    h = weights["table"][FEEDS["ids"]]
    d = np.maximum(h @ back["w_up"] + weights["b_up"], 0) @ back["w_down"]
    np.testing.assert_allclose(outputs["z"], d @ back["w_up"], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(outputs["small"], d @ weights["w_small"], rtol=1e-4, atol=1e-3)


def test_nodes_initializers_and_metadata():
    model = quantized(mlp())
    graph = model.graph
    assert set(graph.initializers) == {
        "table", "b_up", "w_small",
        *(f"{w}.{part}" for w in ("w_up", "w_down") for part in ("codes", "block_scale", "global_scale")),
    }  # fmt: skip
    up = next(n for n in graph if n.name == "up")
    assert up.op_identifier() == ("ai.qgraph", "QLinearNVFP4", "")
    assert [v.name for v in up.inputs] == ["h", "w_up.codes", "w_up.block_scale", "w_up.global_scale"]
    assert up.outputs[0].name == "u0"
    assert [graph.initializers[f"w_up.{p}"].dtype for p in ("codes", "block_scale", "global_scale")] == [
        ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT,
    ]  # fmt: skip
    shapes = [tuple(graph.initializers[f"w_up.{p}"].shape) for p in ("codes", "block_scale", "global_scale")]
    assert shapes == [(40, 33), (3, 33), ()]
    assert up.metadata_props["qgraph.scheme"] == "nvfp4"
    assert up.metadata_props["qgraph.source_weight"] == "w_up"
    assert "pkg.torch.onnx.name_scopes" in up.metadata_props
    assert model.ir_version == 11 and dict(graph.opset_imports) == {"": 23, "ai.qgraph": 1}
    assert len(model.functions) == 1


def test_what_is_reported_is_what_happened():
    model = mlp()
    W = model.graph.initializers["w_up"].const_value.numpy()
    quantized(model, "rtn")
    q = SOLVERS["rtn"](W)
    record = model.meta[QUANTIZED][0]
    assert [r.weight for r in model.meta[QUANTIZED]] == ["w_up", "w_down"]
    error = np.sum((W - q.dequantize()).astype(np.float64) ** 2) / np.sum(W.astype(np.float64) ** 2)
    assert record.nodes == ("up", "again") and record.shape == (40, 33)
    assert record.relative_error == pytest.approx(error, rel=1e-6)
    assert record.sqnr_db == pytest.approx(-10 * np.log10(error), rel=1e-6)
    assert record.bits_per_weight == q.bits_per_weight() and record.nbytes == q.nbytes()
    assert record.original_nbytes == W.nbytes
    up = next(n for n in model.graph if n.name == "up")
    assert float(up.metadata_props["qgraph.sqnr_db"]) == pytest.approx(record.sqnr_db, abs=0.01)
    assert float(up.metadata_props["qgraph.bits_per_weight"]) == pytest.approx(q.bits_per_weight(), abs=1e-4)


def test_stored_bytes_are_the_qtensor():
    model = mlp()
    q = SOLVERS["sweep"](model.graph.initializers["w_up"].const_value.numpy())
    proto = ir.to_proto(quantized(model))
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    assert np.array_equal(stored["w_up.codes"].view(np.uint8), q.codes)
    assert stored["w_up.block_scale"].tobytes() == q.block_scale.tobytes()
    assert stored["w_up.global_scale"] == q.global_scale
    raw = {t.name: len(t.raw_data) for t in proto.graph.initializer}
    assert sum(raw[f"w_up.{p}"] for p in ("codes", "block_scale", "global_scale")) == q.nbytes()


def test_progress():
    model, seen = mlp(), []
    SelectLayers()(model)
    QuantizeWeights("nvfp4", on_layer=lambda i, n, name: seen.append((i, n, name)))(model)
    assert seen == [(0, 2, "w_down"), (1, 2, "w_up"), (2, 2, "")]  # `up` shares its weight with the last


def test_scheme_none_changes_no_weight_and_says_so():
    model = mlp()
    before = run(model, FEEDS)
    SelectLayers()(model)
    QuantizeWeights("none")(model)
    assert {n.metadata_props[KEPT] for n in model.graph if n.op_type == "MatMul"} == {"scheme none"}
    assert model.meta[QUANTIZED] == [] and not lowbit_nodes(model)
    after = run(model, FEEDS)
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(bad: float):
    model = mlp()
    W = model.graph.initializers["w_down"].const_value.numpy().copy()
    W[2, 3] = bad
    model.graph.initializers["w_down"].const_value = ir.Tensor(W, name="w_down")
    with pytest.raises(InputError, match="weight 'w_down'"):
        quantized(model)


def test_a_name_that_is_taken_is_refused():
    model = mlp()
    value = next(n for n in model.graph if n.name == "act").outputs[0]
    value.name = "w_up.codes"
    with pytest.raises(InputError, match=r"already has a value 'w_up\.codes'"):
        quantized(model)


@pytest.mark.parametrize(
    ("scheme", "solver", "message"),
    [
        ("nvfp5", "", "unknown scheme 'nvfp5'.*did you mean 'nvfp4'"),
        ("nvfp4", "gtpq", "unknown solver 'gtpq'"),
        ("nvfp4", "mxfp4-rtn", "solver 'mxfp4-rtn' is not for scheme 'nvfp4'; known: gptq, "),
    ],
)
def test_unknown_names(scheme: str, solver: str, message: str):
    with pytest.raises(UsageError, match=message):
        QuantizeWeights(scheme, solver)


def test_order_of_passes_is_checked():
    with pytest.raises(ir.passes.PreconditionError, match="after SelectLayers"):
        QuantizeWeights("nvfp4")(mlp())
    old = mlp()
    old.graph.opset_imports[""] = 21
    with pytest.raises(ir.passes.PreconditionError, match="opset 21"):
        AddLowbitFunctions()(old)


@pytest.mark.parametrize("opset", [23, 24, 25, 26])
def test_later_opsets(opset: int):
    """A function that imported another opset than the model would be refused by the checker."""
    model = mlp()
    model.graph.opset_imports[""] = opset
    outputs = run(quantized(model), FEEDS)
    assert model.ir_version == {23: 11, 24: 12, 25: 13, 26: 13}[opset]
    assert np.isfinite(outputs["y"]).all()


# Both styles


def test_inlined_model_is_the_same_function():
    model = quantized(mlp())
    expected = run(model, FEEDS)
    assert InlineLowbitFunctions()(model).modified
    outputs = run(model, FEEDS)
    assert all(outputs[name].tobytes() == expected[name].tobytes() for name in expected)
    assert not model.functions and dict(model.graph.opset_imports) == {"": 23}
    names = [n.name for n in model.graph]
    assert names.index("up/scale") < names.index("up/weight") < names.index("up")
    up = next(n for n in model.graph if n.name == "up")
    assert up.op_type == "MatMul" and up.metadata_props["qgraph.scheme"] == "nvfp4"
    assert not InlineLowbitFunctions()(model).modified


def test_function_pass_is_idempotent():
    model = quantized(mlp())
    assert not AddLowbitFunctions()(model).modified


# Files


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_saved_file(tmp_path: Path):
    model = quantized(mlp())
    expected = run(model, FEEDS)
    assert save_lowbit(model, tmp_path / "m.onnx") == [tmp_path / "m.onnx"]
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    outputs = ReferenceEvaluator(str(tmp_path / "m.onnx")).run(None, FEEDS)
    assert all(np.array_equal(a, b) for a, b in zip(outputs, expected.values(), strict=True))
    again = tmp_path / "again.onnx"
    save_lowbit(model, again)
    assert again.read_bytes() == (tmp_path / "m.onnx").read_bytes()


def test_bits_on_disk(tmp_path: Path):
    text = "big (float[B, 1024] x, float[1024, 1024] w) => (float[B, 1024] y) { [mm] y = MatMul(x, w) }"
    model = quantized(build(text, {"w": weight(1024, 1024)}))
    save_lowbit(model, tmp_path / "m.onnx")
    assert 8 * (tmp_path / "m.onnx").stat().st_size / 1024**2 == pytest.approx(4.5, abs=0.02)


def test_external_data_when_large(tmp_path: Path):
    model = quantized(mlp())
    expected = run(model, FEEDS)
    files = save_lowbit(model, tmp_path / "m.onnx", external_data_from=1000)
    assert files == [tmp_path / "m.onnx", tmp_path / "m.onnx.data"]
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]
    onnx.checker.check_model(str(files[0]), full_check=True)
    outputs = ReferenceEvaluator(str(files[0])).run(None, FEEDS)
    assert all(np.array_equal(a, b) for a, b in zip(outputs, expected.values(), strict=True))
    assert run(model, FEEDS)["y"].tobytes() == expected["y"].tobytes()  # the model in memory is as before


def test_external_data_of_the_source_is_copied(tmp_path: Path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    model = mlp()
    ir.save(model, source / "m.onnx", external_data="m.bin", size_threshold_bytes=0)
    expected = run(quantized(model), FEEDS)
    loaded = quantized(ir.load(source / "m.onnx"))
    save_lowbit(loaded, target / "m.onnx")
    assert isinstance(loaded.graph.initializers["table"].const_value, ir.ExternalTensor)
    del loaded
    (source / "m.bin").unlink()
    assert names(target) == ["m.onnx"]
    outputs = ReferenceEvaluator(str(target / "m.onnx")).run(None, FEEDS)
    assert all(np.array_equal(a, b) for a, b in zip(outputs, expected.values(), strict=True))


# A scheme of its own for a layer


def mixed(model: ir.Model, *overrides: Override, scheme: str = "nvfp4", **options: list[str]) -> ir.Model:
    SelectLayers(overrides=overrides, **options)(model)
    QuantizeWeights(scheme)(model)
    AddLowbitFunctions()(model)
    return model


def schemes_of(model: ir.Model) -> dict[str, str]:
    return {str(node.name): node.metadata_props["qgraph.scheme"] for node in lowbit_nodes(model)}


def test_the_last_override_that_matches_counts():
    reference = mlp()
    model = mixed(reference.clone(), Override("*", "int4"), Override("net.layer.0.down", "ternary", "itf"))
    assert schemes_of(model) == {"up": "int4", "down": "ternary", "again": "int4"}
    for name, format in (("w_up", "int4"), ("w_down", "ternary")):
        value = reference.graph.initializers[name]
        back = SOLVERS["itf"](value.const_value.numpy(), format=format).dequantize()
        value.const_value = ir.Tensor(back, name=name)
    got, want = run(model, FEEDS), run(reference, FEEDS)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_a_layer_without_a_scheme_among_quantized_ones_and_the_reverse():
    model = mixed(mlp(), Override("down", "none"))
    assert schemes_of(model) == {"up": "nvfp4", "again": "nvfp4"}
    assert next(n for n in model.graph if n.name == "down").metadata_props[KEPT] == "scheme none"
    model = mixed(mlp(), Override("down", "int8"), scheme="none")
    assert schemes_of(model) == {"down": "int8"}
    assert next(n for n in model.graph if n.name == "up").metadata_props[KEPT] == "scheme none"
    run(model, FEEDS)


def test_overrides_do_not_choose_what_would_be_kept():
    model = mixed(mlp(), Override("*", "int4"), exclude=["down"])
    assert schemes_of(model) == {"up": "int4", "again": "int4"}


def test_an_override_that_can_do_nothing_is_refused():
    with pytest.raises(UsageError, match=r"layer pattern 'dwon' matches no layer; near matches: .*down"):
        SelectLayers(overrides=[Override("dwon", "int4")])(mlp())
    with pytest.raises(UsageError, match="layer pattern 'scores' matches only layers that cannot be"):
        SelectLayers(overrides=[Override("scores", "int4")])(mlp())
    with pytest.raises(UsageError, match="layer pattern 'embed' matches only embeddings"):
        SelectLayers(embeddings="nvfp4", overrides=[Override("embed", "none")])(mlp())


def test_layers_that_share_a_weight_cannot_differ():
    with pytest.raises(UsageError, match="'up' and 'again' share a weight and cannot differ in scheme or"):
        mixed(mlp(), Override("again", "int4"))
    with pytest.raises(UsageError, match="'up' and 'again' share a weight"):
        mixed(mlp(), Override("up", "int4", "itf"), Override("again", "int4", "rtn"))


def test_solver_of_another_format():
    with pytest.raises(UsageError, match="solver 'pt2-llm' is not for scheme 'int4'"):
        mixed(mlp(), Override("down", "int4", "pt2-llm"))
    with pytest.raises(UsageError, match="scheme 'ternary' with solver 'gptq' needs calibration data"):
        mixed(mlp(), Override("down", "ternary", "gptq"))


@pytest.mark.parametrize("scheme", ["ternary", "int4"])
def test_weights_too_small_for_the_format_are_called_lost(scheme: str):
    model = mlp()
    for name in ("w_up", "w_down"):
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(1e-10), name=name)
    SelectLayers()(model)
    quantize = QuantizeWeights(scheme, "rtn")
    quantize(model)
    reasons = [refusal.reason for refusal in quantize.refusals]
    assert reasons == [f"100% of its weight is lost in {scheme}: exclude the layer"] * 2
    assert run(AddLowbitFunctions()(model).model, FEEDS)["z"].max() == 0
