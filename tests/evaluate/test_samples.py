"""Seeded inputs: ids inside their tables, masks of ones, dims as asked."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.errors import InputError, UsageError
from qgraph.evaluate.samples import (
    METADATA_KEY,
    InputSpec,
    artifact_ranges,
    choose_dims,
    input_ranges,
    make_inputs,
)

IDS = InputSpec("ids", "int64", ("batch", "sequence"))
MASK = InputSpec("mask", "bool", ("batch", "sequence"))
PIXELS = InputSpec("pixels", "float32", ("batch", 3, 8))


def model(text: str) -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')


def test_ranges_follow_indices_to_their_tables() -> None:
    """The smallest table counts, and reshaping or casting an index does not hide it."""
    graph = model(
        """
        agraph (int64[b, s] ids, int64[b, s] mask, float[b, s] x) => (float[b, s, 4] y, float[n, 4] z)
        <float[10, 4] large = {0}, float[7, 4] small = {0}, int64[1] minus = {-1}>
        {
            y = Gather (large, ids)
            flat = Reshape (ids, minus)
            narrow = Cast <to = 6> (flat)
            z = Gather (small, narrow)
        }
        """.replace("{0}", "{" + ", ".join(["0"] * 40) + "}", 1).replace(
            "{0}", "{" + ", ".join(["0"] * 28) + "}", 1
        )
    )
    assert input_ranges(graph) == {"ids": (0, 6), "mask": (1, 1)}


def test_an_index_into_another_axis() -> None:
    graph = model(
        """
        agraph (int64[s] ids) => (float[2, s] y) <float[2, 3] table = {0, 0, 0, 0, 0, 0}>
        { y = Gather <axis = 1> (table, ids) }
        """
    )
    assert input_ranges(graph) == {"ids": (0, 2)}


@pytest.mark.parametrize(
    ("operator", "rows"), [("QGatherNVFP4", 9), ("QGatherColumnsInt8", 4), ("QGatherColumnsNVFP4", 4)]
)
def test_an_index_into_a_quantized_table(operator: str, rows: int) -> None:
    graph = model("agraph (int64[s] ids) => (int64[s] y) { y = Identity (ids) }")
    codes = ir.Value(name="codes", shape=ir.Shape([9, 4]), type=ir.TensorType(ir.DataType.FLOAT4E2M1))
    graph.graph.append(ir.node(operator, [graph.graph.inputs[0], codes, None, None], domain="ai.qgraph"))
    assert input_ranges(graph) == {"ids": (0, rows - 1)}


def test_data_that_is_gathered_from_is_no_index() -> None:
    graph = model(
        """
        agraph (int64[5] data) => (int64[2] y) <int64[2] at = {0, 1}>
        { y = Gather (data, at) }
        """
    )
    assert input_ranges(graph) == {"data": (1, 1)}


def test_dims() -> None:
    assert choose_dims([IDS, PIXELS], {}) == {"batch": 1, "sequence": 16}
    assert choose_dims([IDS], {"sequence": 3}) == {"batch": 1, "sequence": 3}
    with pytest.raises(UsageError, match="no input has a dim 'length': the model's are batch, sequence"):
        choose_dims([IDS], {"length": 3})
    with pytest.raises(UsageError, match="at least 1"):
        choose_dims([IDS], {"batch": 0})


def test_inputs_are_in_range_and_reproducible() -> None:
    dims = {"batch": 4, "sequence": 50}
    feeds, again = (make_inputs([IDS, MASK, PIXELS], {"ids": (0, 9)}, dims, seed=3) for _ in range(2))
    assert {k: (v.dtype.name, v.shape) for k, v in feeds.items()} == {
        "ids": ("int64", (4, 50)),
        "mask": ("bool", (4, 50)),
        "pixels": ("float32", (4, 3, 8)),
    }
    assert set(feeds["ids"].ravel()) == set(range(10))
    assert feeds["mask"].all()
    assert 0.5 < feeds["pixels"].std() < 1.5
    for name in feeds:
        np.testing.assert_array_equal(feeds[name], again[name])
    other = make_inputs([IDS], {"ids": (0, 9)}, dims, seed=4)
    assert (other["ids"] != feeds["ids"]).any()


def test_a_dim_that_nobody_knows() -> None:
    spec = InputSpec("x", "float32", ("(2 * sequence)",))
    with pytest.raises(UsageError, match=r"'x' has the dim '\(2 \* sequence\)'"):
        make_inputs([spec], {}, {}, seed=0)


def test_ranges_of_an_artifact() -> None:
    def ranges(text: str) -> dict[str, tuple[int, int]]:
        return artifact_ranges(SimpleNamespace(path="m.qg", metadata={METADATA_KEY: text}))  # type: ignore[arg-type]

    assert ranges('{"ids": [0, 96], "mask": [1, 1]}') == {"ids": (0, 96), "mask": (1, 1)}
    assert artifact_ranges(SimpleNamespace(path="m.qg", metadata={})) == {}  # type: ignore[arg-type]
    bad = ["5, 1", "1e30, 2", "true, true", "0, null", "0", "0, 1, 2", f"0, {2**63}", f"0, {'9' * 5000}"]
    for text in (
        *(f'{{"ids": [{pair}]}}' for pair in bad),
        "[[[",
        "[" * 10**5,
        "null",
        '{"ids": 3}',
        "[1]",
        "",
    ):
        with pytest.raises(InputError, match=r"m\.qg: its metadata 'qgraph.input_ranges' is not JSON of"):
            ranges(text)
