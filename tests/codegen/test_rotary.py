"""RotaryEmbedding: every form of it against ONNX's reference evaluator, and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from end_to_end import assert_close, compile_model, parse, run_artifact
from onnx.reference import ReferenceEvaluator

from qgraph.codegen import build_artifact
from qgraph.errors import UnsupportedError
from qgraph.passes import prepare_model

HALF = 4


def feeds(text: str, batch: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch * 100 + length)
    shapes = {
        "x": (batch, 3, length, 2 * HALF) if "float[B, 3, S, 8] x" in text else (batch, length, 6 * HALF),
        "c": (9, HALF) if "int64" in text else (batch, length, HALF),
    }
    shapes["i"] = shapes["c"]
    if "small" in text:
        shapes["c"] = shapes["i"] = (*shapes["c"][:-1], HALF - 1)
    made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    if "int64" in text:
        made["p"] = rng.integers(0, 9, (batch, length))
    return made


WHOLE = "float[B, 3, S, 8]"
FLAT = "float[B, S, 24]"
CACHE, SMALL, TABLE = "float[B, S, 4]", "float[B, S, small]", "float[9, 4]"
CASES = {
    "halves": f"({WHOLE} x, {CACHE} c, {CACHE} i) => ({WHOLE} y) {{ y = RotaryEmbedding(x, c, i) }}",
    "interleaved": f"({WHOLE} x, {CACHE} c, {CACHE} i) => ({WHOLE} y)"
    " { y = RotaryEmbedding<interleaved = 1>(x, c, i) }",
    "flat": f"({FLAT} x, {CACHE} c, {CACHE} i) => ({FLAT} y)"
    " { y = RotaryEmbedding<num_heads = 3>(x, c, i) }",
    "flat interleaved": f"({FLAT} x, {CACHE} c, {CACHE} i) => ({FLAT} y)"
    " { y = RotaryEmbedding<num_heads = 3, interleaved = 1>(x, c, i) }",
    "positions": f"({WHOLE} x, {TABLE} c, {TABLE} i, int64[B, S] p) => ({WHOLE} y)"
    " { y = RotaryEmbedding(x, c, i, p) }",
    "flat positions": f"({FLAT} x, {TABLE} c, {TABLE} i, int64[B, S] p) => ({FLAT} y)"
    " { y = RotaryEmbedding<num_heads = 3>(x, c, i, p) }",
    "partly": f"({WHOLE} x, {SMALL} c, {SMALL} i) => ({WHOLE} y)"
    " { y = RotaryEmbedding<rotary_embedding_dim = 6>(x, c, i) }",
    "inside a graph": f"({FLAT} x, {CACHE} c, {CACHE} i) => ({FLAT} y)"
    " { r = Reshape(x, by_head) t = Transpose<perm = [0, 2, 1, 3]>(r) k = Cos(c) s = Sin(i)"
    " e = RotaryEmbedding(t, k, s) b = Transpose<perm = [0, 2, 1, 3]>(e) y = Reshape(b, flat) }",
}


@pytest.mark.parametrize("name", CASES)
def test_rotary_embedding(name: str, tmp_path: Path) -> None:
    text = CASES[name]
    constants = {"by_head": np.array([0, 0, 3, 8]), "flat": np.array([0, 0, -1])}
    weights = {k: v for k, v in constants.items() if k in text}
    model = parse(text.replace("small", str(HALF - 1)), weights)
    artifact = compile_model(model)
    for batch, length in ((1, 1), (3, 5), (2, 33)):
        given = feeds(text, batch, length)
        (expected,) = ReferenceEvaluator(model).run(None, given)
        assert_close(run_artifact(artifact, tmp_path, given), {"y": expected}, 1e-6)


def test_a_quarter_turn(tmp_path: Path) -> None:
    """cos 0, sin 1: (a, b) becomes (-b, a)."""
    model = parse(CASES["halves"], {})
    x = np.arange(8, dtype=np.float32).reshape(1, 1, 1, 8).repeat(3, axis=1)
    cache = {"c": np.zeros((1, 1, 4), np.float32), "i": np.ones((1, 1, 4), np.float32)}
    found = run_artifact(compile_model(model), tmp_path, {"x": x, **cache})["y"]
    np.testing.assert_array_equal(found[0, 0, 0], [-4, -5, -6, -7, 0, 1, 2, 3])


def test_caches_of_batch_1(tmp_path: Path) -> None:
    """As the torch exporter writes them: the same for the whole batch."""
    text = CASES["halves"].replace("float[B, S, 4]", "float[1, S, 4]")
    model = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 23]> agraph {text}')
    artifact = build_artifact(prepare_model(ir.from_proto(model)))
    given = feeds(CASES["halves"], 1, 7)
    given["x"] = np.random.default_rng(0).standard_normal((3, 3, 7, 8)).astype(np.float32)
    one = parse(CASES["halves"], {})
    expected = [ReferenceEvaluator(one).run(None, {**given, "x": x[None]})[0] for x in given["x"]]
    assert_close(run_artifact(artifact, tmp_path, given), {"y": np.concatenate(expected)}, 1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CASES["flat"].replace("<num_heads = 3>", ""), "num_heads"),
        (
            CASES["partly"].replace("= 6", "= 5").replace("small", "3"),
            "5 of 8 elements",
        ),
        (CASES["partly"].replace("= 6", "= 4").replace("small", "3"), "must have 2 columns"),
    ],
)
def test_what_has_no_kernel(text: str, message: str) -> None:
    model = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 23]> agraph {text}')
    with pytest.raises(UnsupportedError, match=message):
        build_artifact(prepare_model(ir.from_proto(model)))
