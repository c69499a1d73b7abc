"""The verbs on a decoder whose cache is state of the artifact."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny_decoder import VOCABULARY, build_decoders

from qgraph.cli import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_decoders(tmp_path_factory.mktemp("decoders"))


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]):
    """Runs the command line: (exit code, stdout, stderr)."""

    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(arg) for arg in args])
        return (code, *capsys.readouterr())

    return call


def test_run_begins_with_an_empty_cache(folder: Path, shown) -> None:
    code, out, err = shown("run", folder / "cache1.qg", "--dim", "batch=2", "--dim", "sequence=5", "--json")
    assert code == 0, err
    found = {tensor["name"]: tensor["shape"] for tensor in json.loads(out)["tensors"]}
    assert found == {
        "input_ids": [2, 5],
        "attention_mask": [2, 5],
        "position_ids": [2, 5],
        "logits": [2, 5, VOCABULARY],
    }
    code, out, err = shown("run", folder / "cache1.qg", "--dim", "total_sequence=4", "--json")
    assert code == 0 and json.loads(out)["tensors"][0]["shape"] == [1, 4]
    both = ("--dim", "total_sequence=4", "--dim", "sequence=3")
    code, out, err = shown("run", folder / "cache1.qg", *both)
    assert code == 3 and "total_sequence" in err


def test_check_compares_a_text_from_its_start(folder: Path, tmp_path: Path, shown) -> None:
    references = ("--lowbit", folder / "cache1.onnx", "--original", folder / "cache1.onnx")
    code, out, err = shown("check", folder / "cache1.qg", *references, "--dim", "batch=3", "--json")
    assert code == 0, err
    rows = json.loads(out)["comparisons"]
    assert [(row["against"], row["output"], row["ok"]) for row in rows] == [
        ("lowbit", "logits", True),
        ("original", "logits", True),
    ]
    assert max(row["rel_error"] for row in rows) < 1e-5
    model = onnx.load(folder / "cache1.onnx")
    tensor = next(t for t in model.graph.initializer if t.name == "norm.weight")
    tensor.CopyFrom(numpy_helper.from_array(1.01 * numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, tmp_path / "changed.onnx")
    code, out, err = shown("check", folder / "cache1.qg", "--lowbit", tmp_path / "changed.onnx")
    assert code == 5 and "logits against lowbit" in err
    code, out, err = shown("check", folder / "cache1.qg", "--original", folder / "cache0.onnx")
    assert code == 3 and "'past_key_values.0.key', which is part of the cache" in err


def test_bench_times_prompts_and_tokens(folder: Path, shown) -> None:
    options = ("--dim", "sequence=12", "--decode", 4, "--repeat", 2, "--threads", 1)
    code, out, err = shown(
        "bench", folder / "cache1.qg", "--onnx", folder / "cache1.onnx", *options, "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert (found["batch"], found["prompt_tokens"], found["decoded_tokens"]) == (1, 12, 4)
    assert [row["name"].split()[0] for row in found["decoding"]] == ["qgraph", "ONNX"]
    for row in found["decoding"]:
        assert (row["prompt"]["runs"], row["step"]["runs"]) == (2, 8)
        assert row["step"]["median_ms"] > 0
    code, out, err = shown("bench", folder / "cache1.qg", *options)
    assert code == 0, err
    assert out.startswith("1 thread; 1 x 12 tokens, then 4, one a run\n")
    np.savez(folder / "inputs.npz", input_ids=np.ones((1, 3), np.int64))
    code, out, err = shown("bench", folder / "cache1.qg", "--input", folder / "inputs.npz")
    assert code == 2 and "seeded tokens" in err
    code, out, err = shown("bench", folder / "cache0.qg", "--decode", 3)
    assert code == 2 and "no state to decode with" in err


def test_profile_of_a_token_behind_others(folder: Path, shown) -> None:
    options = ("--past", 20, "--dim", "sequence=1", "--repeat", 2, "--threads", 1)
    code, out, err = shown("profile", folder / "cache1.qg", *options)
    assert code == 0, err
    assert "behind 20 tokens" in out and "attention_decode" in out and "layer.1.attention" in out
    np.savez(folder / "odd.npz", input_ids=np.ones((1, 3), np.int64))  # an input is missing
    code, out, err = shown("profile", folder / "cache1.qg", "--input", folder / "odd.npz")
    assert code == 3 and "'attention_mask' is missing" in err
    code, out, err = shown("profile", folder / "cache0.qg", *options)
    assert code == 2 and "--past is for decoders with state" in err


def test_run_and_check_make_room_for_their_tokens(folder: Path, shown) -> None:
    tokens = ("--dim", "sequence=2100")  # more than a session has room for by default
    code, _, err = shown("run", folder / "cache1.qg", *tokens, "--json")
    assert code == 0, err
    code, _, err = shown("check", folder / "cache1.qg", "--original", folder / "cache1.onnx", *tokens)
    assert code == 0, err


@pytest.mark.parametrize("name", ["cache0.qg", "cache1.qg", "cache1.onnx"])
def test_inspect(name: str, folder: Path, shown) -> None:
    code, out, err = shown("inspect", folder / name)
    assert code == 0, err
    assert "input_ids" in out
    if name == "cache1.qg":
        lines = out[out.index("\ndims\n") :].splitlines()
        assert lines[2].split() == ["name", "min", "max", "default"]
        assert any(line.split()[0] == "logits" and line.split()[-1] == "sequence" for line in lines[4:])


def test_view_refuses_an_artifact(folder: Path, shown) -> None:
    code, _, err = shown("view", folder / "cache1.qg", "--no-browser")
    assert code == 3 and "cache1.onnx" in err and "inspect" in err


def test_perplexity_of_an_artifact_and_its_original(folder: Path, tmp_path: Path, shown) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(VOCABULARY)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 50)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in ids))
    text = ("--text", tmp_path / "text.txt", "--tokenizer", tmp_path / "tokenizer.json", "--length", 16)
    against = ("--against", folder / "cache1.onnx", "--json", "-q")
    code, out, err = shown("eval", "perplexity", folder / "cache1.qg", *text, *against)
    assert code == 0, err
    found = json.loads(out)
    assert found["tokens"] == 49
    first, second = (model["perplexity"] for model in found["models"])
    assert first == pytest.approx(second, rel=1e-5)
    assert found["kl_divergence"] < 1e-9 and found["top1_agreement"] == 1
