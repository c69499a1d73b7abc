"""Text in pieces: together they are what the tokenizer makes of all, and none is half a character."""

from __future__ import annotations

import random

import pytest
from tokenizers_for_tests import MAKERS, TEXT, byte_level, sentencepiece, word_piece

from qgraph.generation.detokenizer import Detokenizer, StopText


def pieces(tokenizer: object, ids: list[int], before: list[int] | None = None) -> list[str]:
    stream = Detokenizer(tokenizer, before or [])
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize("kind", MAKERS)
def test_pieces_are_the_text(kind: str) -> None:
    tokenizer = MAKERS[kind]()
    text = "abc a bca cb" if kind == "word-piece" else TEXT
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    found = pieces(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece for piece in found)
    assert len([piece for piece in found if piece]) > len(ids) // 3  # not all at the end


@pytest.mark.parametrize("kind", MAKERS)
def test_pieces_go_on_from_a_prompt(kind: str) -> None:
    tokenizer = MAKERS[kind]()
    text = "abc a bca cb" if kind == "word-piece" else TEXT
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    for cut in range(1, len(ids)):
        head = tokenizer.decode(ids[:cut])
        if not head.endswith("\ufffd"):
            assert head + "".join(pieces(tokenizer, ids[cut:], ids[:cut])) == text


def test_a_prompt_that_ends_in_half_a_character() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("🙂", add_special_tokens=False).ids
    assert len(ids) > 1
    assert "".join(pieces(tokenizer, ids[-1:], ids[:-1])) == "🙂"


def test_blanks_are_those_between_words() -> None:
    tokenizer = sentencepiece()
    the, a = (tokenizer.token_to_id(token) for token in ("▁the", "▁a"))
    assert pieces(tokenizer, [the, a, the]) == ["the", " a", " the", ""]
    assert pieces(tokenizer, [the, a], [1]) == ["the", " a", ""]
    assert pieces(tokenizer, [the, a], [1, the]) == [" the", " a", ""]
    joined = word_piece()
    assert pieces(joined, [3, 7, 4, 8]) == ["a", "b", " b", "c", ""]


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_characters_are_whole_or_wrong_for_good(make: object) -> None:
    """Random bytes: whatever is UTF-8 among them comes out, nothing is held back for longer than needed."""
    tokenizer = make()  # type: ignore[operator]
    rng = random.Random(1)
    if make is sentencepiece:
        of_byte = {i: tokenizer.token_to_id(f"<0x{i:02X}>") for i in range(256)}
    else:
        shown = bytes_to_unicode()
        of_byte = {i: tokenizer.token_to_id(shown[i]) for i in range(256)}
    for _ in range(60):
        good = "".join(rng.choice("aé東🙂") for _ in range(6)).encode()
        data = list(good)
        if rng.random() < 0.5:
            data[rng.randrange(len(data))] = rng.randrange(128, 256)
        stream, held, text = Detokenizer(tokenizer), 0, ""
        for byte in data:
            piece = stream.push(of_byte[byte])
            held = 0 if piece else held + 1
            assert held <= 3
            text += piece
        text += stream.flush()
        if data == list(good):
            assert text == good.decode()
        elif make is byte_level:
            assert text == bytes(data).decode(errors="replace")


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [i for i in range(256) if i not in plain]
    return {**{i: chr(i) for i in plain}, **{i: chr(256 + n) for n, i in enumerate(others)}}


def test_special_tokens_have_no_text() -> None:
    tokenizer = sentencepiece()
    the = tokenizer.token_to_id("▁the")
    assert "".join(pieces(tokenizer, [1, the, 2, 1, the, 2])) == "the the"


def test_stop_strings() -> None:
    stop = StopText(["\n\n", "END", "EN"])
    assert [stop.push(piece) for piece in ("one\n", "two\n", "\nthree")] == ["one", "\ntwo", ""]
    assert stop.stopped and stop.flush() == "" and stop.push("more") == ""
    stop = StopText(["stop here"])
    assert [stop.push(piece) for piece in ("a st", "op", " there", "s")] == ["a ", "", "stop there", ""]
    assert (stop.flush(), stop.flush(), stop.stopped) == ("s", "", False)
    stop = StopText(["b", "abc"])
    assert stop.push("xabc") == "xa" and stop.stopped  # the first to be complete
    nothing = StopText(["", ""])
    assert nothing.push("anything") == "anything" and not nothing.stopped


def test_stop_strings_in_all_cuts() -> None:
    rng = random.Random(2)
    for _ in range(300):
        text = "".join(rng.choice("ab") for _ in range(12))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randint(2, 5))) for _ in range(2)]
        stop, shown, at = StopText(stops), "", 0
        while at < len(text):
            step = rng.randint(1, 3)
            shown += stop.push(text[at : at + step])
            at += step
        shown += stop.flush()
        ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
        assert stop.stopped == bool(ends)
        if stop.stopped:
            assert shown == text[: min(ends)[1]]
        else:
            assert shown == text
