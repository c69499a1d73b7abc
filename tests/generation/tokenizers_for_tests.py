"""Small tokenizers of the kinds that models come with. All need the package `tokenizers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

TEXT = (
    "Once upon a time there was a little girl. She said: don't you know? It's 3 o'clock! "
    "Grüße, naïve café — 東京 🙂🙃 日本語 …\n\n  two  blanks\tand a tab. "
)


def byte_level(size: int = 300) -> Any:
    """GPT-2's kind: BPE over bytes; a word's first token has the blank. A size of 257 merges none."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(alphabet),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    return made


def sentencepiece() -> Any:
    """Llama's kind: BPE with a mark for blanks, bytes for what it has no token for, <s> before a text."""
    tokenizers = pytest.importorskip("tokenizers")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    letters = sorted({"▁", *(c for c in TEXT if c.isascii() and c.isprintable() and c != " ")})
    words = ["▁t", "he", "▁the", "▁a", "re"]
    vocabulary = {token: i for i, token in enumerate([*tokens, *letters, *words])}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("r", "e")]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    n, d = tokenizers.normalizers, tokenizers.decoders
    made.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
    made.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return made


def word_piece() -> Any:
    """BERT's kind: ## joins a piece to the one before."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "##a", "##b", "##c"]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.decoder = tokenizers.decoders.WordPiece(cleanup=False)
    return made


MAKERS = {
    "bytes": lambda: byte_level(257),
    "byte-level": byte_level,
    "sentencepiece": sentencepiece,
    "word-piece": word_piece,
}


def saved(kind: str, folder: Path) -> Path:
    """Its tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    MAKERS[kind]().save(str(path))
    return path
