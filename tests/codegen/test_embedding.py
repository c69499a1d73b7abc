"""Lookups in NVFP4 tables, compiled: the same bits as ONNX's reference evaluator on the low-bit model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from end_to_end import parse, run_artifact
from kernel_harness import native_isas
from onnx.reference import ReferenceEvaluator

from qgraph.codegen import Artifact, build_artifact
from qgraph.errors import QGraphError
from qgraph.passes import prepare_model
from qgraph.passes.lowbit_functions import AddLowbitFunctions
from qgraph.passes.quantize_weights import QuantizeWeights
from qgraph.passes.select_layers import SelectLayers

V, H = 131, 45  # an odd number of columns, a shorter last block
TEXT = """(int64[b, s] ids, int32[s] at) => (float[b, s, 45] y, float[b, s, 45] again, float[s, 45] places) {
    [word] y = Gather(words, ids) [next] more = Add(ids, one) [word2] again = Gather(words, more)
    [place] places = Gather(places_w, at) }"""


@pytest.fixture(scope="module")
def lowbit() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = {
        "words": rng.standard_normal((V, H)).astype(np.float32),
        "places_w": rng.standard_normal((100, H)).astype(np.float32),
        "one": np.array(1),
    }
    model = prepare_model(ir.from_proto(parse(TEXT, weights)))
    for step in (SelectLayers(embeddings="nvfp4"), QuantizeWeights("nvfp4"), AddLowbitFunctions()):
        step(model)
    return ir.to_proto(model)


@pytest.fixture(scope="module")
def artifact(lowbit: onnx.ModelProto) -> Artifact:
    return build_artifact(prepare_model(ir.from_proto(lowbit)))


def feeds(batch: int, length: int) -> Mapping[str, np.ndarray]:
    rng = np.random.default_rng(length)
    return {
        "ids": rng.integers(-V, V - 1, (batch, length)),
        "at": rng.integers(-100, 100, length).astype(np.int32),
    }


@pytest.mark.parametrize("isa", native_isas(), ids=lambda i: i.name)
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 150)])
def test_same_bits(
    isa, shape: tuple[int, int], lowbit: onnx.ModelProto, artifact: Artifact, tmp_path: Path
) -> None:
    inputs = feeds(*shape)
    want = ReferenceEvaluator(lowbit).run(None, dict(inputs))
    got = run_artifact(artifact, tmp_path, inputs, isa=isa.name)
    for a, b in zip(got.values(), want, strict=True):
        assert a.tobytes() == b.tobytes()


def test_kernels_and_bytes(artifact: Artifact) -> None:
    """One kernel for each type of indices; no float of the tables is left."""
    assert [(layer.node_name, layer.kernel, layer.compute) for layer in artifact.layers] == [
        (name, "gather_nvfp4", "NVFP4 table, float32 rows") for name in ("word", "word2", "place")
    ]
    assert len([spec for spec in artifact.plan.kernels if spec.op == "gather_nvfp4"]) == 2
    weights = {t.name: t.data.shape for t in artifact.tensors if t.name.startswith("w/words")}
    assert weights == {
        "w/words.codes/rows": (V, 6),
        "w/words.codes/rows/block_scale": (V, 3),
        "w/words.codes/global_scale": (1,),
    }


@pytest.mark.parametrize("bad", [V - 1, -V - 2])
def test_out_of_range(bad: int, artifact: Artifact, tmp_path: Path) -> None:
    """`again` looks up the next id: here that is outside of the table."""
    inputs = dict(feeds(2, 7))
    inputs["ids"][1, 3] = bad
    with pytest.raises(QGraphError, match=r"word.*out of range"):
        run_artifact(artifact, tmp_path, inputs)
