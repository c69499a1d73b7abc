"""Semantic textual similarity (STS benchmark, Cer et al. 2017): do embeddings rank pairs as people do?

The score is Spearman's rank correlation between the cosine of two sentences' embeddings and the human rating.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from qgraph.errors import InputError, UsageError
from qgraph.evaluate.files import existing_file
from qgraph.evaluate.tokenizer import encode, load_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from qgraph.evaluate.runners import Runner


class Pair(NamedTuple):
    """Two sentences and how similar people found them, 0 to 5."""

    first: str
    second: str
    score: float


@dataclass(frozen=True)
class StsResult:
    """What a model achieved on a set of pairs."""

    spearman: float
    pairs: int
    sentences: tuple[str, ...]  # the distinct ones, in order of appearance
    embeddings: npt.NDArray[np.float64]  # [sentences, hidden], of length 1


def read_pairs(path: str | os.PathLike[str], limit: int | None = None) -> list[Pair]:
    """The pairs in a CSV file of `sentence,sentence,score` rows without a header; the first `limit` of them.

    Raises InputError, naming the row, for what is not such a file.
    """
    pairs: list[Pair] = []
    try:
        with existing_file(path).open(newline="", encoding="utf-8") as file:
            for row in csv.reader(file):
                if limit is not None and len(pairs) == limit:
                    break
                pairs.append(_pair(row, f"{os.fspath(path)}, row {len(pairs) + 1}"))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{os.fspath(path)}: not a CSV file in UTF-8: {error}") from error
    if not pairs:
        raise InputError(f"{os.fspath(path)}: no sentence pairs")
    return pairs


def _pair(row: Sequence[str], where: str) -> Pair:
    try:
        first, second, score = row
        return Pair(first, second, float(score))
    except ValueError:
        raise InputError(f"{where}: expected sentence,sentence,score") from None


class SentenceTokenizer:
    """Sentences -> padded `input_ids`, `attention_mask`, `token_type_ids`, by a `tokenizer.json`.

    The file is that of Hugging Face's package `tokenizers`. Raises ResourceError where the package is
    missing, InputError for a file that it refuses.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_length: int = 256) -> None:
        self._tokenizer = load_tokenizer(path)
        padding = self._tokenizer.padding or {}
        self._tokenizer.enable_padding(**{k: padding[k] for k in ("pad_id", "pad_token") if k in padding})
        self._tokenizer.enable_truncation(max_length=max_length)

    def __call__(self, sentences: Sequence[str]) -> dict[str, npt.NDArray[np.int64]]:
        """int64 [sentences, length of the longest] for each of the three."""
        import numpy as np

        encoded = encode(self._tokenizer, sentences, "the sentences")
        columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        return {
            name: np.array([getattr(e, field) for e in encoded], np.int64) for name, field in columns.items()
        }


def embed(
    runner: Runner,
    tokenize: Callable[[Sequence[str]], Mapping[str, npt.NDArray[np.int64]]],
    sentences: Sequence[str],
    *,
    output: str = "last_hidden_state",
    batch: int = 32,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> npt.NDArray[np.float64]:
    """Mean-pooled, normalized embeddings [sentences, hidden] of `output` [batch, sequence, hidden].

    Batches hold sentences of similar length, so that little is padding. on_batch(done, total) counts
    sentences. Raises UsageError when the model has no such output, or an input that the tokenizer does not
    make.
    """
    import numpy as np

    from qgraph.evaluate.similarity import mean_pool, normalize

    if output not in runner.outputs:
        raise UsageError(f"the model has no output '{output}'; it has {', '.join(runner.outputs)}")
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    pooled: dict[int, npt.NDArray[np.float64]] = {}
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        feeds = tokenize([sentences[i] for i in part])
        foreign = [name for name in runner.inputs if name not in feeds]
        if foreign:
            raise UsageError(
                f"the model's inputs {', '.join(foreign)} are not token ids, a mask or token types"
            )
        hidden = runner.run({name: feeds[name] for name in runner.inputs})[output]
        pooled.update(zip(part, normalize(mean_pool(hidden, feeds["attention_mask"])), strict=True))
        on_batch(start + len(part), len(order))
    return np.stack([pooled[i] for i in range(len(sentences))])


def evaluate_sts(
    runner: Runner,
    tokenize: Callable[[Sequence[str]], Mapping[str, npt.NDArray[np.int64]]],
    pairs: Sequence[Pair],
    *,
    output: str = "last_hidden_state",
    batch: int = 32,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> StsResult:
    """Scores the model on the pairs. Every distinct sentence runs once. Arguments and errors as `embed`."""
    from qgraph.evaluate.similarity import cosine

    index: dict[str, int] = {}
    for pair in pairs:
        for sentence in (pair.first, pair.second):
            index.setdefault(sentence, len(index))
    vectors = embed(runner, tokenize, list(index), output=output, batch=batch, on_batch=on_batch)
    first, second = [index[pair.first] for pair in pairs], [index[pair.second] for pair in pairs]
    score = spearman(cosine(vectors[first], vectors[second]), [pair.score for pair in pairs])
    return StsResult(score, len(pairs), tuple(index), vectors)


def spearman(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Spearman's rank correlation: Pearson's correlation of the ranks, ties given their average rank.

    Raises ValueError for lengths that differ, are below 2, or for NaN. NaN where all of x or all of y are
    equal.
    """
    import numpy as np

    a, b = _ranks(x), _ranks(y)
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(
            f"a correlation needs two lists of one length of at least 2, not {len(a)} and {len(b)}"
        )
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm else float("nan")


def _ranks(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """1 for the smallest; equal values share the mean of the ranks they take up."""
    import numpy as np

    array = np.asarray(values, np.float64).reshape(-1)
    if np.isnan(array).any():
        raise ValueError("NaN has no rank")
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
