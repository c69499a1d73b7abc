"""Perplexity of a causal language model: how many tokens it hesitates between, on average.

    perplexity = exp(-1/n sum_i ln p(t_i | the tokens before t_i))

over all n predicted tokens, each predicted once. A text longer than the model's context is read through
windows of `length` tokens that start `stride` tokens apart: every token then has at least `length - stride`
tokens of context, unless its document begins nearer than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from qgraph.errors import InputError, UsageError
from qgraph.evaluate.text_ports import no_logit

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from qgraph.evaluate.runners import Runner

BOS_MODES = ("document", "window", "none")

_ROW_ELEMENTS = 1 << 20  # logits whose softmax is taken at once: bounds the float64 copies


class Window(NamedTuple):
    """What one run reads, and what of it counts: `ids[first:]` are predicted, each from all that precede."""

    ids: npt.NDArray[np.int64]
    first: int


@dataclass(frozen=True)
class PerplexityResult:
    """What a model achieved on a text."""

    perplexity: float
    nll: float  # mean negative log-likelihood of a predicted token, in nats
    tokens: int  # predicted
    windows: int


@dataclass(frozen=True)
class Comparison:
    """Two models on the same tokens. Means over all predicted tokens."""

    model: PerplexityResult
    reference: PerplexityResult
    kl_divergence: float  # D(reference || model) of the next token's distribution, in nats
    top1_agreement: float  # share of positions where both find the same token most likely


def split_windows(
    documents: Sequence[npt.ArrayLike],
    *,
    length: int,
    stride: int,
    prefix: Sequence[int] = (),
    bos: str = "document",
    limit: int | None = None,
) -> list[Window]:
    """Windows over the documents in which every token is predicted exactly once.

    Args:
        documents: token ids, without BOS. No window reads across the border of two.
        length: tokens a window, the prefix included.
        stride: between the starts of windows.
        prefix: the tokens that begin a text, usually one BOS. They are never predicted.
        bos: where the prefix stands: "document", at the start of each document; "window", of each window;
            "none", nowhere. Without a prefix the first token of a document has no context and is not
            predicted.
        limit: only the first so many predicted tokens.

    Raises UsageError for lengths that leave tokens unpredicted.
    """
    import numpy as np

    if bos not in BOS_MODES:
        raise UsageError(f"bos must be one of {', '.join(BOS_MODES)}, not '{bos}'")
    start = np.array(prefix if bos != "none" else (), np.int64)
    every = start if bos == "window" else start[:0]
    body = length - len(every)
    # The first token predicted in a window needs a token before it: of the prefix or of the overlap.
    longest = body if len(every) else body - 1
    if not 1 <= stride <= longest or body <= len(start) - len(every):
        raise UsageError(
            f"windows of {length} tokens, {stride} apart, leave tokens unpredicted: the stride must be at "
            f"least 1 and at most {max(longest, 0)}"
        )
    windows: list[Window] = []
    left = math.inf if limit is None else limit
    for document in documents:
        tokens = np.concatenate([start[len(every) :], np.asarray(document, np.int64).reshape(-1)])
        done = len(start) - len(every) or (0 if len(every) else 1)  # tokens behind us, or not predictable
        begin = 0
        while done < len(tokens) and left > 0:
            end = int(min(begin + body, len(tokens), done + left))
            windows.append(Window(np.concatenate([every, tokens[begin:end]]), done - begin + len(every)))
            left -= end - done
            done, begin = end, begin + stride
    return windows


def perplexity(
    runner: Runner,
    windows: Sequence[Window],
    *,
    output: str = "logits",
    batch: int = 8,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> PerplexityResult:
    """The perplexity of a model on the windows of a text.

    Args:
        runner: a causal model with the input `input_ids` [batch, sequence], and `attention_mask` (ones) and
            `position_ids` (0, 1, ..) where it wants them. Every run begins anew: `open_text_runner` sees to
            that for a model with a cache.
        windows: from `split_windows`.
        output: the logits [batch, sequence, vocabulary]; position i predicts token i + 1.
        batch: windows a run. Shorter ones are padded at their end, where a causal model does not look.
        on_batch: called with the number of windows done and in all.

    Raises:
        UsageError: nothing to predict, no such output, an input of another kind.
        InputError: logits that are NaN or too few for a token; the runner's.
    """
    nll: list[float] = []
    for tokens, (log_p,) in _log_probabilities([runner], windows, output, batch, on_batch):
        nll.extend(_of(tokens, log_p))
    return _result(nll, windows)


def compare(
    runner: Runner,
    reference: Runner,
    windows: Sequence[Window],
    *,
    output: str = "logits",
    batch: int = 8,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """The perplexity of two models, and how far the first is from the second. Arguments as `perplexity`."""
    import numpy as np

    nll: tuple[list[float], list[float]] = ([], [])
    divergence: list[float] = []
    agreed = 0
    for tokens, (log_q, log_p) in _log_probabilities([runner, reference], windows, output, batch, on_batch):
        nll[0].extend(_of(tokens, log_q))
        nll[1].extend(_of(tokens, log_p))
        if log_p.shape != log_q.shape:
            raise UsageError(
                f"the models have vocabularies of {log_q.shape[1]} and {log_p.shape[1]} tokens: "
                "they cannot be compared"
            )
        p = np.exp(log_p)
        with np.errstate(invalid="ignore"):  # a token that is impossible in both: -inf + inf
            divergence.extend(np.where(p > 0, p * (log_p - log_q), 0).sum(axis=1))
        agreed += int((log_p.argmax(axis=1) == log_q.argmax(axis=1)).sum())
    return Comparison(
        _result(nll[0], windows),
        _result(nll[1], windows),
        math.fsum(divergence) / len(divergence),
        agreed / len(divergence),
    )


def _result(nll: Sequence[float], windows: Sequence[Window]) -> PerplexityResult:
    mean = math.fsum(nll) / len(nll)  # exact sum: the same for any order of the windows
    return PerplexityResult(math.exp(mean) if mean < 700 else math.inf, mean, len(nll), len(windows))


def _of(tokens: npt.NDArray[np.int64], log_p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """-ln p of `tokens` [n] under the distributions [n, vocabulary]."""
    import numpy as np

    return -log_p[np.arange(len(tokens)), tokens]


def _log_probabilities(
    runners: Sequence[Runner],
    windows: Sequence[Window],
    output: str,
    batch: int,
    on_batch: Callable[[int, int], None],
) -> Iterator[tuple[npt.NDArray[np.int64], list[npt.NDArray[np.float64]]]]:
    """Predicted tokens [n] and, for each runner, ln p of the whole vocabulary [n, vocabulary] before each."""
    if not windows:
        raise UsageError("the text has no token to predict")
    largest = max(int(window.ids.max()) for window in windows)
    for runner in runners:
        _check_ports(runner, output)
        vocabulary = (runner.output_shapes[output] or (0,))[-1]
        if isinstance(vocabulary, int) and largest >= vocabulary > 0:
            raise no_logit(largest, vocabulary, " of the text")
    # Windows of one length together, so that little is padding.
    order = sorted(range(len(windows)), key=lambda i: len(windows[i].ids))
    for start in range(0, len(order), batch):
        part = [windows[i] for i in order[start : start + batch]]
        feeds = _feeds(part)
        logits = [runner.run({n: feeds[n] for n in runner.inputs})[output] for runner in runners]
        for row, window in enumerate(part):
            rows = max(1, _ROW_ELEMENTS // max(1, logits[0].shape[-1]))
            for first in range(window.first, len(window.ids), rows):
                tokens = window.ids[first : first + rows]
                scored = slice(first - 1, first - 1 + len(tokens))
                yield tokens, [_log_softmax(found[row, scored], tokens) for found in logits]
        on_batch(start + len(part), len(order))


def _check_ports(runner: Runner, output: str) -> None:
    if output not in runner.outputs:
        raise UsageError(f"the model has no output '{output}'; it has {', '.join(runner.outputs)}")
    known = ("input_ids", "attention_mask", "position_ids")
    foreign = [name for name in runner.inputs if name not in known]
    if foreign or "input_ids" not in runner.inputs:
        raise UsageError(
            f"the model's inputs are {', '.join(runner.inputs)}: perplexity needs input_ids, and knows of "
            "attention_mask and position_ids besides"
        )


def _feeds(windows: Sequence[Window]) -> dict[str, npt.NDArray[np.int64]]:
    """All that a causal model may take, [windows, length of the longest]."""
    import numpy as np

    shape = (len(windows), max(len(w.ids) for w in windows))
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, window in enumerate(windows):
        ids[row, : len(window.ids)] = window.ids
        mask[row, : len(window.ids)] = 1
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int64), shape).copy()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def _log_softmax(logits: npt.NDArray, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """ln softmax of each row in float64, shifted by its maximum so that nothing overflows."""
    import numpy as np

    x = np.asarray(logits, np.float64)
    if x.ndim != 2 or len(x) != len(tokens):
        raise InputError(f"logits of {len(x)} positions for {len(tokens)} tokens: is this a causal model?")
    if tokens.max() >= x.shape[1]:
        raise no_logit(tokens.max(), x.shape[1])
    shifted = x - x.max(axis=1, keepdims=True)
    if np.isnan(shifted).any():
        raise InputError("the model's logits hold NaN or infinity")
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
