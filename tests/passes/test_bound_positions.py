"""Lengths are bounded by tables that are looked up by position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from prepare_harness import parse, run_ort

import qgraph
from qgraph.errors import InputError
from qgraph.passes import prepare_model
from qgraph.passes.bound_positions import BoundPositions
from qgraph.passes.infer_shapes import CHECKS, InferShapes

# Positions from `past` on, `offset` further down the table.
TEXT = """(int64[b, s] ids, float[b, 2, p, 4] kv) => (float[s, 8] y)
{
    n = Shape<start = 1, end = 2>(ids)
    m = Shape<start = 2, end = 3>(kv)
    first = Squeeze(m)
    all = Add(m, n)
    last = Squeeze(all)
    places = Range(first, last, one)
    at = Add(places, offset)
    y = Gather(table, at)
}"""


def bounds(offset: int, step: int = 1) -> list[tuple[str, str]]:
    model = parse(
        TEXT,
        table=np.zeros((40, 8), np.float32),
        offset=np.array(offset, np.int64),
        one=np.array(step, np.int64),
    )
    InferShapes()(model)
    bound = BoundPositions()
    bound(model)
    assert not bound(model).modified
    return [(str(a), str(b)) for a, b, message in model.graph.meta[CHECKS] if "'table'" in message]


@pytest.mark.parametrize("offset", [0, 2])
def test_the_last_position_is_in_the_table(offset: int) -> None:
    assert bounds(offset) == [(str(40 - offset), "p + s")]


def test_indices_that_fall_are_left_to_the_run() -> None:
    model = parse(
        """(float[s] x) => (float[s, 8] y)
        {
            n = Shape(x) last = Squeeze(n) at = Range(zero, last, one)
            down = Sub(top, at) y = Gather(table, down)
        }""",
        table=np.zeros((40, 8), np.float32),
        zero=np.array(0, np.int64),
        one=np.array(1, np.int64),
        top=np.array(39, np.int64),
    )
    prepare_model(model)
    assert not model.graph.meta[CHECKS]
    run_ort(model, {"x": np.zeros(5, np.float32)})


def test_the_artifact_knows_how_long_a_text_may_be(tmp_path: Path) -> None:
    model = parse(
        """(int64[b, s] ids) => (float[b, s, 32] y)
        {
            n = Shape<start = 1>(ids) last = Squeeze(n) at = Range(zero, last, one)
            e = Gather(words, ids) p = Gather(table, at) y = Add(e, p)
        }""",
        words=np.ones((9, 32), np.float32),
        table=np.arange(40 * 32, dtype=np.float32).reshape(40, 32),
        zero=np.array(0, np.int64),
        one=np.array(1, np.int64),
    )
    ir.save(model, tmp_path / "m.onnx")
    artifact = qgraph.load(qgraph.compile(tmp_path / "m.onnx", scheme="none").artifact or "")
    assert {dim.name: dim.max for dim in artifact.dims}["s"] == 40
    assert artifact.run({"ids": np.zeros((1, 40), np.int64)})["y"].shape == (1, 40, 32)
    with pytest.raises(InputError, match="40"):
        artifact.run({"ids": np.zeros((1, 41), np.int64)})
