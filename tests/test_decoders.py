"""Decoders through the whole chain: what exporters write, with a cache or without, compiled, and judged by
ONNX Runtime on the original and by ONNX's reference evaluator on the low-bit file."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph.evaluate.decoders import Decoder, open_decoder
from qgraph.evaluate.similarity import relative_error
from qgraph.models.export_onnx import quiet
from qgraph.runtime import Model, Session

sys.path.insert(0, str(Path(__file__).parent / "passes"))
from exports import export_case, exported

LIMIT = 1e-3  # of logits that two engines compute; what is found is about 1e-6
MODELS = ("llama-text", "qwen3", "gpt2", "llama-cache", "qwen3-cache", "gpt2-cache")
MATRIX = [
    *(export_case(name, opset, True) for name in MODELS for opset in (18, 20, 23)),
    *(export_case(f"{name}-cache-mask", 17, False) for name in ("llama", "gpt2")),
]
CHUNKS = (5, 1, 4, 1)  # tokens of the steps in which a text is read
# Kernels of attention that was not recognised: products of activations, and the softmax between them.
DECOMPOSED = ("matmul_dynamic", "softmax")


def ids_of(seed: int, batch: int, length: int, vocabulary: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, (batch, length))


def logits_of(decoder: Decoder, ids: np.ndarray, chunks: tuple[int, ...]) -> np.ndarray:
    """Those of all positions of a text that is read in steps."""
    decoder.reset()
    ends = np.cumsum(chunks)
    parts = np.split(ids, ends[:-1], axis=1)
    return np.concatenate([decoder.feed(part) for part in parts], axis=1)


def compiled(model: Path, folder: Path, **options: object) -> qgraph.pipeline.CompileResult:
    return qgraph.compile(
        model, output=folder / "m", include=(() if options["scheme"] == "none" else ("*",)), **options
    )


@pytest.mark.parametrize(("name", "opset", "dynamo"), MATRIX)
def test_an_export_compiles_and_is_the_model(name: str, opset: int, dynamo: bool, tmp_path: Path) -> None:
    original = tmp_path / "original.onnx"
    ir.save(exported(name, opset, dynamo), original)
    # `compile` itself compares with the reference evaluator, to 1e-4; with a cache in several steps.
    exact = compiled(original, tmp_path, scheme="none")
    assert exact.report.verification.status == "passed"
    model = exact.load()
    assert model.has_state == ("-cache" in name)
    assert not [s.kernel for s in model.steps if any(word in s.kernel for word in DECOMPOSED)]
    ours, theirs = open_decoder(exact.artifact or ""), open_decoder(original)
    for batch in (1, 3):
        ids = ids_of(batch, batch, sum(CHUNKS))
        want = logits_of(theirs, ids, CHUNKS)
        assert relative_error(logits_of(ours, ids, CHUNKS), want) < LIMIT
        ours.reset()
        np.testing.assert_allclose(ours.feed(ids, last=True), want[:, -1:], rtol=LIMIT, atol=LIMIT)
    lowbit = compiled(original, tmp_path, scheme="nvfp4")
    assert lowbit.report.verification.status == "passed"
    assert all(layer.realised for layer in lowbit.report.quantized)


# A text of 200 tokens

LENGTH = 200


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(original, its float artifact) of a small Llama with a cache, and a mask so that texts may differ in
    length."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from qgraph.models.causal_lm import CausalLM

    folder = tmp_path_factory.mktemp("masked")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    with quiet():
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "hf")
        original = CausalLM(folder / "hf").export(folder / "original.onnx", mask=True)
    result = qgraph.compile(original, scheme="none", output=folder / "m", onnx=False, verify=False)
    assert result.artifact is not None
    return original, result.artifact


@pytest.fixture
def session(masked: tuple[Path, Path]) -> Iterator[Session]:
    with qgraph.load(masked[1]) as model:
        yield model.session(capacity=LENGTH)


def feeds(ids: np.ndarray, padding: list[int], start: int, stop: int) -> dict[str, np.ndarray]:
    """Tokens start .. stop - 1 of texts that begin with some padding."""
    left = np.array(padding)[:, None]
    return {
        "input_ids": ids[:, start:stop],
        "attention_mask": (np.arange(stop)[None, :] >= left).astype(np.int64),
        "position_ids": np.maximum(np.arange(start, stop)[None, :] - left, 0),
    }


def by_token(session: Session, ids: np.ndarray, padding: list[int], start: int = 0) -> np.ndarray:
    steps = range(start, ids.shape[1])
    return np.concatenate([session.run(feeds(ids, padding, i, i + 1))["logits"] for i in steps], axis=1)


@pytest.mark.parametrize("padding", [[0], [0, 7, 40]], ids=["one text", "three of different lengths"])
def test_token_by_token_is_the_full_pass(
    masked: tuple[Path, Path], session: Session, padding: list[int]
) -> None:
    ids = ids_of(5, len(padding), LENGTH)
    full = session.run(feeds(ids, padding, 0, LENGTH))["logits"]
    # Each text by itself, and without padding, in ONNX Runtime.
    for row, left in enumerate(padding):
        alone = open_decoder(masked[0]).feed(ids[row : row + 1, left:])
        assert relative_error(full[row : row + 1, left:], alone) < LIMIT
    session.reset()
    assert session.length == 0
    stepped = by_token(session, ids, padding)
    assert session.length == LENGTH
    for row, left in enumerate(padding):
        difference = np.abs(stepped[row, left:] - full[row, left:]).max(axis=-1)
        assert (difference < LIMIT * np.abs(full[row, left:]).max(axis=-1)).all()


def test_what_was_forked_or_cut_goes_on_as_if_it_were_new(session: Session) -> None:
    padding, at = [0, 7, 40], 100
    ids = ids_of(6, 3, LENGTH)
    full = session.run(feeds(ids, padding, 0, LENGTH))["logits"]
    session.truncate(at)
    forked = session.fork()
    rows = [2, 0, 2]
    chosen = session.fork()
    chosen.copy_state(session, rows=rows)
    tail = by_token(session, ids, padding, at)
    assert relative_error(tail, full[:, at:]) < LIMIT
    assert forked.length == at  # of its own, whatever the other does
    np.testing.assert_array_equal(by_token(forked, ids, padding, at), tail)
    found = by_token(chosen, ids[rows], [padding[i] for i in rows], at)
    assert relative_error(found, full[rows, at:]) < LIMIT
    # Others' tokens in between leave nothing behind.
    session.truncate(at)
    session.run(feeds(ids_of(7, 3, LENGTH), padding, at, at + 30))
    session.truncate(at)
    assert relative_error(by_token(session, ids, padding, at), full[:, at:]) < LIMIT


def test_memory_stays_flat_over_ten_thousand_steps(session: Session) -> None:
    """A rolling reset: when the state is full, its first half is what the text goes on from."""
    ids, token = ids_of(8, 1, LENGTH), ids_of(9, 1, 1)
    by_token(session, ids, [0])
    memory, peak = session.memory, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10_000):
        if session.length == session.capacity:
            session.truncate(LENGTH // 2)
        at = session.length
        inputs = {
            "input_ids": token,
            "attention_mask": np.ones((1, at + 1), np.int64),
            "position_ids": np.array([[at]]),
        }
        session.run(inputs, dims={"logits": 1})
    assert session.memory == memory
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2048  # KiB


def test_a_full_state_says_what_to_do(session: Session) -> None:
    ids = ids_of(10, 1, LENGTH + 1)
    session.run(feeds(ids, [0], 0, LENGTH))
    with pytest.raises(qgraph.errors.QGraphError, match="capacity"):
        session.run(feeds(ids, [0], LENGTH, LENGTH + 1))
    assert session.length == LENGTH


def test_int8_caches(masked: tuple[Path, Path], tmp_path: Path) -> None:
    """An eighth of the bits and more: close to the float cache, and exactly what the low-bit file says."""
    result = qgraph.compile(masked[0], scheme="none", kv_cache="int8", output=tmp_path / "m")
    assert result.report.verification.status == "passed"
    ids = ids_of(11, 2, 64)
    exact, rounded = (open_decoder(path, capacity=64) for path in (masked[1], result.artifact or ""))
    want, got = exact.feed(ids), rounded.feed(ids)
    assert 1e-5 < relative_error(got, want) < 0.05
    size = {
        name: _state_bytes(path) for name, path in (("float", masked[1]), ("int8", result.artifact or ""))
    }
    heads, width = 2 * 2 * 2, 16  # layers, keys and values, heads
    assert size["float"] - size["int8"] == heads * (4 * width - (width + 4))


def _state_bytes(path: Path | str) -> int:
    """What a token of one text takes."""
    model: Model = qgraph.load(path)
    found = []
    for capacity in (64, 128):
        session = model.session(capacity=capacity)
        ids = ids_of(0, 1, 1)
        session.run(feeds(ids, [0], 0, 1))
        found.append(session.memory)
    return (found[1] - found[0]) // 64


def test_the_artifact_tells_its_cache(masked: tuple[Path, Path]) -> None:
    pairs = json.loads(qgraph.load(masked[1]).metadata["qgraph.cache"])
    assert pairs == [
        [f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"]
        for layer in range(2)
        for part in ("key", "value")
    ]
