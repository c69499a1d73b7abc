"""Lookup tables in NVFP4: which are chosen, what becomes of them, and the written-out form and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from prepare_harness import parse

from qgraph.errors import InputError, UsageError
from qgraph.formats.activations import dynamic_int8
from qgraph.passes import load_model, prepare_model
from qgraph.passes.lowbit_functions import AddLowbitFunctions, InlineLowbitFunctions, lowbit_nodes
from qgraph.passes.lowbit_weights import from_node
from qgraph.passes.quantize_weights import QUANTIZED, QuantizeWeights
from qgraph.passes.recognize_lowbit import RecognizeLowbit
from qgraph.passes.select_layers import DECISIONS, KEPT, Override, SelectLayers
from qgraph.schemes import SCHEMES
from qgraph.solvers import SOLVERS

RNG = np.random.default_rng(0)
V, H = 129, 37  # an odd number of columns, a shorter last block
TEXT = """(int64[b, s] ids, int32[s] at) => (float[b, s, 33] y, float[b, s, 37] z) {
    [word] w = Gather(words, ids) [place] p = Gather(places, at) [sum] x = Add(w, p)
    [kind] k = Gather <axis = -2> (kinds, zero) [all] z = Add(x, k)
    [up] y = MatMul(z, w_up) }"""
FEEDS = {"ids": np.array([[0, V - 1, -1, 7], [-V, 5, 5, 64]]), "at": np.array([0, -1, 110, 3], np.int32)}


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def model() -> ir.Model:
    """Word ids, positions and one of two kinds are looked up and added; then a linear layer."""
    return parse(
        TEXT, words=f32(V, H), places=f32(111, H), kinds=f32(2, H), w_up=f32(H, 33), zero=np.array([0])
    )


def quantized(graph: ir.Model, solver: str = "rtn", **options: object) -> ir.Model:
    options.setdefault("embeddings", "nvfp4")
    for step in (SelectLayers(**options), QuantizeWeights("nvfp4", solver), AddLowbitFunctions()):  # type: ignore[arg-type]
        step(graph)
    return graph


def reasons(graph: ir.Model, **options: object) -> dict[str, str]:
    """Why each layer is kept; empty for one that is quantized."""
    SelectLayers(**options)(graph)  # type: ignore[arg-type]
    return {d.node_name: d.reason for d in graph.meta[DECISIONS]}


def run(graph: ir.Model, feeds: dict[str, np.ndarray] = FEEDS) -> list[np.ndarray]:
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    return ReferenceEvaluator(proto).run(None, feeds)


# Selection


def test_tables_stay_float_unless_asked_for() -> None:
    found = reasons(model())
    assert found["word"] == found["place"] == "embedding: --embeddings nvfp4 quantizes it"
    assert found["up"] == ""
    assert reasons(model(), embeddings="nvfp4")["word"] == ""


def test_small_tables_stay_float_unless_included() -> None:
    small = "embedding: too small to gain: [2, 37] is below 4096 elements"
    for embeddings in ("float", "nvfp4"):
        assert reasons(model(), embeddings=embeddings)["kind"] == small
    assert reasons(model(), embeddings="nvfp4", include=["*"])["kind"] == ""
    with pytest.raises(UsageError, match=r"only layers that cannot .* too small"):
        reasons(model(), embeddings="float", include=["kind"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"exclude": ["place"]}, {"word", "up"}),
        ({"exclude": ["Gather"]}, {"up"}),
        ({"exclude": ["words", "up"]}, {"place"}),
        ({"include": ["word*"]}, {"word"}),
        ({"include": ["MatMul"]}, {"up"}),
    ],
)
def test_patterns(options: dict[str, list[str]], expected: set[str]) -> None:
    found = reasons(model(), embeddings="nvfp4", **options)
    assert {name for name, reason in found.items() if not reason} == expected
    graph = quantized(model(), **options)
    assert {n.name for n in graph.graph if n.domain} == expected
    assert all((KEPT in n.metadata_props) == (n.name in found) for n in graph.graph if not n.domain)
    assert np.isfinite(run(graph)[0]).all()


def test_tables_that_cannot_be_quantized() -> None:
    graph = parse(
        "(int64[s] ids, float[s, 64] x) => (float[s, 64] a, float[s, 64] b, float[64, s] c, float16[s, 64] d,"
        " float[s, 8, 64] e, float[64, 64] f, float[s, 64] g, float[s, 64] h) {"
        " [tied] a = Gather(t, ids) [head] b = MatMul(x, t) [turned] c = Gather <axis = 1> (cols, ids)"
        " [half] d = Gather(halves, ids) [deep] e = Gather(deep_w, ids) [neg] f = Neg(shared)"
        " [other] g = Gather(shared, ids) [free] h = Gather(input_w, ids) }",
        t=f32(64, 64),
        cols=f32(64, 64),
        halves=f32(64, 64).astype(np.float16),
        deep_w=f32(64, 8, 64),
        shared=f32(64, 64),
        input_w=f32(64, 64),
    )
    graph.graph.inputs.append(graph.graph.initializers["input_w"])
    found = reasons(graph, embeddings="nvfp4")
    assert found["tied"] == "embedding: its table is multiplied by in head"
    assert "does not pick rows" in found["turned"] and "does not pick rows" in found["deep"]
    assert "FLOAT16" in found["half"]
    assert "shared with Neg" in found["other"]
    assert "callers may override" in found["free"]
    assert all(found[name].startswith("embedding: ") for name in ("turned", "deep", "half", "other", "free"))
    # Where the user insists, the head and the shared table are stored twice; the tied lookup stays float.
    found = reasons(graph, embeddings="nvfp4", include=["*"])
    assert {name for name, reason in found.items() if not reason} == {"head", "other"}


def tied_model() -> ir.Model:
    return prepare_model(
        parse(
            "(int64[b,s] ids) => (float[b,s,99] y) { [look] h = Gather(t, ids) c = Transpose(t)"
            " [head] y = MatMul(h, c) }",
            t=f32(99, 48),
        )
    )


def test_tied_embeddings_go_with_their_layer() -> None:
    assert reasons(tied_model(), embeddings="float") == {
        "look": "embedding: tied to head: --embeddings tied quantizes both",
        "head": "the weight is shared with Gather: quantizing would store it twice",
    }
    for embeddings in ("tied", "nvfp4"):
        assert reasons(tied_model(), embeddings=embeddings) == {"look": "", "head": ""}
    assert reasons(tied_model(), embeddings="tied", exclude=["head"]) == {
        "look": "tied to head: excluded by the user",
        "head": "excluded by the user",
    }
    found = tied_model()
    with pytest.raises(UsageError, match=r"'head' matches only layers that are kept .* shared with Gather"):
        SelectLayers(overrides=[Override("head", "int4")])(found)
    SelectLayers(overrides=[Override("head", "int4")], include=["head"])(found)
    assert [d.scheme for d in found.meta[DECISIONS] if d.quantize] == ["int4"]
    found = tied_model()
    SelectLayers(embeddings="tied", overrides=[Override("head", "int4", "rtn")])(found)
    assert [(d.scheme, d.solver) for d in found.meta[DECISIONS]] == [("int4", "rtn")] * 2


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name not in ("none", "nvfp4-w4a4")])
def test_a_tied_table_is_the_weight_of_its_layer(scheme: str) -> None:
    graph = tied_model()
    SelectLayers(embeddings="tied")(graph)
    QuantizeWeights(scheme, "rtn")(graph)
    AddLowbitFunctions()(graph)
    look, head = (next(n for n in graph.graph if n.name == name) for name in ("look", "head"))
    assert look.op_type == head.op_type.replace("QLinear", "QGatherColumns")
    assert look.inputs[1:] == head.inputs[1:]
    W = from_node(head).dequantize()
    ids = np.array([[0, 98, 7], [-1, 7, 7]])
    h = W.T[ids]
    if SCHEMES[scheme].activation_format == "int8":
        h = dynamic_int8(h)
    evaluator = ReferenceEvaluator(ir.to_proto(graph))
    np.testing.assert_allclose(evaluator.run(None, {"ids": ids})[0], h @ W, rtol=1e-5, atol=1e-5)
    # Written out in standard operators, it is found again.
    InlineLowbitFunctions()(graph)
    assert not lowbit_nodes(graph)
    RecognizeLowbit()(graph)
    wanted = {"look": look.op_type, "head": head.op_type}
    assert {n.name: n.op_type for n in lowbit_nodes(graph) if n.name in wanted} == wanted


# What becomes of them


@pytest.mark.parametrize("solver", ["sweep", "rtn"])
def test_a_lookup_gives_the_rows_of_the_dequantized_table(solver: str) -> None:
    """To the bit, negative indices included: the quantized table is the solver's, turned."""
    graph = model()
    weights = {name: v.const_value.numpy() for name, v in graph.graph.initializers.items()}
    back = {
        name: SOLVERS[solver](np.ascontiguousarray(weights[name].T)).dequantize().T
        for name in ("words", "places")
    }
    quantized(graph, solver, exclude=["up"])
    y, z = run(graph)
    want = back["words"][FEEDS["ids"]] + back["places"][FEEDS["at"]] + weights["kinds"][0]
    assert z.tobytes() == want.tobytes()
    np.testing.assert_allclose(y, z @ weights["w_up"], rtol=1e-5, atol=1e-5)


def test_nodes_initializers_and_record() -> None:
    graph = quantized(model())
    word = next(n for n in graph.graph if n.name == "word")
    assert word.op_identifier() == ("ai.qgraph", "QGatherNVFP4", "")
    assert [v.name for v in word.inputs] == ["ids", "words.codes", "words.block_scale", "words.global_scale"]
    parts = [graph.graph.initializers[f"words.{p}"] for p in ("codes", "block_scale", "global_scale")]
    assert [tuple(v.shape) for v in parts] == [(V, H), (V, 3), ()]
    assert [v.dtype.name for v in parts] == ["FLOAT4E2M1", "FLOAT8E4M3FN", "FLOAT"]
    assert "words" not in graph.graph.initializers and "kinds" in graph.graph.initializers
    record = {r.weight: r for r in graph.meta[QUANTIZED]}["words"]
    assert record.shape == (V, H) and record.nodes == ("word",)
    assert record.nbytes == -(-V * H // 2) + V * 3 + 4
    assert word.metadata_props["qgraph.source_weight"] == "words"
    assert float(word.metadata_props["qgraph.sqnr_db"]) == pytest.approx(record.sqnr_db, abs=0.01)
    assert 15 < record.sqnr_db < 25
    assert {key[1] for key in graph.functions} == {"QLinearNVFP4", "QGatherNVFP4"}


def test_a_table_of_two_lookups_is_stored_once() -> None:
    text = (
        "(int64[s] a, int64[s] b) => (float[s, 64] y) { [one] p = Gather(t, a) [two] q = Gather(t, b)"
        " y = Add(p, q) }"
    )
    graph = quantized(parse(text, t=f32(64, 64)))
    assert set(graph.graph.initializers) == {"t.codes", "t.block_scale", "t.global_scale"}
    assert graph.meta[QUANTIZED][0].nodes == ("one", "two")


# The file, and back


def test_written_out_and_recognised_again() -> None:
    graph = quantized(model())
    expected = run(graph)
    nodes = [(n.op_type, n.name) for n in graph.graph]
    assert InlineLowbitFunctions()(graph).modified
    assert not graph.functions and "ai.qgraph" not in graph.opset_imports
    for a, b in zip(run(graph), expected, strict=True):
        assert a.tobytes() == b.tobytes()
    names = [n.name for n in graph.graph]
    assert names.index("word/scale") < names.index("word/weight") < names.index("word")
    graph = ir.from_proto(ir.to_proto(graph))
    assert RecognizeLowbit()(graph).modified
    assert [(n.op_type, n.name) for n in graph.graph] == nodes
    word = next(n for n in graph.graph if n.name == "word")
    assert word.metadata_props["qgraph.scheme"] == "nvfp4"
    for a, b in zip(run(graph), expected, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda gather, table: gather.attributes.add(ir.AttrInt64("axis", 1)), "not as QGatherColumnsNVFP4"),
        (lambda gather, table: table.attributes.add(ir.AttrInt64("axis", 0)), "along the second axis"),
        (lambda gather, table: table.attributes.add(ir.AttrInt64("block_size", 32)), "not of 16"),
    ],
)
def test_what_is_not_the_pattern_stays(change, reason: str) -> None:
    graph = quantized(parse("(int64[s] i) => (float[s, 64] y) { [look] y = Gather(t, i) }", t=f32(64, 64)))
    InlineLowbitFunctions()(graph)
    nodes = {n.name: n for n in graph.graph}
    change(nodes["look"], nodes["look/weight"])
    recognise = RecognizeLowbit()
    assert not recognise(graph).modified
    assert len(recognise.refusals) == 1 and reason in recognise.refusals[0].reason


@pytest.mark.parametrize("style", ["function", "qdq"])
def test_the_file_is_prepared_again(style: str, tmp_path: Path) -> None:
    graph = quantized(prepare_model(model()))
    expected = [(n.op_type, n.name) for n in graph.graph]
    assert [op for op, _ in expected].count("QGatherNVFP4") == 2
    if style == "qdq":
        InlineLowbitFunctions()(graph)
    ir.save(graph, tmp_path / "low.onnx")
    loaded = prepare_model(load_model(tmp_path / "low.onnx"))
    assert [(n.op_type, n.name) for n in loaded.graph] == expected
    word = next(n for n in loaded.graph if n.name == "word")
    assert str(word.outputs[0].shape) == f"[b,s,{H}]" and word.outputs[0].dtype == ir.DataType.FLOAT


def test_a_constant_index_outside_of_the_table_is_refused() -> None:
    text = "(float[64] x) => (float[1, 64] y) { [look] r = Gather(t, i) y = Add(r, x) }"
    graph = quantized(parse(text, t=f32(64, 64), i=np.array([64])))
    with pytest.raises(InputError, match="index 64"):
        prepare_model(graph)
