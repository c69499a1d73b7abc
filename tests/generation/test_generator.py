"""Generating: against a loop over whole texts, with tokenizers of several kinds, on models with a cache and
without."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_decoder import VOCABULARY
from tokenizers_for_tests import saved

import qgraph
from qgraph.errors import InputError, UsageError
from qgraph.evaluate.runners import OnnxRuntimeRunner
from qgraph.generation import Generator, Sampling, Token, open_generator
from qgraph.generation.text import Text

PROMPT = [3, 1, 4, 1, 5]


def greedy(path: Path, prompt: list[int], count: int) -> list[int]:
    """The most likely token after the whole text, again and again."""
    runner, text = OnnxRuntimeRunner(path, threads=1), list(prompt)
    for _ in range(count):
        ids = np.array([text])
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(len(text))[None],
        }
        text.append(int(runner.run(feeds)["logits"][0, -1].argmax()))
    return text[len(prompt) :]


FILES = ("cache0.onnx", "cache1.onnx", "cache0.qg", "cache1.qg")


@pytest.mark.parametrize("file", FILES)
def test_greedy_is_the_loop_over_whole_texts(file: str, folder: Path) -> None:
    with open_generator(folder / file, threads=1) as generator:
        tokens = list(generator.stream(PROMPT, max_tokens=64))
        assert [token.id for token in tokens] == greedy(folder / "cache0.onnx", PROMPT, 64)
        assert [token.reason for token in tokens] == [""] * 63 + ["length"]
        assert all(token.text == "" for token in tokens)
        assert [token.id for token in generator.stream(PROMPT, max_tokens=3)] == [t.id for t in tokens[:3]]


@pytest.mark.parametrize("file", ["cache1.onnx", "cache1.qg"])
def test_samples_are_what_they_are_alone(file: str, folder: Path) -> None:
    how = Sampling(temperature=1.0, seed=5)
    with open_generator(folder / file, threads=1) as generator:
        heard: list[tuple[int, Token]] = []
        three = generator.generate(
            PROMPT, samples=3, max_tokens=12, sampling=how, on_token=lambda i, token: heard.append((i, token))
        )
        one = generator.generate(PROMPT, samples=1, max_tokens=12, sampling=how)
        assert [index for index, _ in heard[:6]] == [0, 1, 2, 0, 1, 2]
        assert len({found.ids for found in three}) == 3
        assert three[0] == one[0]
        # The second and third by hand, with the draws that are theirs.
        from qgraph.generation.sampling import Sampler

        for index in (1, 2):
            sampler, text = Sampler(how, index), list(PROMPT)
            generator.decoder.reset()
            logits = generator.decoder.feed(np.array([text]), last=True)
            for _ in range(12):
                text.append(sampler.next(logits[0, 0], text))
                logits = generator.decoder.feed(np.array([text[-1:]]), last=True)
            assert three[index].ids == tuple(text[len(PROMPT) :])


@pytest.mark.parametrize("file", ["cache1.onnx", "cache1.qg"])
def test_samples_that_end_at_different_times(file: str, folder: Path) -> None:
    how = Sampling(temperature=1.0, seed=1)
    with open_generator(folder / file, threads=1) as generator:
        endless = generator.generate(PROMPT, samples=4, max_tokens=12, sampling=how)
        ends = {endless[0].ids[7], endless[2].ids[2]}
    with open_generator(folder / file, threads=1, ends=ends) as generator:
        found = generator.generate(PROMPT, samples=4, max_tokens=12, sampling=how)
    for with_ends, without in zip(found, endless, strict=True):
        cut = next((i + 1 for i, token in enumerate(without.ids) if token in ends), 12)
        assert with_ends.ids == without.ids[:cut]
        assert with_ends.reason == ("end" if with_ends.ids[-1] in ends else "length")
    assert len({len(f.ids) for f in found}) > 1


def chain(path: Path, follows: dict[int, int], vocabulary: int) -> Path:
    """A model in which one token follows another for certain; the last of the vocabulary follows the rest."""
    table = np.zeros((vocabulary, vocabulary), np.float32)
    table[:, -1] = 5
    for token, successor in follows.items():
        table[token, successor] = 10
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", vocabulary])
    node = helper.make_node("Gather", ["table", "input_ids"], ["logits"])
    graph = helper.make_graph([node], "chain", [ids], [logits], [numpy_helper.from_array(table, "table")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
    return path


def chained(folder: Path, kind: str, text: str, *, extra: int = 0) -> tuple[Generator, str]:
    """A generator that, after the first character of `text`, writes the rest. Its bytes must differ."""
    tokenizer = Text(saved(kind, folder))
    ids = tokenizer.encode(text)
    assert len(set(ids)) == len(ids)
    path = chain(folder / "chain.onnx", dict(pairwise(ids)), tokenizer.size + extra)
    return open_generator(path, tokenizer, threads=1), text


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_text_in_and_out(kind: str, tmp_path: Path) -> None:
    generator, text = chained(tmp_path, kind, "xy🙂é東q!")
    count = len(generator.encode(text)) - len(generator.encode("x"))
    tokens = list(generator.stream("x", max_tokens=count))
    assert "".join(token.text for token in tokens) == text[1:]
    assert [token.text for token in tokens if token.text] == list(text[1:])
    assert tokens[-1].reason == "length"


def test_a_text_that_ends_in_half_a_character(tmp_path: Path) -> None:
    generator, _ = chained(tmp_path, "sentencepiece", "xy🙂")
    tokens = list(generator.stream("x", max_tokens=3))
    assert [token.text for token in tokens] == ["y", "", "\ufffd\ufffd"]


def test_stop_strings_end_a_text(tmp_path: Path) -> None:
    generator, _ = chained(tmp_path, "bytes", "abcdefgh")
    (found,) = generator.generate("a", stop=["ef", "zz"], max_tokens=50)
    assert (found.text, found.reason) == ("bcd", "stop")
    (found,) = generator.generate("a", stop=["hx"], max_tokens=7)
    assert (found.text, found.reason) == ("bcdefgh", "length")  # what was held back comes at the end


def test_the_model_ends_a_text(tmp_path: Path) -> None:
    generator, _ = chained(tmp_path, "bytes", "abcdefgh")
    end = generator.text.id_of("<|endoftext|>")
    assert generator.ends == {end}
    size = generator.text.size
    path = chain(tmp_path / "ends.onnx", {generator.encode("a")[0]: end}, size)
    (found,) = open_generator(path, generator.text, threads=1).generate("a")
    assert (found.text, found.ids, found.reason) == ("", (end,), "end")


def test_what_ends_a_text_is_told_by_the_files_beside_it(tmp_path: Path) -> None:
    path = saved("sentencepiece", tmp_path)
    assert Text(path).ends == {1, 2}  # by its usual name, and what begins a text
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<0x41>"}}))
    a = Text(path).id_of("<0x41>")
    assert Text(path).ends == {1, a}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert Text(path).ends == {1, 7}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert Text(path).ends == {1, 8, 9}
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(InputError, match=r"generation_config\.json: not JSON"):
        Text(path)
    with pytest.raises(UsageError, match="has no token '</end>'"):
        (tmp_path / "generation_config.json").unlink()
        Text(path).id_of("</end>")
    assert Text(saved("word-piece", tmp_path / "other")).ends == set()


def test_prompts(tmp_path: Path, folder: Path) -> None:
    generator, _ = chained(tmp_path, "sentencepiece", "abc")
    assert generator.encode("")[0] == 1 and generator.encode("a")[:1] == [1]
    assert generator.encode([5, 6]) == [5, 6]
    with pytest.raises(UsageError, match="the prompt is empty"):
        chained(tmp_path / "other", "bytes", "abc")[0].encode("")
    with pytest.raises(UsageError, match="no tokens"):
        generator.encode([])
    with pytest.raises(UsageError, match=r"needs the model's tokenizer\.json"):
        open_generator(folder / "cache0.onnx").stream("text")
    for wrong in (-1, VOCABULARY):
        with pytest.raises(InputError, match=f"token {wrong} has no logit among {VOCABULARY}"):
            open_generator(folder / "cache0.onnx").stream([1, wrong])


def test_a_tokenizer_of_another_model(tmp_path: Path, folder: Path) -> None:
    path = saved("sentencepiece", tmp_path)
    with pytest.raises(InputError, match=f"tokens, the model has logits for {VOCABULARY}: it is"):
        open_generator(folder / "cache0.onnx", path)
    generator, _ = chained(tmp_path / "padded", "bytes", "abc", extra=9)
    with pytest.raises(InputError, match=r"chose token .* has only"):
        list(generator.stream("c"))


def test_a_capacity_ends_a_text(folder: Path) -> None:
    for file in FILES:
        with open_generator(folder / file, threads=1, capacity=8) as generator:
            tokens = list(generator.stream(PROMPT))
            assert [token.id for token in tokens] == greedy(folder / "cache0.onnx", PROMPT, 4)
            assert tokens[-1].reason == "capacity"
            assert generator.decoder.length == 8
            with pytest.raises(InputError, match="the prompt has 9 tokens, the model has room for 8"):
                generator.stream([1] * 9)


def test_options_that_cannot_be(folder: Path) -> None:
    with open_generator(folder / "cache1.onnx", threads=1) as generator:
        for wrong in (0, 1.5, "x"):
            with pytest.raises(UsageError, match=f"max_tokens is {wrong!r}: give a number from 1"):
                generator.stream(PROMPT, max_tokens=wrong)  # type: ignore[arg-type]
        for wrong in (0, 1 << 20):
            with pytest.raises(UsageError, match=f"samples is {wrong}: give a number from 1 to 4096"):
                generator.generate(PROMPT, samples=wrong)
        for prompt in (5, None, [1.5], ["a", "b"], [[1, 2], [3]]):
            with pytest.raises(UsageError, match="give one text, or the ids of one"):
                generator.stream(prompt)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="stop is"):
            generator.stream(PROMPT, stop="abc")
        with pytest.raises(UsageError, match="all the same"):
            generator.generate(PROMPT, samples=2)
        with pytest.raises(UsageError, match="stop strings need"):
            generator.stream(PROMPT, stop=["x"])
        with pytest.raises(UsageError, match="temperature"):
            next(qgraph.generate(folder / "cache1.onnx", PROMPT, heat=1.0))


def test_one_text_at_a_time(folder: Path) -> None:
    with open_generator(folder / "cache1.onnx", threads=1) as generator:
        first = generator.stream(PROMPT)
        next(first)
        assert len(list(generator.stream(PROMPT, max_tokens=2))) == 2
        with pytest.raises(UsageError, match="another text was begun"):
            next(first)
        early, late = generator.stream(PROMPT), generator.stream(PROMPT, max_tokens=3)
        found = [next(late)]
        with pytest.raises(UsageError, match="another text was begun"):
            next(early)  # it was made first, and begins last
        assert [*found, *late] == list(generator.stream(PROMPT, max_tokens=3))


def test_timing_leaves_the_caller_out(folder: Path) -> None:
    with open_generator(folder / "cache1.onnx", threads=1) as generator:
        start = time.perf_counter()
        for i, _ in enumerate(generator.stream(PROMPT, max_tokens=4)):
            assert generator.timing.generated_tokens == i + 1
            time.sleep(0.2)
        timing = generator.timing
        assert (timing.prompt_tokens, timing.generated_tokens) == (5, 4)
        assert 0 < timing.first_seconds + timing.decode_seconds < time.perf_counter() - start - 0.6
        assert timing.speed == pytest.approx(3 / timing.decode_seconds)
        assert timing.prompt_speed == pytest.approx(5 / timing.first_seconds)


def test_in_one_call(tmp_path: Path) -> None:
    _, text = chained(tmp_path, "bytes", "abcdefgh")
    found = qgraph.generate(
        tmp_path / "chain.onnx",
        "a",
        tokenizer=tmp_path / "tokenizer.json",
        max_tokens=7,
        temperature=0.01,
        seed=3,
    )
    assert list(found) == list(text[1:])
    assert qgraph.open_generator is open_generator
