"""Between text and token ids: how a prompt begins, and which tokens end a text."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qgraph.errors import InputError, UsageError
from qgraph.evaluate.text_ports import no_logit
from qgraph.evaluate.tokenizer import encode, leading_tokens, load_tokenizer

# Special tokens that end a text, of the models in wide use: for a tokenizer.json without its companions.
_ENDS = (
    "</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "<|end|>", "<eos>",
    "<end_of_turn>",
)  # fmt: skip


class Text:
    """A tokenizer as generation needs it.

    Attributes:
        tokenizer: the `tokenizers.Tokenizer`.
        size: ids that it knows, all below this number.
        learnt: the same without tokens that were added to a finished vocabulary.
        ends: ids that end a text: what the files beside tokenizer.json call so (`generation_config.json`,
            `config.json`, `tokenizer_config.json`), else special tokens with a usual name; and the one that a
            text begins with, as it would begin another.

    Raises InputError for a file that is no tokenizer.json, ResourceError without the package `tokenizers`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.tokenizer = load_tokenizer(path)
        self.tokenizer.no_truncation()
        self._leading = leading_tokens(self.tokenizer)
        self.size, self.learnt = (
            1 + max(self.tokenizer.get_vocab(with_added_tokens=added).values(), default=-1)
            for added in (True, False)
        )
        self.ends = frozenset(self._declared_ends() or self._usual_ends()) | frozenset(self._leading)

    def encode(self, prompt: str) -> list[int]:
        """The ids of a prompt, what a text begins with first. UsageError where there are none at all."""
        (encoded,) = encode(self.tokenizer, [prompt], "the prompt", special_tokens=False)
        ids: list[int] = encoded.ids
        if not self._leading and not ids:
            raise UsageError(
                "the prompt is empty, and the tokenizer begins a text with nothing: give a prompt"
            )
        return [*self._leading, *ids]

    def id_of(self, token: str) -> int:
        """The id of a token by its name. UsageError for one that the tokenizer does not have."""
        found: int | None = self.tokenizer.token_to_id(token)
        if found is None:
            raise UsageError(f"the tokenizer {self.path} has no token '{token}'")
        return found

    def _declared_ends(self) -> list[int]:
        folder = Path(self.path).parent
        for name in ("generation_config.json", "config.json"):
            declared = _entry(folder / name, "eos_token_id")
            ids = declared if isinstance(declared, list) else [declared]
            if found := [i for i in ids if type(i) is int and 0 <= i < self.size]:
                return found
        token = _entry(folder / "tokenizer_config.json", "eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        found_id = self.tokenizer.token_to_id(token) if isinstance(token, str) else None
        return [] if found_id is None else [found_id]

    def _usual_ends(self) -> list[int]:
        special = {t.content: i for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}
        return [special[name] for name in _ENDS if name in special]


def check_ids(ids: Sequence[int], vocabulary: int) -> list[int]:
    """A prompt given as ids. InputError where these are none of the model's tokens."""
    try:
        found = [operator.index(i) for i in (ids if isinstance(ids, Iterable) else [None])]
    except TypeError:
        raise UsageError(f"the prompt is {type(ids).__name__}: give one text, or the ids of one") from None
    if not found:
        raise UsageError("the prompt has no tokens")
    wrong = next((i for i in found if i < 0 or (vocabulary and i >= vocabulary)), None)
    if wrong is not None:
        if not vocabulary:
            raise InputError(f"token {wrong}: ids are not negative")
        raise no_logit(wrong, vocabulary)
    return found


def _entry(path: Path, key: str) -> Any:
    """An entry of a JSON file beside the tokenizer; None where there is no such file or entry.

    Raises InputError for a file that is no JSON object.
    """
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: not a JSON object")
    return document.get(key)
