"""Causal language models: exports of random ones at two opsets, compiled, and the trained ones where they
are."""

from __future__ import annotations

import importlib.util
import itertools
import os
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import pytest
from click.testing import CliRunner

import qgraph
from qgraph.errors import InputError, UnsupportedError, UsageError
from qgraph.evaluate.perplexity import perplexity, split_windows
from qgraph.evaluate.runners import open_runner
from qgraph.evaluate.similarity import relative_error
from qgraph.evaluate.tokenizer import leading_tokens, load_tokenizer, read_documents
from qgraph.models import get_model, open_model
from qgraph.models.__main__ import main
from qgraph.models.causal_lm import CausalLM
from qgraph.models.export_onnx import quiet

DATA = Path(os.environ.get("QGRAPH_DATA", Path(__file__).parents[3] / "shared" / "data"))
STORIES = DATA / "stories260K"
TEXT = DATA / "text" / "tinystories_v2_gpt4_train_first10k_lines.txt"

NEEDED = ("torch", "transformers", "onnxscript")
needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in NEEDED), reason=f"needs {', '.join(NEEDED)}"
)
needs_data = pytest.mark.skipif(
    not (STORIES / "stories260K.onnx").is_file() or not TEXT.is_file(), reason=f"no trained models in {DATA}"
)


def llama(folder: Path) -> Path:
    """A random Llama of 1 layer with grouped heads and tied embeddings, saved as transformers saves them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=300,
        tie_word_embeddings=True,
    )
    with quiet():
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@needs_packages
@pytest.mark.parametrize("mask", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export_with_cache(mask: bool, tmp_path: Path) -> None:
    """ONNX Runtime against torch: a text, or several padded on the left, cut in two anywhere."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = llama(tmp_path / "tiny-llama")
    path = CausalLM(folder).export(tmp_path / "model.onnx", mask=mask)
    runner = open_runner(path)
    text = ("input_ids", "attention_mask", "position_ids") if mask else ("input_ids",)
    assert runner.inputs == (*text, "past_key_values.0.key", "past_key_values.0.value")
    assert runner.outputs == ("logits", "present.0.key", "present.0.value")
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    for batch, past, length in itertools.product((1, 3), (0, 1, 5), (1, 4)):
        ids = rng.integers(0, 96, (batch, past + length))
        kept = np.ones_like(ids)
        if mask and past > 1:
            kept[0, :past] = 0  # nothing of the past is text
        positions = np.maximum(kept.cumsum(1) - 1, 0)
        with torch.no_grad():
            given = {"input_ids": ids, "attention_mask": kept, "position_ids": positions}
            wanted = module(**{name: torch.from_numpy(array) for name, array in given.items()})
        (layer,) = wanted.past_key_values.layers
        feeds = {"input_ids": ids[:, past:], "attention_mask": kept, "position_ids": positions[:, past:]}
        feeds = {name: feeds[name] for name in text}
        feeds["past_key_values.0.key"] = layer.keys[:, :, :past].numpy()
        feeds["past_key_values.0.value"] = layer.values[:, :, :past].numpy()
        found = runner.run(feeds)
        for name, array in (
            ("logits", wanted.logits[:, past:]),
            ("present.0.key", layer.keys),
            ("present.0.value", layer.values),
        ):
            assert relative_error(found[name], array.numpy()) < 1e-5, (batch, past, length, name)
    if mask:
        again = CausalLM(folder).export(tmp_path / "again.onnx", mask=mask)
        assert again.read_bytes() == path.read_bytes()


@needs_packages
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("Mistral", r"layer 0 \(DynamicSlidingWindowLayer\) of MistralForCausalLM"),
        ("Mamba", "MambaForCausalLM"),
    ],
)
def test_other_caches_are_refused(kind: str, reason: str, tmp_path: Path) -> None:
    import transformers

    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1}
    if kind == "Mistral":
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    with quiet():
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path / "hf")
    with pytest.raises(UnsupportedError, match=f"{reason} does not keep the keys and values.*--no-cache"):
        CausalLM(tmp_path / "hf").export(tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_options_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    given: dict[str, object] = {}

    def export(self, path, *, cache=True, mask=False, opset=0, verbose=False) -> Path:
        given.update(cache=cache, mask=mask, opset=opset)
        Path(path).write_bytes(b"")
        return Path(path)

    monkeypatch.setattr(CausalLM, "export", export)
    run = CliRunner().invoke
    model, path = str(tmp_path), str(tmp_path / "model.onnx")
    assert run(main, ["export", model, path]).exit_code == 0
    assert given == {"cache": True, "mask": False, "opset": 0}
    assert run(main, ["export", model, path, "--no-cache", "--mask", "--opset", "20"]).exit_code == 0
    assert given == {"cache": False, "mask": True, "opset": 20}
    refused = run(main, ["export", "minilm", path, "--no-cache", "--opset", "20"])
    assert isinstance(refused.exception, UsageError)
    assert str(refused.exception) == (
        "minilm is no causal language model: it is exported without --no-cache, --opset"
    )


def compile_float(model: Path, folder: Path) -> Path:
    """The artifact of `model` with nothing quantized."""
    qgraph.compile(model, scheme="none", output=folder / "float", verify=False)
    return folder / "float.qg"


@needs_packages
@pytest.mark.parametrize("opset", [pytest.param(20, marks=pytest.mark.slow), 23])
def test_export_compiles(opset: int, tmp_path: Path) -> None:
    folder = llama(tmp_path / "tiny-llama")
    model = open_model(str(folder))
    assert (model.name, model.output, [i.name for i in model.inputs]) == (
        "tiny-llama",
        "logits",
        ["input_ids"],
    )
    path = CausalLM(folder).export(tmp_path / "model.onnx", cache=False, opset=opset)
    compare(path, compile_float(path, tmp_path), 96)


def compare(model: Path, artifact: Path, vocabulary: int) -> None:
    original, compiled = open_runner(model), open_runner(artifact)
    rng = np.random.default_rng(0)
    for batch in (1, 3):
        for length in (1, 7, 64, 256):
            feeds = {"input_ids": rng.integers(0, vocabulary, (batch, length))}
            wanted, found = original.run(feeds)["logits"], compiled.run(feeds)["logits"]
            assert found.shape == wanted.shape == (batch, length, vocabulary)
            assert relative_error(found, wanted) < 1e-5, (batch, length)


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no Hugging Face model"):
        open_model(str(tmp_path))
    with pytest.raises(UsageError, match="no folder"):
        open_model(str(tmp_path / "missing"))
    assert open_model("minilm").name == get_model("minilm").name
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        open_model(str(tmp_path)).tokenizer_path()


@needs_packages
def test_config_of_no_causal_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(InputError, match="no causal language model"):
        open_model(str(tmp_path)).export(tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@needs_data
def test_stories260k_in_float(tmp_path: Path) -> None:
    """An export that is not ours: opset 20, no mask, its positions checked for restarts."""
    model = STORIES / "stories260K.onnx"
    compare(model, compile_float(model, tmp_path), 512)


@needs_data
def test_stories260k_in_nvfp4(tmp_path: Path) -> None:
    """The layers that the published figures are for, and the first of these figures: 100 stories cut at 512
    tokens, BOS before each, is perplexity 3.688 in float and 4.148 in NVFP4 by rounding to nearest."""
    pytest.importorskip("tokenizers")
    model = STORIES / "stories260K.onnx"
    result = qgraph.compile(model, solver="rtn", embeddings="float", output=tmp_path / "rtn", verify=False)
    kept = [layer for layer in result.report.layers if not layer.scheme]
    assert [layer.shape for layer in kept if layer.kind == "linear"] == [(64, 512)]  # tied to the embedding
    assert sum(layer.scheme == "nvfp4" for layer in result.report.layers) == 35
    tokenizer = load_tokenizer(STORIES / "hf" / "tokenizer.json")
    stories = read_documents(TEXT, tokenizer, separator="<|endoftext|>")[:100]
    windows = split_windows(
        [story[:511] for story in stories], length=512, stride=256, prefix=leading_tokens(tokenizer)
    )
    before = perplexity(open_runner(model), windows)
    after = perplexity(open_runner(tmp_path / "rtn.qg"), windows)
    assert before.tokens == after.tokens == 36664
    assert before.perplexity == pytest.approx(3.6876, abs=5e-4)
    assert after.perplexity == pytest.approx(4.1476, abs=5e-4)
