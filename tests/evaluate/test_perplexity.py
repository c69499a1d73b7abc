"""Perplexity: models whose perplexity is known, windows, comparison of two models."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from qgraph.errors import InputError, ResourceError, UsageError
from qgraph.evaluate.perplexity import Window, compare, perplexity, split_windows
from qgraph.evaluate.tokenizer import leading_tokens, load_tokenizer, read_documents

VOCAB = 7


class Toy:
    """A causal model from a function ids [batch, sequence] -> logits [batch, sequence, vocabulary]."""

    name = "toy"
    outputs = ("logits",)
    output_shapes: ClassVar[dict] = {"logits": ("batch", "sequence", "vocabulary")}

    def __init__(
        self, logits: Callable[[NDArray], NDArray], inputs: tuple[str, ...] = ("input_ids",)
    ) -> None:
        self.inputs = inputs
        self.fed: list[dict[str, NDArray]] = []
        self._logits = logits

    def run(self, feeds: Mapping[str, NDArray]) -> dict[str, NDArray]:
        assert set(feeds) == set(self.inputs)
        self.fed.append(dict(feeds))
        return {"logits": self._logits(feeds["input_ids"]).astype(np.float32)}


def bigram(seed: int = 0) -> Toy:
    table = np.random.default_rng(seed).standard_normal((VOCAB, VOCAB)) * 3
    toy = Toy(lambda ids: table[ids])
    toy.table = table
    return toy


def history() -> Toy:
    """Logits that depend on every token so far, and on their order."""
    table = np.random.default_rng(1).standard_normal((VOCAB, VOCAB))

    def logits(ids: NDArray) -> NDArray:
        state, out = np.zeros((len(ids), VOCAB)), []
        for column in ids.T:
            state = 0.7 * state + table[column]
            out.append(state)
        return np.stack(out, axis=1)

    return Toy(logits)


def texts(*lengths: int, seed: int = 3) -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n) for n in lengths]


def log_softmax(x: NDArray) -> NDArray:
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def nll_of_whole(toy: Toy, document: NDArray) -> list[float]:
    """Of every token but the first, by one run over the whole document."""
    p = log_softmax(toy.run({"input_ids": document[None]})["logits"].astype(np.float64))[0]
    return [-p[i - 1, document[i]] for i in range(1, len(document))]


@pytest.mark.parametrize("bos", ["document", "window", "none"])
@pytest.mark.parametrize("value", [0.0, 1e4, -1e4])
def test_uniform_logits_hesitate_between_all_tokens(bos: str, value: float) -> None:
    windows = split_windows(texts(50, 3, 1), length=8, stride=4, prefix=[1], bos=bos)
    toy = Toy(lambda ids: np.full((*ids.shape, VOCAB), value))
    found = perplexity(toy, windows, batch=3)
    assert found.perplexity == pytest.approx(VOCAB, rel=1e-12)
    assert found.tokens == (50 + 3 + 1 if bos != "none" else 49 + 2 + 0)
    assert found.windows == len(windows)


def test_certain_model() -> None:
    count = Toy(lambda ids: np.where(np.arange(VOCAB) == (ids[..., None] + 1) % VOCAB, 0, -np.inf))
    found = perplexity(count, split_windows([np.arange(100) % VOCAB], length=9, stride=5))
    assert (found.perplexity, found.tokens) == (1.0, 99)
    found = perplexity(count, split_windows([np.zeros(9, int)], length=9, stride=5))
    assert found.perplexity == math.inf


@pytest.mark.parametrize(("length", "stride"), [(2, 1), (5, 1), (5, 4), (8, 3), (64, 63), (1000, 500)])
@pytest.mark.parametrize("batch", [1, 4])
def test_bigram_perplexity_does_not_depend_on_windows(length: int, stride: int, batch: int) -> None:
    toy, documents = bigram(), texts(70, 1, 2, 33)
    expected = [
        -log_softmax(toy.table.astype(np.float32).astype(np.float64))[a, b]
        for d in documents
        for a, b in pairwise(d)
    ]
    found = perplexity(toy, split_windows(documents, length=length, stride=stride), batch=batch)
    assert found.tokens == len(expected)
    assert found.nll == pytest.approx(np.mean(expected), rel=1e-12)
    assert found.perplexity == pytest.approx(np.exp(np.mean(expected)), rel=1e-12)


@pytest.mark.parametrize("prefix", [[], [2], [2, 5]])
def test_one_window_is_the_whole_document(prefix: list[int]) -> None:
    documents = texts(40, 7, 12)
    toy = history()
    expected = [
        value
        for d in documents
        for value in nll_of_whole(toy, np.array([*prefix, *d]))[max(len(prefix) - 1, 0) :]
    ]
    found = perplexity(toy, split_windows(documents, length=64, stride=32, prefix=prefix), batch=2)
    assert found.tokens == len(expected)
    assert found.nll == pytest.approx(np.mean(expected), rel=1e-9)


def test_windows_are_read_each_for_itself() -> None:
    """Against the definition: each token from its window alone."""
    (document,) = texts(45)
    toy, length, stride = history(), 10, 4
    expected, done = [], 1
    for begin in range(0, 45, stride):
        end = min(begin + length, 45)
        expected += nll_of_whole(toy, document[begin:end])[done - begin - 1 :]
        done = end
        if end == 45:
            break
    assert len(expected) == 44
    found = perplexity(toy, split_windows([document], length=length, stride=stride), batch=3)
    assert found.nll == pytest.approx(np.mean(expected), rel=1e-9)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 8, 9, 13, 40])
@pytest.mark.parametrize(("length", "stride"), [(6, 1), (6, 3), (6, 5)])
@pytest.mark.parametrize("bos", ["document", "window", "none"])
def test_every_token_is_predicted_once(count: int, length: int, stride: int, bos: str) -> None:
    document = np.arange(100, 100 + count)
    windows = split_windows([document], length=length, stride=stride, prefix=[1], bos=bos)
    predicted = [t for w in windows for t in w.ids[w.first :]]
    assert predicted == list(document if bos != "none" else document[1:])
    for i, window in enumerate(windows):
        assert 1 <= window.first < len(window.ids) <= length
        assert (window.ids[0] == 1) == (bos == "window" or (bos == "document" and i == 0))
        body = window.ids[1:] if bos == "window" else window.ids
        context = window.first - len(window.ids) + len(body)  # of the first predicted token
        if i:
            assert context == len(body[: length - (bos == "window")]) - len(window.ids[window.first :])
            assert context >= length - (bos == "window") - stride


def test_stride_of_a_whole_window_needs_a_prefix() -> None:
    windows = split_windows([np.arange(100, 110)], length=5, stride=4, prefix=[1], bos="window")
    assert [w.ids.tolist() for w in windows] == [
        [1, 100, 101, 102, 103],
        [1, 104, 105, 106, 107],
        [1, 108, 109],
    ]


def test_limit_counts_predicted_tokens() -> None:
    for limit in range(1, 40):
        windows = split_windows(texts(9, 20, 9), length=6, stride=3, prefix=[0], limit=limit)
        assert sum(len(w.ids) - w.first for w in windows) == min(limit, 38)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 8, "stride": 8}, "at most 7"),
        ({"length": 8, "stride": 0}, "at least 1"),
        ({"length": 1, "stride": 1}, "unpredicted"),
        ({"length": 8, "stride": 8, "prefix": [1], "bos": "window"}, "at most 7"),
        ({"length": 2, "stride": 1, "prefix": [1, 2]}, "unpredicted"),
        ({"length": 8, "stride": 1, "bos": "always"}, "bos must be one of"),
    ],
)
def test_windows_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        split_windows(texts(20), **options)


def test_inputs_that_a_model_may_want() -> None:
    toy = Toy(lambda ids: np.zeros((*ids.shape, VOCAB)), ("position_ids", "attention_mask", "input_ids"))
    perplexity(toy, split_windows([np.array([3, 4]), np.array([5, 6, 1])], length=8, stride=4))
    (feeds,) = toy.fed
    assert feeds["input_ids"].tolist() == [[3, 4, 0], [5, 6, 1]]
    assert feeds["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert feeds["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]


def test_what_no_causal_model_gives() -> None:
    windows = split_windows(texts(20), length=8, stride=4)
    with pytest.raises(InputError, match="NaN"):
        perplexity(Toy(lambda ids: np.full((*ids.shape, VOCAB), np.nan)), windows)
    with pytest.raises(InputError, match="is this the model's tokenizer"):
        perplexity(Toy(lambda ids: np.zeros((*ids.shape, 2))), windows)
    toy = bigram()
    toy.output_shapes = {"logits": ("batch", "sequence", 3)}
    with pytest.raises(InputError, match="token 6 of the text has no logit among 3"):
        perplexity(toy, windows)
    assert not toy.fed
    with pytest.raises(InputError, match="causal"):  # the logits of the last position only
        perplexity(Toy(lambda ids: np.zeros((len(ids), 1, VOCAB))), windows)
    with pytest.raises(UsageError, match="no output 'scores'"):
        perplexity(bigram(), windows, output="scores")
    with pytest.raises(UsageError, match="token_type_ids"):
        perplexity(Toy(lambda ids: ids, ("input_ids", "token_type_ids")), windows)
    with pytest.raises(UsageError, match="no token"):
        perplexity(bigram(), split_windows([np.array([1])], length=8, stride=4))


def test_compare_by_hand() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    reference, model = (Toy(lambda ids, x=x: np.tile(np.log(x), (*ids.shape, 1))) for x in (p, q))
    found = compare(model, reference, [Window(np.array([0, 0, 1, 2]), 1)])
    assert found.kl_divergence == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2), rel=1e-6)
    assert found.top1_agreement == 0
    assert found.reference.perplexity == pytest.approx(np.exp(-np.log(p[[0, 1, 2]]).mean()), rel=1e-6)
    assert found.model.perplexity == pytest.approx(np.exp(-np.log(q[[0, 1, 2]]).mean()), rel=1e-6)


def test_compare_with_itself_and_with_impossible_tokens() -> None:
    windows = split_windows(texts(50), length=16, stride=8)
    found = compare(bigram(), bigram(), windows)
    assert (found.kl_divergence, found.top1_agreement) == (0.0, 1.0)
    assert found.model == found.reference == perplexity(bigram(), windows)
    never = Toy(lambda ids: np.tile(np.where(np.arange(VOCAB + 1) < VOCAB, 0, -np.inf), (*ids.shape, 1)))
    assert compare(never, never, windows).kl_divergence == 0
    with pytest.raises(UsageError, match="vocabularies"):
        compare(bigram(), never, windows)


def tokenizer(folder: Path, bos: bool = True) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "<unk>": 1, "a": 2, "b": 3}, "<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<s>"])
    if bos:
        made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    made.enable_truncation(3)
    made.enable_padding()
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path


def test_documents(tmp_path: Path) -> None:
    found = load_tokenizer(tokenizer(tmp_path))
    assert leading_tokens(found) == [0]
    text = tmp_path / "text.txt"
    text.write_text("\na b\n--\n \n--\nb b\nb a c\n", encoding="utf-8")
    documents = read_documents(text, found, separator="--")
    assert [d.tolist() for d in documents] == [[2, 3], [3, 3, 3, 2, 1]]
    text.write_text("a b", encoding="utf-8")
    assert [d.tolist() for d in read_documents(text, found)] == [[2, 3]]
    found = load_tokenizer(tokenizer(tmp_path, bos=False))
    found.enable_padding(direction="left", length=8)
    assert leading_tokens(found) == []


def test_bad_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tokenizer(tmp_path)
    found = load_tokenizer(path)
    text = tmp_path / "text.txt"
    with pytest.raises(InputError, match="no such file"):
        read_documents(text, found)
    for content, message in ((b" \n", "no tokens"), (b"\xff\xfe", "UTF-8")):
        text.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_documents(text, found)
    with pytest.raises(InputError, match=r"not a tokenizer\.json"):
        load_tokenizer(text)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ResourceError, match="tokenizers"):
        load_tokenizer(path)


def test_command_line(tmp_path: Path) -> None:
    """An ONNX file, by two engines: a bigram model in which "a" likes to follow "a", and a flat one."""
    from click.testing import CliRunner
    from onnx import TensorProto, helper, numpy_helper, save

    from qgraph.cli.eval import command

    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 4])
    for name, likely in (("sharp", 3), ("flat", 1)):
        table = np.log(np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, likely, 1], [1, 1, 1, 1]], np.float32))
        node = helper.make_node("Gather", ["table", "input_ids"], ["logits"])
        tensor = numpy_helper.from_array(table, "table")
        graph = helper.make_graph([node], name, [ids], [logits], [tensor])
        save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11),
            tmp_path / f"{name}.onnx",
        )
    (tmp_path / "text.txt").write_text("a a b | a a a", encoding="utf-8")
    # After <s>: a, a (1/4 each). After a: a b a a, of 1/2, 1/6, 1/2, 1/2.
    expected = 4 ** (2 / 6) * 2 ** (3 / 6) * 6 ** (1 / 6)
    divergence = 4 / 6 * (-np.log(2) / 4 + 3 / 4 * np.log(3 / 2))  # uniform from (1/2, 1/6, 1/6, 1/6)
    text = ["--text", str(tmp_path / "text.txt"), "--tokenizer", str(tokenizer(tmp_path)), "--separator", "|"]
    for engine in ("onnxruntime", "reference"):
        arguments = ["perplexity", str(tmp_path / "sharp.onnx"), *text, "--engine", engine, "--json", "-q"]
        done = CliRunner().invoke(command, [*arguments, "--against", str(tmp_path / "flat.onnx")])
        assert done.exit_code == 0, done.output
        found = json.loads(done.output)
        assert (found["tokens"], found["windows"]) == (6, 2)
        assert [m["perplexity"] for m in found["models"]] == pytest.approx([expected, 4], rel=1e-6)
        assert found["kl_divergence"] == pytest.approx(divergence, rel=1e-6)
        assert found["top1_agreement"] == pytest.approx(2 / 6)  # argmax of a tie is the first
    done = CliRunner().invoke(command, ["perplexity", str(tmp_path / "flat.onnx"), *text, "-q"])
    assert "perplexity 4.0000" in done.output
    assert "6 in 2 windows" in done.output


def test_models_with_a_cache(decoders: Path) -> None:
    """With a cache or without, by any engine: the same perplexity, and none of a window in the next."""
    from tiny_decoder import VOCABULARY

    from qgraph.evaluate.decoders import open_text_runner

    documents = [np.random.default_rng(i).integers(0, VOCABULARY, n) for i, n in enumerate((40, 7, 21))]
    windows = split_windows(documents, length=16, stride=8)
    runner = open_text_runner(decoders / "cache0.onnx", threads=1)
    wanted = perplexity(runner, windows, batch=3)
    for name in ("cache1.onnx", "cache0.qg", "cache1.qg"):
        found = compare(open_text_runner(decoders / name, threads=1, room=16), runner, windows, batch=3)
        assert found.reference == wanted
        assert found.model.nll == pytest.approx(wanted.nll, rel=1e-6)
        assert found.kl_divergence < 1e-9
        assert found.top1_agreement == 1
