# ruff: noqa: E501 (one graph a line is easier to read)
"""The whole phase: its contract, its hooks, and that it changes nothing twice."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from prepare_harness import check_shapes, feeds_for, ops, parse, run_ort

from qgraph.errors import InputError, QGraphError, ResourceError, UnsupportedError
from qgraph.passes import CheckPrepared, PrepareOptions, load_model, prepare, prepare_model, run_passes
from qgraph.passes.check_prepared import violations
from qgraph.passes.infer_shapes import InferShapes

rng = np.random.default_rng(2)
I64 = np.int64


def f32(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def block() -> ir.Model:
    """A block in the worst spelling: everything decomposed, constants as nodes, opset 12."""
    return parse(
        "(int64[batch,seq] ids) => (float[batch,seq,9] logits) {"
        " e = Gather(embed, ids) e1 = Identity(e) two = Constant<value_float=2.0>() eps = Constant<value_float=0.001>()"
        " mu = ReduceMean<axes=[-1]>(e1) d = Sub(e1, mu) q = Pow(d, two) m = ReduceMean<axes=[2]>(q) v = Add(m, eps)"
        " s = Sqrt(v) n = Div(d, s) g = Mul(n, gamma) h = Add(g, beta)"
        " sh = Shape(h) z = Constant<value_int=0>() n0 = Gather(sh, z) n0u = Unsqueeze<axes=[0]>(n0) w8 = Constant<value_ints=[8]>()"
        " flat_shape = Concat<axis=0>(minus, w8) flat = Reshape(h, flat_shape) lin = Gemm<transB=1>(flat, w1, b1)"
        " r2 = Constant<value_float=1.4142135>() one = Constant<value_float=1.0>() half = Constant<value_float=0.5>()"
        " a = Div(lin, r2) er = Erf(a) p = Add(er, one) x1 = Mul(lin, p) gelu = Mul(x1, half)"
        " back = Concat<axis=0>(n0u, minus, w16) y3 = Reshape(gelu, back) t2 = Transpose<perm=[1,0]>(w2) y4 = MatMul(y3, t2)"
        " y5 = Add(b2, y4) tt = Transpose(embed) logits = MatMul(y5, tt) dead = Exp(y5) }".replace(
            "w16", "w16c"
        ),
        12,
        embed=f32(9, 8),
        gamma=f32(8),
        beta=f32(8),
        minus=np.array([-1], I64),
        w16c=np.array([16], I64),
        w1=f32(16, 8),
        b1=f32(16),
        w2=f32(8, 16),
        b2=f32(8),
    )


def test_everything_at_once() -> None:
    model = block()
    feeds = feeds_for(model, batch=2, seq=5)
    (expected,) = run_ort(model, feeds)
    refusals: list = []
    prepare_model(model, refusals=refusals)
    assert any("needs more than one computed dimension" in r.reason for r in refusals)
    (found,) = run_ort(model, feeds)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert ops(model) == [
        "Gather", "Transpose", "LayerNormalization", "Shape", "Gather", "Unsqueeze", "Reshape", "MatMul", "Add",
        "Gelu", "Concat", "Reshape", "MatMul", "Add", "MatMul",
    ]  # fmt: skip
    assert [v.shape for v in model.graph.initializers.values() if v.name == "embed"] == [[8, 9]]
    check_shapes(model, [{"batch": 2, "seq": 5}, {"batch": 3, "seq": 1}])
    assert str(model.graph.outputs[0].shape) == "[batch,seq,9]"


def test_preparing_twice_changes_nothing() -> None:
    model = prepare_model(block())
    options = PrepareOptions()
    again = [type(step).__name__ for step in prepare(options) if step(model).modified]
    assert again == []


def test_hooks_and_dump(tmp_path: Path) -> None:
    heard: list[str] = []
    prepare_model(block(), on_pass=heard.append, dump=tmp_path / "new")
    assert heard[0] == "DeclareOutputs"
    assert heard[-1] == "CheckPrepared"
    assert "FoldConstants" in heard
    assert not {"UntilStable", "Dump"} & set(heard)
    files = sorted(f.name for f in (tmp_path / "new").iterdir())
    assert files == ["00-import.onnx", "10-simple.onnx", "20-layers.onnx", "30-prepared.onnx"]
    reloaded = load_model(tmp_path / "new" / "30-prepared.onnx")
    InferShapes()(reloaded)
    assert not list(violations(reloaded))


def test_dump_of_external_weights(tmp_path: Path) -> None:
    model = block()
    feeds = feeds_for(model, batch=2, seq=3)
    (expected,) = run_ort(model, feeds)
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    prepare_model(load_model(tmp_path / "m.onnx"), dump=tmp_path / "dump")
    (tmp_path / "m.data").unlink()
    dumped = load_model(tmp_path / "dump" / "30-prepared.onnx")
    ir.external_data.load_to_model(dumped)
    np.testing.assert_allclose(run_ort(dumped, feeds)[0], expected, atol=1e-4)


def test_dump_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="cannot write the dump"):
        prepare_model(block(), dump=tmp_path / "file")


def test_errors_come_out_as_themselves() -> None:
    model = parse("(float[n,4] x) => (float[n] y) { y = NonZero(x) }")
    with pytest.raises(UnsupportedError, match="NonZero"):
        prepare_model(model)


def test_half_precision_weights_are_refused() -> None:
    model = parse("(float16[n,4] x) => (float16[n,4] y) { y = MatMul(x, w) }", w=np.ones((4, 4), np.float16))
    with pytest.raises(UnsupportedError, match=r"its weight 'w' is FLOAT16; export the model in float32"):
        prepare_model(model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(float[n,4] x) => (float[n,4] y) { h = Identity(x) y = Neg(h) }", "(Identity) is left"),
        ("(float[n,4] x) => (float[n,4] y) { y = Neg(x) z = Exp(x) }", "is dead"),
        ("(float[n,4] x) => (float[n,4] y) { y = Gemm(x, w) }", "(Gemm) is left"),
        ("(float[n,4] x) => (float[n,4] y) { t = Transpose(w) y = MatMul(x, t) }", "turns a weight"),
        ("(float[n,4] x) => (float[n,4] y) { h = MatMul(x, w) y = Add(b, h) }", "has its constant first"),
        ("(float[n,4] x) => (float[n,4] y) { h = MatMul(x, w) y = MatMul(h, w2) }", "are equal but stored twice"),
        ("(float[n,4] x) => (float[n,4] y) { q = Mul(x, x) m = ReduceMean(q, last) s = Sqrt(m) y = Div(x, s) }", "ends a decomposed norm"),
        ("(float[n,4] x) => (float[n,4] y) { a = Mul(x, c) e = Erf(a) p = Add(e, one) g = Mul(x, p) y = Mul(g, half) }", "decomposed GELU"),
    ],
)  # fmt: skip
def test_the_checker_sees_each_violation(text: str, message: str) -> None:
    w = np.eye(4, dtype=np.float32) * 3
    pool = {
        "w": w, "w2": w.copy(), "b": f32(4), "last": np.array([-1], I64), "c": np.float32(0.70710678),
        "one": np.float32(1), "half": np.float32(0.5),
    }  # fmt: skip
    model = parse(text, **{k: v for k, v in pool.items() if f"({k}" in text or f", {k}" in text})
    model.ir_version = 11
    InferShapes()(model)
    assert message in " | ".join(str(v) for v in violations(model))
    with pytest.raises(ir.passes.PostconditionError) as caught:
        CheckPrepared()(model)
    assert isinstance(caught.value.__cause__, InputError)
    with pytest.raises(QGraphError):
        run_passes(model, [CheckPrepared()], PrepareOptions())


def test_the_checker_sees_missing_shapes_and_wrong_imports() -> None:
    model = parse(
        "(float[n,4] x) => (float[n,4] y) { h = Neg(x) y = Exp(h) }", 18, imports=', "com.acme" : 1'
    )
    found = " | ".join(map(str, violations(model)))
    assert "opset 18 is below 23" in found
    assert "domain 'com.acme' is imported" in found
    assert "'h' has no shape or type" in found
    model.graph[0].outputs[0].dtype = ir.DataType.FLOAT
    model.graph[0].outputs[0].shape = ir.Shape(["other", 4])
    assert "dimension 'other', which the inputs do not tell" in " | ".join(map(str, violations(model)))


def data() -> Path:
    return Path(os.environ.get("QGRAPH_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def test_stories260k() -> None:
    """A trained Llama of 260 k weights, as another exporter wrote it."""
    path = data() / "stories260K" / "stories260K.onnx"
    if not path.exists():
        pytest.skip(f"no {path}")
    model = load_model(path)
    original = load_model(path)
    start = time.monotonic()
    prepare_model(model)
    assert time.monotonic() - start < 5
    dims = {d.value: 3 for v in model.graph.inputs for d in v.shape if isinstance(d, ir.SymbolicDim)}
    feeds = feeds_for(model, high=100, **dims)
    for a, b in zip(run_ort(original, feeds), run_ort(model, feeds), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
    check_shapes(model, [dims, dict.fromkeys(dims, 5)])
    assert "RMSNormalization" in ops(model)


@pytest.mark.parametrize("style", ["function", "qdq"])
def test_a_low_bit_file_is_prepared_again(style: str, tmp_path: Path) -> None:
    """What `quantize` writes, in either style, is prepared again to the same quantized layers."""
    from qgraph.passes.lowbit_functions import AddLowbitFunctions, InlineLowbitFunctions
    from qgraph.passes.quantize_weights import QuantizeWeights
    from qgraph.passes.select_layers import SelectLayers

    model = parse(
        "(float[n,s,40] x) => (float[n,s,32] y) { h = MatMul(x, w) k = Add(h, b) g = Gelu(k) y = MatMul(g, v) }",
        w=f32(40, 48),
        b=f32(48),
        v=f32(48, 32),
    )
    prepare_model(model)
    steps = [SelectLayers([], []), QuantizeWeights("nvfp4"), AddLowbitFunctions()]
    run_passes(model, steps, PrepareOptions())
    expected = [(n.op_type, n.name) for n in model.graph]
    assert [op for op, _ in expected] == ["QLinearNVFP4", "Add", "Gelu", "QLinearNVFP4"]
    if style == "qdq":
        run_passes(model, [InlineLowbitFunctions()], PrepareOptions())
    ir.save(model, tmp_path / "low.onnx")
    loaded = prepare_model(load_model(tmp_path / "low.onnx"))
    assert [(n.op_type, n.name) for n in loaded.graph] == expected
    assert str(loaded.graph.outputs[0].shape) == "[n,s,32]"
    codes = [v for v in loaded.graph.initializers.values() if v.dtype == ir.DataType.FLOAT4E2M1]
    assert sorted(tuple(v.shape) for v in codes) == [(40, 48), (48, 32)]


def test_undefined_and_unsorted_values_of_models_made_in_memory() -> None:
    model = parse("(float[n,4] x) => (float[n,4] y) { h = Neg(x) y = Exp(h) }")
    model.graph[1].replace_input_with(0, ir.Value(name="ghost"))
    with pytest.raises(InputError, match="reads 'ghost', which is not computed before it"):
        prepare_model(model)


def test_damaged_files_are_models_or_refused(tmp_path: Path) -> None:
    """Up to three changed bytes in a file that uses most passes: prepared, or one printable line."""
    data = ir.to_proto(block()).SerializeToString()
    generator = np.random.default_rng(7)
    path = tmp_path / "damaged.onnx"
    outcomes = {"prepared": 0, "refused": 0}
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(generator.integers(1, 4)):
            damaged[generator.integers(len(damaged))] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            prepare_model(load_model(path))
            outcomes["prepared"] += 1
        except (InputError, UnsupportedError) as error:
            assert str(error).isprintable()
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10, outcomes
