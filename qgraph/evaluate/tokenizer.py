"""A model's `tokenizer.json`, and the token sequences it makes of a text file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qgraph.errors import InputError, ResourceError
from qgraph.evaluate.files import existing_file

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The `tokenizers.Tokenizer` in a `tokenizer.json`.

    Raises ResourceError where the package `tokenizers` is missing, InputError for a file that it refuses.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ResourceError("the package 'tokenizers' is missing: pip install tokenizers") from None
    file = existing_file(path)
    try:
        return Tokenizer.from_file(os.fspath(file))
    except Exception as error:  # the package raises Exception itself
        raise InputError(f"{os.fspath(path)}: not a tokenizer.json: {error}") from error


def leading_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text, usually one BOS; none where it adds none."""
    tokenizer.no_padding()  # padding at the left would count, too
    (encoded,) = encode(tokenizer, ["a"], "the tokenizer")
    count = 0
    while count < len(encoded.ids) and encoded.special_tokens_mask[count]:
        count += 1
    return list(encoded.ids[:count])


def encode(tokenizer: Any, texts: Sequence[str], where: str, *, special_tokens: bool = True) -> list[Any]:
    """The `tokenizers.Encoding` of each text. `where` they come from begins the message of an InputError:
    characters that are no text in UTF-8, or that the tokenizer does not have."""
    try:
        found: list[Any] = tokenizer.encode_batch(list(texts), add_special_tokens=special_tokens)
        return found
    except Exception as error:  # the package raises Exception itself, TypeError for what is no UTF-8
        raise InputError(f"{where}: no tokens for this text: {error}") from None


def read_documents(
    path: str | os.PathLike[str], tokenizer: Any, *, separator: str = ""
) -> list[npt.NDArray[np.int64]]:
    """The token ids of each document in a UTF-8 text file, without any special tokens.

    Args:
        tokenizer: from `load_tokenizer`.
        separator: what stands between documents, such as "<|endoftext|>"; empty for a file that is one
            document. White space around a document is removed, empty documents are left out.

    Raises InputError for a file that is not such text or holds no token.
    """
    import numpy as np

    try:
        text = existing_file(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{os.fspath(path)}: not text in UTF-8: {error}") from error
    texts = [part.strip() for part in text.split(separator)] if separator else [text]
    tokenizer.no_truncation()
    tokenizer.no_padding()
    wanted = [part for part in texts if part]
    encoded = encode(tokenizer, wanted, os.fspath(path), special_tokens=False)
    documents = [np.array(e.ids, np.int64) for e in encoded if e.ids]
    if not documents:
        raise InputError(f"{os.fspath(path)}: no tokens in it")
    return documents
