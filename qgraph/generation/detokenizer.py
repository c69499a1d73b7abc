"""Token ids -> text, piece by piece, such that the pieces together are what the tokenizer makes of all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of bytes that are no whole character
_LONGEST = 4  # bytes of a character in UTF-8, and so the most tokens that one can be spread over
_CONTEXT = 8  # tokens of a prompt that the first piece is read behind


class Detokenizer:
    """Streams the text of a growing list of ids.

    What a token looks like depends on its neighbours: a word's first piece has a blank before it unless it
    begins the text, and a character may be spread over up to four tokens. So a token is decoded behind the
    ones before it, and what is new is handed on once it ends in a whole character.

    tokenizer: from `load_tokenizer`. before: ids that the text goes on from; they are not part of it.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._shown = list(before[-_CONTEXT:])  # the last that went out
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """What can be shown now that `token` is there; may be empty."""
        self._pending.append(token)
        text = self._new_text(self._pending)
        if not text.endswith(_INCOMPLETE):
            return self._show(len(self._pending), text)
        # What is still to be completed are the last three bytes at most. What came earlier is wrong for good.
        wrong = len(self._pending) - (_LONGEST - 1)
        return self._show(wrong, self._new_text(self._pending[:wrong])) if wrong > 0 else ""

    def flush(self) -> str:
        """What is left at the end."""
        return self._show(len(self._pending), self._new_text(self._pending))

    def _new_text(self, tokens: list[int]) -> str:
        """What `tokens` add to the text."""
        before, whole = self._decode(self._shown), self._decode(self._shown + tokens)
        if whole.startswith(before):
            return whole[len(before) :]
        # The new tokens change how the last ones read, such as a half character that a prompt ends in.
        return whole[next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), 0) :]

    def _show(self, count: int, text: str) -> str:
        """`text` goes out, and with it the first `count` of what is pending. Tokens without text, such as
        special ones, stay: behind them alone a word would look like the first of the text."""
        if text:
            self._shown, self._pending = self._pending[:count], self._pending[count:]
        return text

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class StopText:
    """Ends a stream of text at the first of some strings, and holds back what may become one of them."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """What of the text so far may be shown; sets `stopped` where a stop string is complete."""
        if self.stopped:
            return ""
        text = self._held + piece
        # The one that is complete first, so that it does not matter how the text was cut.
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back for nothing."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with, all of it excluded."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
