"""Calibration samples from a text and the model's tokenizer: lines by themselves, or windows of the whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qgraph.calibration.data import MASK, Batch, Data, fixed_batch, spread, with_empty_cache
from qgraph.errors import InputError, ResourceError, UsageError
from qgraph.evaluate.files import existing_file
from qgraph.evaluate.samples import InputSpec
from qgraph.evaluate.tokenizer import encode, load_tokenizer

_BATCH, _BATCH_TOKENS = 8, 2048  # samples of a run, and how many tokens these may be together
_LONGEST = 256  # tokens of a line: the rest is cut off


class _Tokens(NamedTuple):
    """One sample."""

    label: str
    ids: list[int]
    types: list[int]


def read_text(
    path: Path,
    model_inputs: Sequence[InputSpec],
    tokenizer: str | os.PathLike[str],
    samples: int,
    batch: int | None,
    length: int | None,
) -> Data:
    """See `open_data`.

    Lines that are run together are of similar length, padded at the right; where the model has no
    `attention_mask`, of equal length, so that nothing is padding. A line is cut after 256 tokens, or where
    the model's inputs are of a fixed length after that. Windows are never padded: what is left of the text
    at its end is not used.
    """
    tokens = [spec for spec in model_inputs if not spec.past]
    _require_inputs(path, tokens)
    tokenize, pad = _open_tokenizer(tokenizer)
    fixed = _fixed_length(tokens)
    if length is not None:
        if fixed not in (None, length):
            raise UsageError(
                f"calibration data {path}: the model takes {fixed} tokens at a time, not {length}"
            )
        chosen = _windows(path, tokenize, length, samples)
    else:
        chosen = _lines(path, tokenize, fixed or _LONGEST, samples)
    has_mask = any(spec.name == MASK for spec in model_inputs)
    size = fixed_batch(model_inputs)
    batches = []
    for part in _batches(chosen, size or batch, padded=has_mask, whole=size is not None):
        width = fixed or max(len(sample.ids) for sample in part)
        if not has_mask and width != len(part[0].ids):
            continue
        made = _feeds(part, width, pad)
        feeds = {spec.name: made[spec.name].astype(spec.dtype) for spec in tokens}
        batches.append(
            Batch(dict(with_empty_cache(feeds, model_inputs)), tuple(sample.label for sample in part))
        )
    if not batches:
        wanted = f"[{size or 'batch'}, {fixed or 'sequence'}]" + ("" if has_mask else " without a mask")
        raise InputError(
            f"{path}: too few samples to fill the model's inputs {wanted}: give more text, or a length"
        )
    return Data(str(path), batches)


def _feeds(part: Sequence[_Tokens], width: int, pad: int) -> dict[str, npt.NDArray[np.int64]]:
    """All that can be made of tokens, int64 [samples, width]."""
    ids = np.full((len(part), width), pad, np.int64)
    types, mask = np.zeros_like(ids), np.zeros_like(ids)
    for row, sample in enumerate(part):
        n = len(sample.ids)
        ids[row, :n], types[row, :n], mask[row, :n] = sample.ids, sample.types, 1
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    return {"input_ids": ids, MASK: mask, "token_type_ids": types, "position_ids": positions}


_MADE = ("input_ids", MASK, "token_type_ids", "position_ids")


def _require_inputs(path: Path, model_inputs: Sequence[InputSpec]) -> None:
    for spec in model_inputs:
        if spec.name not in _MADE or len(spec.shape) != 2:
            raise InputError(
                f"calibration data {path}: a text gives {', '.join(_MADE)}, each [batch, sequence]; the "
                f"model's input '{spec.name}' {list(spec.shape)} is none of them: give its values in an "
                ".npz file"
            )


def _fixed_length(model_inputs: Sequence[InputSpec]) -> int | None:
    return next((spec.shape[1] for spec in model_inputs if isinstance(spec.shape[1], int)), None)


def _open_tokenizer(path: str | os.PathLike[str]) -> tuple[Any, int]:
    """The tokenizer, which neither cuts nor pads, and the id that it pads with."""
    tokenizer = load_tokenizer(path)
    pad = int((tokenizer.padding or {}).get("pad_id", 0))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, pad


def _windows(path: Path, tokenizer: Any, length: int, samples: int) -> list[_Tokens]:
    (encoded,) = encode(tokenizer, ["\n".join(text for _, text in _texts(path, keep_empty=True))], str(path))
    total = len(encoded.ids) // length
    if not total:
        raise InputError(f"{path}: {len(encoded.ids)} tokens are fewer than one window of {length}")
    parts = ((i, slice(i * length, (i + 1) * length)) for i in spread(total, samples))
    return [_Tokens(f"window {i}", encoded.ids[part], encoded.type_ids[part]) for i, part in parts]


def _lines(path: Path, tokenizer: Any, longest: int, samples: int) -> list[_Tokens]:
    texts = list(_texts(path))
    if not texts:
        raise InputError(f"{path}: no text in it")
    chosen = [texts[i] for i in spread(len(texts), samples)]
    tokenizer.enable_truncation(max_length=longest)
    encoded = encode(tokenizer, [text for _, text in chosen], str(path))
    tokenizer.no_truncation()
    lines = [_Tokens(label, e.ids, e.type_ids) for (label, _), e in zip(chosen, encoded, strict=True)]
    return sorted(
        (line for line in lines if line.ids), key=lambda line: len(line.ids)
    )  # stable: as in the file


def _batches(
    chosen: Sequence[_Tokens], batch: int | None, *, padded: bool, whole: bool
) -> Iterator[Sequence[_Tokens]]:
    """Consecutive samples; not `padded`: of one length; `whole`: none of fewer than `batch`."""
    runs = [list(chosen)] if padded else [list(run) for _, run in groupby(chosen, lambda s: len(s.ids))]
    for run in runs:
        start = 0
        while start < len(run):
            size = batch or 1
            if batch is None:  # as many as fit; the last is the longest
                while size < _BATCH and start + size < len(run):
                    if (size + 1) * len(run[start + size].ids) > _BATCH_TOKENS:
                        break
                    size += 1
            part = run[start : start + size]
            if not whole or len(part) == size:
                yield part
            start += size


def _texts(path: Path, *, keep_empty: bool = False) -> Iterator[tuple[str, str]]:
    """(label, text) of every sample, those of nothing but blanks left out."""
    for number, line in enumerate(_content(path).split("\n"), 1):
        line = line.rstrip("\r")
        if path.suffix == ".jsonl" and line.strip():
            line = _field(line, f"{path}, line {number}")
        if line.strip() or (keep_empty and path.suffix != ".jsonl"):
            yield f"line {number}", line


def _content(path: Path) -> str:
    try:
        return existing_file(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text in UTF-8: {error}") from error
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read ({error.strerror})") from error


def _field(line: str, where: str) -> str:
    """The text of a JSON object: its `text`, or the only string in it."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    text = entry
    if isinstance(entry, dict):
        strings = [value for value in entry.values() if isinstance(value, str)]
        text = entry.get("text", strings[0] if len(strings) == 1 else None)
    if not isinstance(text, str):
        raise InputError(f"{where}: expected an object with the field 'text', or with one string")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise InputError(f"{where}: half of a character, which is no text in UTF-8")
    return text
