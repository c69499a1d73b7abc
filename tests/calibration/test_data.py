"""Calibration data: what each source becomes, and what is said of those that do not fit."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from qgraph.calibration import Data, open_data
from qgraph.calibration.data import require_indices, spread
from qgraph.errors import InputError, QGraphError, UsageError
from qgraph.evaluate.samples import InputSpec

IDS = InputSpec("input_ids", "int64", ("batch", "sequence"))
MASK = InputSpec("attention_mask", "int64", ("batch", "sequence"))
TYPES = InputSpec("token_type_ids", "int64", ("batch", "sequence"))
POSITIONS = InputSpec("position_ids", "int32", ("batch", "sequence"))
IMAGE = InputSpec("image", "float32", ("batch", 3, 4, 4))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Words a0 .. a99 as ids 1 .. 100, begun by [CLS] 101; other words are [UNK] 0."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, **{f"a{i}": i + 1 for i in range(100)}, "[CLS]": 101, "[PAD]": 102}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 101)]
    )
    made.enable_padding(pad_id=102, pad_token="[PAD]", length=400)  # a file's own settings do not count
    made.enable_truncation(3)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def words(count: int, first: int = 0) -> str:
    return " ".join(f"a{(first + i) % 100}" for i in range(count))


def all_rows(data: Data, name: str) -> list[list[int]]:
    return [row for batch in data for row in batch.feeds[name].tolist()]


def test_lines(tmp_path: Path, tokenizer: Path) -> None:
    """Similar lengths together, padded to the longest, as the mask says; empty lines are none."""
    lengths = [3, 9, 1, 9, 2, 5]
    text = "\n\n".join(words(n, 10 * i) for i, n in enumerate(lengths)) + "\n  \n"
    (tmp_path / "t.txt").write_text(text)
    data = open_data(
        tmp_path / "t.txt", [IDS, MASK, TYPES, POSITIONS], tokenizer=tokenizer, samples=6, batch=2
    )
    assert data.samples == 6 and len(data) == 3
    first, second, _ = data
    assert first.labels == ("line 5", "line 9") and second.labels == ("line 1", "line 11")
    assert first.feeds["input_ids"].tolist() == [[101, 21, 102], [101, 41, 42]]
    assert first.feeds["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert first.feeds["position_ids"].tolist() == [[0, 1, 1], [0, 1, 2]]
    assert first.feeds["position_ids"].dtype == np.int32 and not first.feeds["token_type_ids"].any()
    assert first.tokens is not None and first.tokens.tolist() == [[True, True, False], [True, True, True]]
    assert list(data)[2].tokens is None  # both of one length: nothing is padding


def test_lines_without_a_mask_are_never_padded(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "t.txt").write_text("\n".join(words(n) for n in (3, 5, 3, 4, 3, 5)))
    data = open_data(tmp_path / "t.txt", [IDS], tokenizer=tokenizer, batch=2)
    assert [batch.feeds["input_ids"].shape for batch in data] == [(2, 4), (1, 4), (1, 5), (2, 6)]
    assert not any(102 in row for row in all_rows(data, "input_ids"))


def test_a_long_line_is_cut(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "t.txt").write_text(words(1000))
    data = open_data(tmp_path / "t.txt", [IDS, MASK], tokenizer=tokenizer)
    assert next(iter(data)).feeds["input_ids"].shape == (1, 256)


def test_fixed_dims_decide(tmp_path: Path, tokenizer: Path) -> None:
    """Lines are padded and cut to the model's length, batches are of its size, and the rest is left out."""
    (tmp_path / "t.txt").write_text("\n".join(words(n) for n in (3, 9, 4, 5, 2)))
    fixed = [InputSpec(name, "int64", (2, 5)) for name in ("input_ids", "attention_mask")]
    data = open_data(tmp_path / "t.txt", fixed, tokenizer=tokenizer)
    assert [batch.feeds["input_ids"].shape for batch in data] == [(2, 5), (2, 5)]
    with pytest.raises(InputError, match=r"too few samples to fill the model's inputs \[9, 5\]"):
        open_data(
            tmp_path / "t.txt", [InputSpec(s.name, "int64", (9, 5)) for s in fixed], tokenizer=tokenizer
        )
    with pytest.raises(UsageError, match="the model takes 5 tokens at a time, not 7"):
        open_data(tmp_path / "t.txt", fixed, tokenizer=tokenizer, length=7)
    data = open_data(tmp_path / "t.txt", fixed, tokenizer=tokenizer, length=5)
    assert data.samples == 4
    data = open_data(tmp_path / "t.txt", fixed[:1], tokenizer=tokenizer)
    assert all_rows(data, "input_ids") == [[101, 1, 2, 3, 4], [101, 1, 2, 3, 4]]  # cut ones only, none padded


def test_windows(tmp_path: Path, tokenizer: Path) -> None:
    """The whole text, tokenized once and cut: no padding, no token twice, evenly spread."""
    (tmp_path / "t.txt").write_text("\n\n".join(words(7, 7 * i) for i in range(12)))
    data = open_data(tmp_path / "t.txt", [IDS, MASK], tokenizer=tokenizer, length=10)
    ids = [i for row in all_rows(data, "input_ids") for i in row]
    assert data.samples == 8 and ids == [101, *range(1, 80)]
    assert all(batch.tokens is None for batch in data)
    some = open_data(tmp_path / "t.txt", [IDS], tokenizer=tokenizer, length=10, samples=3, batch=2)
    assert [batch.labels for batch in some] == [("window 0", "window 2"), ("window 5",)]
    with pytest.raises(InputError, match="85 tokens are fewer than one window of 100"):
        open_data(tmp_path / "t.txt", [IDS], tokenizer=tokenizer, length=100)


def test_jsonl(tmp_path: Path, tokenizer: Path) -> None:
    """The field `text`, or the only string."""
    lines = [{"text": "a1 a2", "title": "a9"}, {"id": 3, "body": "a3"}, "a4"]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    data = open_data(tmp_path / "t.jsonl", [IDS, MASK], tokenizer=tokenizer, batch=1)
    assert all_rows(data, "input_ids") == [[101, 4], [101, 5], [101, 2, 3]]
    joined = open_data(tmp_path / "t.jsonl", [IDS], tokenizer=tokenizer, length=5)
    assert all_rows(joined, "input_ids") == [[101, 2, 3, 4, 5]]


def test_many_tokens_make_small_batches(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "t.txt").write_text(words(8192))
    data = open_data(tmp_path / "t.txt", [IDS], tokenizer=tokenizer, length=1024)
    assert [batch.feeds["input_ids"].shape for batch in data] == [(2, 1024)] * 4
    data = open_data(tmp_path / "t.txt", [IDS], tokenizer=tokenizer, length=4096)
    assert [batch.feeds["input_ids"].shape for batch in data] == [(1, 4096)] * 2


def test_npz(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((10, 3, 4, 4)).astype(np.float32)
    np.savez(tmp_path / "d.npz", image=images)
    data = open_data(tmp_path / "d.npz", [IMAGE])
    assert [len(batch.labels) for batch in data] == [8, 2]
    assert np.array_equal(np.concatenate([batch.feeds["image"] for batch in data]), images)
    some = open_data(tmp_path / "d.npz", [IMAGE], samples=4, batch=3)
    assert [batch.labels for batch in some] == [("sample 0", "sample 2", "sample 5"), ("sample 7",)]
    assert np.array_equal(list(some)[1].feeds["image"], images[7:8])
    fixed = open_data(tmp_path / "d.npz", [InputSpec("image", "float32", (4, 3, 4, 4))])
    assert [len(batch.labels) for batch in fixed] == [4, 4]


def test_npz_mask(tmp_path: Path) -> None:
    """An array for `attention_mask` says what is padding, as in a text."""
    ids, mask = np.ones((2, 3), np.int64), np.array([[1, 1, 0], [1, 1, 1]])
    np.savez(tmp_path / "d.npz", input_ids=ids, attention_mask=mask)
    (batch,) = open_data(tmp_path / "d.npz", [IDS, MASK])
    assert batch.tokens is not None and batch.tokens.tolist() == (mask != 0).tolist()
    np.savez(tmp_path / "d.npz", input_ids=ids, attention_mask=mask * 2)  # not a mask of zeros and ones
    (batch,) = open_data(tmp_path / "d.npz", [IDS, MASK])
    assert batch.tokens is None


def test_an_iterable_is_read_once_and_no_further_than_needed() -> None:
    read = []

    def source():
        for i in range(100):
            read.append(i)
            yield {"input_ids": np.full((1, 2), i)}

    data = open_data(source(), [IDS], samples=3)
    assert read == [0, 1, 2] and data.samples == 3
    assert all_rows(data, "input_ids") == all_rows(data, "input_ids") == [[0, 0], [1, 1], [2, 2]]
    assert open_data(data, [IDS]) is data


def test_fingerprints(tmp_path: Path, tokenizer: Path) -> None:
    """By what the model is fed: not by the file's name, but by every bit, type, shape and batch."""

    def of(*feeds: dict) -> str:
        return open_data(list(feeds), [IDS]).fingerprint()

    one, two = {"input_ids": np.array([[1, 2]])}, {"input_ids": np.array([[3, 4]])}
    prints = {of(one), of(two), of(one, two), of(two, one), of({"input_ids": np.array([[1], [2]])})}
    prints.add(of({"input_ids": np.array([[1, 2], [3, 4]])}))
    assert len(prints) == 6 and of(one) == of(dict(one))
    (tmp_path / "a.txt").write_text(words(50))
    (tmp_path / "b.txt").write_text(words(50))
    a, b, c = (
        open_data(tmp_path / name, [IDS], tokenizer=tokenizer, length=n).fingerprint()
        for name, n in (("a.txt", 10), ("b.txt", 10), ("b.txt", 9))
    )
    assert a == b != c


def test_spread() -> None:
    assert spread(3, 10) == [0, 1, 2] and spread(10, 3) == [0, 3, 6] and spread(10, 1) == [0]
    assert spread(0, 3) == []


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path / "d.npz", **arrays)
    return path / "d.npz"


def file(path: Path, name: str, data: bytes) -> Path:
    (path / name).write_bytes(data)
    return path / name


def text(path: Path, data: bytes) -> Path:
    return file(path, "d.txt", data)


def lines(path: Path, data: bytes) -> Path:
    return file(path, "d.jsonl", data)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def whole(path: Path) -> bytes:
    return npz(path, input_ids=ids).read_bytes()


def damaged(data: bytes) -> bytes:
    """One bit of the array is another."""
    at = data.index(ids.tobytes()) + 5
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


ids = np.ones((2, 3), np.int64)
BAD = {
    # name: (what makes the source, options, error, message)
    "unknown suffix": (lambda p: file(p, "d.csv", b"1"), {}, UsageError, r"unknown kind of file '.csv'"),
    "no such npz": (lambda p: p / "d.npz", {}, InputError, "no such file"),
    "a folder": (lambda p: (p / "d.npz").mkdir() or p / "d.npz", {}, InputError, "not a regular file"),
    "not an npz": (lambda p: file(p, "d.npz", b"hello"), {}, InputError, r"not an .npz file"),
    "empty npz": (lambda p: file(p, "d.npz", b""), {}, InputError, r"not an .npz file"),
    "cut npz": (lambda p: file(p, "d.npz", whole(p)[:100]), {}, InputError, r"not an .npz file"),
    "damaged npz": (lambda p: file(p, "d.npz", damaged(whole(p))), {}, InputError, r"not an .npz file"),
    "an npy": (lambda p: file(p, "d.npz", npy(ids)), {}, InputError, "but a single array"),
    "pickles": (lambda p: npz(p, input_ids=np.array([{}])), {}, InputError, r"is no array of numbers"),
    "missing array": (lambda p: npz(p), {}, InputError, "lacks an array for an input of the model"),
    "odd array": (lambda p: npz(p, input_ids=ids, x=ids), {}, InputError, "not an input of the model: 'x'"),
    "dtype": (lambda p: npz(p, input_ids=ids / 2), {}, InputError, "is float64; the model takes int64"),
    "rank": (lambda p: npz(p, input_ids=ids[0]), {}, InputError, r"shape \[3\]; the model takes \[batch"),
    "scalar": (lambda p: npz(p, input_ids=np.array(1)), {}, InputError, "'input_ids' holds no samples"),
    "no samples": (lambda p: npz(p, input_ids=ids[:0]), {}, InputError, "'input_ids' holds no samples"),
    "tokenizer with npz": (lambda p: npz(p, input_ids=ids), {"tokenizer": "t"}, UsageError, "go with a text"),
    "length with npz": (lambda p: npz(p, input_ids=ids), {"length": 3}, UsageError, "go with a text"),
    "no tokenizer": (lambda p: text(p, b"a1"), {"tokenizer": None}, UsageError, "give a tokenizer"),
    "no such tokenizer": (lambda p: text(p, b"a1"), {"tokenizer": "t.json"}, InputError, "no such file"),
    "empty text": (lambda p: text(p, b" \n\n"), {}, InputError, "no text in it"),
    "not UTF-8": (lambda p: text(p, b"\xff\xfe"), {}, InputError, "not a text in UTF-8"),
    "not JSON": (lambda p: lines(p, b'"a1"\n{"text'), {}, InputError, r"d.jsonl, line 2: not JSON"),
    "no text field": (lambda p: lines(p, b'{"a": "x", "b": "y"}'), {}, InputError, "line 1: expected an"),
    "text of no text": (lambda p: lines(p, b'{"text": 3, "b": "y"}'), {}, InputError, "line 1: expected an"),
    "half a character": (lambda p: lines(p, b'{"text": "\\ud800"}'), {}, InputError, "line 1: half of a"),
    "samples": (lambda p: text(p, b"a1"), {"samples": 0}, UsageError, "samples must be at least 1, got 0"),
    "batch": (lambda p: text(p, b"a1"), {"batch": -1}, UsageError, "batch must be at least 1"),
    "length": (lambda p: text(p, b"a1"), {"length": 0}, UsageError, "length must be at least 1"),
    "one feeds": (lambda p: {"input_ids": ids}, {}, UsageError, "an iterable of feeds, not a dict"),
    "a number": (lambda p: 3, {}, UsageError, "an iterable of feeds, not a int"),
    "no feeds": (lambda p: [], {}, InputError, "no calibration samples"),
    "not feeds": (lambda p: [ids], {}, InputError, "sample 0: expected feeds"),
    "other feeds": (lambda p: [{"input_ids": ids}, {"x": ids}], {}, InputError, "sample 1 lacks the model"),
    "more feeds": (lambda p: [{"input_ids": ids, "x": ids}], {}, InputError, "no input of the model: 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_data(case: str, tmp_path: Path, tokenizer: Path) -> None:
    """One line, that says what and where."""
    make, options, kind, message = BAD[case]
    source = make(tmp_path)
    if isinstance(source, Path) and source.suffix in (".txt", ".jsonl"):
        options = {"tokenizer": tokenizer, **options}
    with pytest.raises(QGraphError, match=message) as caught:
        open_data(source, [IDS], **options)
    assert type(caught.value) is kind and "\n" not in str(caught.value)


def test_lengths_of_arrays_must_agree(tmp_path: Path) -> None:
    path = npz(tmp_path, input_ids=ids, attention_mask=ids[:1])
    with pytest.raises(InputError, match="do not agree on the number of samples: 2 of 'input_ids', 1 of"):
        open_data(path, [IDS, MASK])


def test_dims_must_agree(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="axis 1 of input 'attention_mask' is 2, but 3 in 'input_ids'"):
        open_data(npz(tmp_path, input_ids=ids, attention_mask=ids[:, :2]), [IDS, MASK])
    with pytest.raises(InputError, match=r"has the shape \[2, 3\]; the model takes \[batch, 4\]"):
        open_data(npz(tmp_path, input_ids=ids), [InputSpec("input_ids", "int64", ("batch", 4))])


def test_a_model_that_text_does_not_fit(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "t.txt").write_text("a1")
    with pytest.raises(
        InputError, match=r"the model's input 'image' .* is none of them: give its values in an"
    ):
        open_data(tmp_path / "t.txt", [IDS, IMAGE], tokenizer=tokenizer)


def test_not_a_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "t.txt").write_text("a1")
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(InputError, match=r"not a tokenizer.json"):
        open_data(tmp_path / "t.txt", [IDS], tokenizer=tmp_path / "t.json")


@pytest.mark.parametrize("shape", [(), (1,), (2, 1)])
def test_index_outside_of_its_table(shape: tuple[int, ...]) -> None:
    """Of any rank; a negative index counts from the end."""
    spec = InputSpec("index", "int64", shape)
    require_indices(open_data([{"index": np.full(shape, -4)}], [spec]), {"index": 4})
    with pytest.raises(InputError, match="sample 0 holds 4 in 'index', but the model's table for it has 4"):
        require_indices(open_data([{"index": np.full(shape, 4)}], [spec]), {"index": 4})
