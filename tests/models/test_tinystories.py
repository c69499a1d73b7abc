"""The decoder that ships: its files, its export, what it makes of stories and what it writes."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import pytest

from qgraph.evaluate.decoders import open_decoder, open_text_runner
from qgraph.evaluate.perplexity import PerplexityResult, perplexity, split_windows
from qgraph.evaluate.tokenizer import leading_tokens, load_tokenizer, read_documents
from qgraph.models import get_model
from qgraph.models.tinystories import HELD_OUT, SEPARATOR

NEEDED = ("torch", "transformers", "onnxscript", "tokenizers")
needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in NEEDED), reason=f"needs {', '.join(NEEDED)}"
)
FOLDER = get_model("tinystories").tokenizer_path().parent


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return get_model("tinystories").export(tmp_path_factory.mktemp("tinystories") / "model.onnx")


# Greedy text, whose least lead over the second best logit is above 0.01: rounding does not change it.
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine. "
    "One day, she saw a big, red ball in the park. She was very happy.\n"
    "Lily went to the park with her mom. She saw a big"
)
PERPLEXITY = 13.706  # of held_out.txt, by torch in float32


def score(path: Path, documents: list) -> PerplexityResult:
    windows = split_windows(documents, length=512, stride=256, prefix=(0,))
    return perplexity(open_text_runner(path), windows)


def test_files() -> None:
    """Small float16 weights, and a tokenizer that loses nothing and begins a text with the separator."""
    from safetensors import safe_open

    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size <= 8e6
    with safe_open(weights, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float16)}
    assert all(np.isfinite(t).all() for t in tensors.values())
    assert 3e6 < sum(t.size for t in tensors.values()) < 4e6
    config = json.loads((FOLDER / "config.json").read_text())
    tokenizer = load_tokenizer(FOLDER / "tokenizer.json")
    assert tokenizer.get_vocab_size() == config["vocab_size"] == len(tensors["model.embed_tokens.weight"])
    assert leading_tokens(tokenizer) == [config["eos_token_id"]] == [tokenizer.token_to_id(SEPARATOR)]
    text = HELD_OUT.read_text("utf-8") + "\ttwo  spaces, ümläuts and 漢字\n"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text.replace(SEPARATOR, "")


@needs_packages
def test_reads_stories(exported: Path) -> None:
    """It predicts English, and needs its order: shuffled words are no story."""
    stories = read_documents(HELD_OUT, load_tokenizer(FOLDER / "tokenizer.json"), separator=SEPARATOR)
    assert len(stories) == 16
    found = score(exported, stories)
    assert found.tokens == sum(map(len, stories))
    assert found.perplexity == pytest.approx(PERPLEXITY, abs=0.002)
    rng = np.random.default_rng(0)
    assert score(exported, [rng.permutation(story) for story in stories]).perplexity > 10 * found.perplexity


@needs_packages
def test_writes_a_story(exported: Path) -> None:
    """Greedily, with the cache and without, it writes what is known."""
    tokenizer = load_tokenizer(FOLDER / "tokenizer.json")
    ids = tokenizer.encode("Once upon a time, there was a little").ids
    decoder = open_decoder(exported)
    logits = decoder.feed(np.array([ids]), last=True)[0, -1]
    for _ in range(48):
        ids.append(int(logits.argmax()))
        logits = decoder.feed(np.array([ids[-1:]]))[0, -1]
    assert tokenizer.decode(ids) == STORY
    decoder.reset()
    whole = decoder.feed(np.array([ids]))[0]
    assert whole.argmax(-1)[-49:-1].tolist() == ids[-48:]
    np.testing.assert_allclose(whole[-1], logits, atol=1e-3)
