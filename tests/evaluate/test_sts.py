"""The STS evaluation: rank correlation, reading pairs, tokens, embeddings."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from qgraph.errors import InputError, ResourceError, UsageError
from qgraph.evaluate.sts import Pair, SentenceTokenizer, embed, evaluate_sts, read_pairs, spearman

DATA = Path(os.environ.get("QGRAPH_DATA", Path(__file__).parents[3] / "shared" / "data"))


def test_spearman_by_hand():
    # Ranks 1 2 3 4 5 and 2 1 4 3 5: 1 - 6 * (1 + 1 + 1 + 1 + 0) / (5 * 24) = 0.8
    assert spearman([10, 20, 30, 40, 50], [1.2, 1.1, 1.4, 1.3, 9]) == pytest.approx(0.8)
    # Ranks 1 2.5 2.5 4 and 1 2 3 4: covariance 4.5, variances 4.5 and 5
    assert spearman([0, 1, 1, 2], [5, 6, 7, 8]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_spearman_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for n in (5, 50, 1000):
        x, y = rng.integers(0, n // 2, n), rng.standard_normal(n)
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, nan_ok=True)


@pytest.mark.parametrize(("x", "y"), [([1], [1]), ([1, 2], [1, 2, 3]), ([], []), ([np.nan, 1], [1, 2])])
def test_spearman_refuses(x: list[float], y: list[float]):
    with pytest.raises(ValueError, match=r"correlation needs|NaN"):
        spearman(x, y)


def test_read_pairs(tmp_path: Path):
    file = tmp_path / "sts.csv"
    file.write_text('A cat.,"A dog, barking.",2.5\nÄ,"say ""hi""",0\n', encoding="utf-8")
    assert read_pairs(file) == [Pair("A cat.", "A dog, barking.", 2.5), Pair("Ä", 'say "hi"', 0.0)]
    assert len(read_pairs(file, limit=1)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no sentence pairs"),
        (b"a,b\n", "row 1: expected sentence,sentence,score"),
        (b"a,b,1\nc,d,high\n", "row 2: expected"),
        (b"a,b,1,2\n", "row 1: expected"),
        (b"\xff\xfe,b,1\n", "UTF-8"),
    ],
)
def test_files_that_hold_no_pairs(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "sts.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_pairs(tmp_path / "sts.csv")


def test_missing_files(tmp_path: Path):
    with pytest.raises(InputError, match="no such file"):
        read_pairs(tmp_path / "none.csv")
    with pytest.raises(InputError, match="no such file"):
        SentenceTokenizer(tmp_path / "none.json")


def test_the_dev_set():
    file = DATA / "sts" / "stsb-en-dev.csv"
    if not file.is_file():
        pytest.skip(f"{file} is not there; set QGRAPH_DATA")
    pairs = read_pairs(file)
    assert len(pairs) == 1500
    assert pairs[0] == Pair("A man with a hard hat is dancing.", "A man wearing a hard hat is dancing.", 5.0)
    assert all(0 <= pair.score <= 5 for pair in pairs)


WORDS = {"[PAD]": 0, "[UNK]": 1, "a": 2, "cat": 3, "dog": 4, "sits": 5}


@pytest.fixture
def tokenizer_json(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]", length=128)  # as all-MiniLM-L6-v2's file has it
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_tokens_are_padded_to_the_longest(tokenizer_json: Path):
    feeds = SentenceTokenizer(tokenizer_json, max_length=3)(["a cat", "a dog sits a cat"])
    assert feeds["input_ids"].tolist() == [[2, 3, 0], [2, 4, 5]]
    assert feeds["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert feeds["token_type_ids"].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert all(array.dtype == np.int64 for array in feeds.values())


def test_a_file_that_is_no_tokenizer(tmp_path: Path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"not a tokenizer\.json"):
        SentenceTokenizer(tmp_path / "tokenizer.json")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ResourceError, match="pip install"):
        SentenceTokenizer(tmp_path / "tokenizer.json")


class TableModel:
    """Hidden states that are rows of a table, and garbage where there is only padding."""

    name = "table"
    outputs = ("last_hidden_state",)
    table = np.random.default_rng(0).standard_normal((len(WORDS), 8))

    def __init__(self, inputs: tuple[str, ...] = ("input_ids", "attention_mask")):
        self.inputs = inputs
        self.batches: list[tuple[int, ...]] = []

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert set(feeds) == set(self.inputs)
        self.batches.append(feeds["input_ids"].shape)
        hidden = self.table[feeds["input_ids"]]
        hidden[feeds["attention_mask"] == 0] = 1e9
        return {"last_hidden_state": hidden}


def test_embeddings_do_not_depend_on_batches(tokenizer_json: Path):
    tokenize = SentenceTokenizer(tokenizer_json)
    sentences = ["a dog sits", "cat", "a cat sits a dog", "a"]
    seen: list[tuple[int, int]] = []
    model = TableModel()
    one = embed(model, tokenize, sentences, batch=1)
    many = embed(model, tokenize, sentences, batch=3, on_batch=lambda done, total: seen.append((done, total)))
    expected = TableModel.table[[WORDS["a"], WORDS["dog"], WORDS["sits"]]].mean(axis=0)
    assert np.allclose(one[0], expected / np.linalg.norm(expected))
    assert np.allclose(one, many)
    assert seen == [(3, 4), (4, 4)]


def test_evaluate_sts(tokenizer_json: Path):
    tokenize = SentenceTokenizer(tokenizer_json)
    pairs = [Pair("a cat", "a cat", 5), Pair("a cat", "dog sits", 0), Pair("a dog", "a cat", 3)]
    model = TableModel()
    result = evaluate_sts(model, tokenize, pairs, batch=10)
    assert result.sentences == ("a cat", "dog sits", "a dog")  # each once
    assert model.batches == [(3, 2)] and result.pairs == 3
    x = result.embeddings
    assert result.spearman == pytest.approx(spearman([1, x[0] @ x[1], x[2] @ x[0]], [5, 0, 3]))


@pytest.mark.parametrize(
    ("inputs", "output", "message"),
    [
        (("pixels",), "last_hidden_state", "inputs pixels are not"),
        (("input_ids",), "logits", "no output 'logits'"),
    ],
)
def test_models_that_embed_no_text(inputs: tuple[str, ...], output: str, message: str):
    def tokenize(sentences: Sequence[str]) -> dict[str, np.ndarray]:
        return {"input_ids": np.zeros((len(sentences), 1), np.int64)}

    with pytest.raises(UsageError, match=message):
        embed(TableModel(inputs), tokenize, ["a"], output=output)
