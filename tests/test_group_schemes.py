"""Ternary and integer schemes through the whole chain, on a small decoder: K of 200 and 172, grouped heads,
tied embeddings. And that files are as large as their bits per weight say."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qgraph
from qgraph.errors import UsageError
from qgraph.evaluate.runners import ReferenceRunner
from qgraph.evaluate.similarity import relative_error
from qgraph.models.export_onnx import quiet
from qgraph.pipeline import CompileResult
from qgraph.report.artifact import read_artifact
from qgraph.schemes import SCHEMES

GROUPS = [name for name, scheme in SCHEMES.items() if scheme.weight_format == name and name != "nvfp4"]
HIDDEN, FFN, VOCABULARY = 200, 172, 96
ALL = {"reorder": "gather", "dual_scale": "on", "mean_shift": "all"}

# What an ONNX file has besides weights, a layer: names, shapes, metadata, and once the operators' bodies.
GRAPH_BYTES = 8000


def tokens(seed: int, batch: int = 8, length: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from qgraph.models.causal_lm import CausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    with quiet():
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "hf")
        return CausalLM(folder / "hf").export(folder / "llama.onnx", cache=False)


def compiled(model: Path, folder: Path, name: str, **options: object) -> CompileResult:
    """Compiled, which compares the artifact with ONNX's reference evaluator to 1e-4."""
    result = qgraph.compile(model, output=folder / name, strict=True, **options)
    check = result.report.verification
    assert check is not None and check.status == "passed" and check.worst < 1e-4
    return result


def feeds(result: CompileResult, ids: np.ndarray) -> dict[str, np.ndarray]:
    known = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return {tensor.name: known[tensor.name] for tensor in result.load().inputs}


@pytest.mark.parametrize("options", [{}, ALL, {"packing": "small"}], ids=["plain", "all", "small"])
def test_ternary_calibrated(decoder: Path, tmp_path: Path, options: dict[str, str]) -> None:
    """Every step around a layer at once, too: what is stored is what ONNX's evaluator computes."""
    samples = [{"input_ids": tokens(1), "attention_mask": np.ones_like(tokens(1))}] * 2
    names = {value.name for value in onnx.load(decoder).graph.input}
    samples = [{name: array for name, array in sample.items() if name in names} for sample in samples]
    result = compiled(decoder, tmp_path, "out", scheme="ternary", calibration=samples, **options)
    quantized = [layer for layer in result.report.quantized if layer.kind == "linear"]
    # The head is the embedding, too: 8 bits.
    assert sorted(layer.scheme for layer in quantized) == ["int8", *["ternary"] * 14]
    assert [layer.scheme for layer in result.report.of_kind("embedding")] == ["int8"]
    assert all(layer.output_error is not None and layer.realised for layer in quantized)
    held_out = feeds(result, tokens(2, batch=3, length=9))
    (got,) = result.load().run(held_out).values()
    (want,) = ReferenceRunner(result.onnx).run(held_out).values()
    assert relative_error(got, want) < 1e-4


def test_a_scheme_for_every_layer(decoder: Path, tmp_path: Path) -> None:
    """All formats in one model, written out in standard operators and built again from there."""
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    layers = [f"*{kind}*={GROUPS[i % len(GROUPS)]}" for i, kind in enumerate(kinds)]
    options = {"scheme": "nvfp4", "layers": ["*=int8", *layers], "onnx_style": "qdq"}
    result = compiled(decoder, tmp_path, "mixed", **options)
    assert {layer.scheme for layer in result.report.quantized} == set(GROUPS)
    again = qgraph.build(result.onnx, output=tmp_path / "again", verify=False, strict=True)
    assert again.artifact.read_bytes() == result.artifact.read_bytes()


@pytest.mark.parametrize("scheme", [s.name for s in SCHEMES.values() if s.activation_format == "int8"])
def test_int8_activations_are_multiplied_in_integers(decoder: Path, tmp_path: Path, scheme: str) -> None:
    """All layers; the head, which is the embedding, by 8-bit weights. Packed small, ternary ones are not."""
    result = compiled(decoder, tmp_path, "out", scheme=scheme, solver="rtn")
    linear = [layer for layer in result.report.quantized if layer.kind == "linear"]
    assert len(linear) == 15 and all(layer.compute.endswith("integer products") for layer in linear)
    assert [layer.activations for layer in linear] == ["int8"] * 15
    assert {layer.scheme for layer in linear} == {SCHEMES[scheme].weight_format, "int8"}
    if scheme == "ternary-w2a8":
        result = compiled(decoder, tmp_path, "small", scheme=scheme, solver="rtn", packing="small")
        computed = {layer.compute for layer in result.report.quantized if layer.scheme == "ternary"}
        assert computed == {"W2A8 emulated: ternary weights, int8 activations, float32 products"}
        assert read_artifact(result.artifact).metadata["qgraph.packing"] == "small"


def test_the_packing_is_chosen_where_an_artifact_is_built(decoder: Path, tmp_path: Path) -> None:
    files = {}
    for packing in ("fast", "small"):
        result = compiled(decoder, tmp_path, packing, scheme="ternary", solver="rtn", packing=packing)
        again = qgraph.build(result.onnx, output=tmp_path / "again", packing=packing, verify=False)
        files[packing] = again.artifact.read_bytes()
        assert files[packing] == result.artifact.read_bytes()
    assert len(files["small"]) < len(files["fast"])
    plain = compiled(decoder, tmp_path, "int4", scheme="int4", solver="rtn")
    with pytest.raises(UsageError, match="packing 'small' is for ternary weights, and there are none"):
        qgraph.build(plain.onnx, output=tmp_path / "again", packing="small")


def one_layer(path: Path, K: int, N: int) -> Path:
    weight = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", N])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
    return path


@pytest.mark.parametrize(
    ("scheme", "packing", "shape"),
    [
        *((scheme, "fast", (1024, 512)) for scheme in GROUPS),
        ("ternary", "small", (1024, 512)),
        ("ternary", "small", (172, 200)),
        ("int3", "fast", (172, 200)),
        ("int4", "fast", (172, 200)),
    ],
)
def test_files_are_as_large_as_the_bits_say(
    tmp_path: Path, scheme: str, packing: str, shape: tuple[int, int]
) -> None:
    """To 2 % beside the graph, in the ONNX file, and the plan and the code, in the artifact. Weights in the
    artifact are padded to 16 columns, and int3's to 32 inputs."""
    K, N = shape
    model = one_layer(tmp_path / "layer.onnx", K, N)
    result = qgraph.compile(model, output=tmp_path / "out", scheme=scheme, packing=packing, verify=False)
    (layer,) = result.report.layers
    claimed = layer.onnx_bits * K * N / 8
    assert 0 <= result.onnx.stat().st_size - claimed < GRAPH_BYTES
    assert layer.onnx_bits == pytest.approx(layer.bits_per_weight + (scheme == "int3"), rel=0.02)
    header = int.from_bytes(result.artifact.read_bytes()[:8], "little")
    document = json.loads(result.artifact.read_bytes()[8 : 8 + header])
    other = sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in document.items()
        if name != "__metadata__" and not name.startswith("w/")
    )
    stored = result.artifact.stat().st_size - 8 - header - other
    assert stored == pytest.approx(layer.artifact_bits * K * N / 8)
    padded = -(-K // 32) * 32 * -(-N // 16) * 16 / (K * N)  # the most that padding can add
    bits = layer.bits_per_weight if packing == "fast" else layer.bits_per_weight - 2 + 1.625
    assert bits * 0.98 <= layer.artifact_bits <= bits * padded * 1.02
    if shape == (1024, 512):
        assert bits == pytest.approx(SCHEMES[scheme].bits_per_weight - (packing == "small") * 0.375, rel=1e-3)
