"""Generates text with a causal language model: an artifact or an ONNX file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from qgraph.errors import InputError, UsageError
from qgraph.evaluate.decoders import Decoder, open_decoder
from qgraph.generation import MAX_SAMPLES, MAX_TOKENS
from qgraph.generation.detokenizer import Detokenizer, StopText
from qgraph.generation.sampling import Sampler, Sampling
from qgraph.generation.text import Text, check_ids

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Token:
    """One step of a text.

    Attributes:
        id: the token.
        text: what can be shown now that it is there; empty while a character is incomplete, or what may
            become a stop string. The last token brings all that is left.
        reason: of the last token: `end` (the model ends the text), `stop` (a stop string), `length`
            (max_tokens), `capacity` (the model takes no more). Empty before.
    """

    id: int
    text: str
    reason: str = ""


@dataclass
class Timing:
    """How long a text took, the caller's own time between two tokens left out.

    Attributes:
        prompt_tokens: read before the first token.
        samples: texts that go on from the prompt.
        generated_tokens: of all samples.
        first_seconds: until every sample had its first token: one run over the prompt.
        decode_seconds: from then on.
    """

    prompt_tokens: int = 0
    samples: int = 1
    generated_tokens: int = 0
    first_seconds: float = 0.0
    decode_seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Another token is there, `seconds` after the last."""
        self.generated_tokens += 1
        if self.generated_tokens <= self.samples:
            self.first_seconds += seconds
        else:
            self.decode_seconds += seconds

    @property
    def prompt_speed(self) -> float:
        """Tokens of the prompt a second."""
        return self.prompt_tokens / self.first_seconds if self.first_seconds else 0.0

    @property
    def speed(self) -> float:
        """Tokens a second after the first ones."""
        rest = max(0, self.generated_tokens - self.samples)
        return rest / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Generation:
    """A text without its prompt. `reason`: see `Token`."""

    text: str
    ids: tuple[int, ...]
    reason: str


@dataclass
class _Sample:
    """One text in the making."""

    sampler: Sampler
    detokenizer: Detokenizer | None
    stop: StopText
    text: list[int]  # the prompt's ids, and those generated
    room: int  # tokens that may still be generated
    over: bool = False


class Generator:
    """A model, and the tokenizer that belongs to it. From `open_generator`.

    Attributes:
        decoder: what runs the model.
        text: the tokenizer, None without: prompts are ids then, and tokens have no text.
        ends: ids that end a text.
        timing: of the last call, so far.

    One text at a time: a call ends the iterators of earlier ones.
    """

    def __init__(self, decoder: Decoder, text: Text | None = None, ends: Iterable[int] = ()) -> None:
        # Added tokens may lack logits: a tokenizer can know of images that the model never learnt to write.
        if text is not None and decoder.vocabulary and text.learnt > decoder.vocabulary:
            raise InputError(
                f"{text.path} has {text.learnt} tokens, the model has logits for {decoder.vocabulary}: it is "
                "another model's tokenizer"
            )
        self.decoder, self.text = decoder, text
        self.ends = frozenset(ends) or (frozenset() if text is None else text.ends)
        self.timing = Timing()

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt: a text behind what the tokenizer begins texts with, or ids as they are.

        Raises UsageError for a text without a tokenizer and for no token at all, InputError for ids that the
        model does not have.
        """
        if isinstance(prompt, str):
            if self.text is None:
                raise UsageError(
                    "a prompt of text needs the model's tokenizer.json: give a tokenizer, or ids"
                )
            prompt = self.text.encode(prompt)
        return check_ids(prompt, self.decoder.vocabulary)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = MAX_TOKENS,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[Token]:
        """Tokens as they are made.

        Args:
            prompt: see `encode`.
            max_tokens: generate at most so many.
            sampling: how tokens are chosen; without, the most likely ones.
            stop: strings that end the text, and are no part of it.

        Raises, at once, UsageError for options that cannot be, InputError for a prompt that the model cannot
        take or has no room for; while it runs, InputError for logits that are not finite.
        """
        return (token for _, token in self._stream(prompt, 1, max_tokens, sampling, stop))

    def generate(
        self,
        prompt: Prompt,
        *,
        samples: int = 1,
        max_tokens: int = MAX_TOKENS,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        on_token: Callable[[int, Token], None] = lambda sample, token: None,
    ) -> list[Generation]:
        """Several texts that go on from one prompt, which is read once. Arguments and errors as `stream`.

        Sample i has the same draws whatever the number of samples. (The last bits of its logits may depend on
        how many are computed together.) on_token(sample, token) hears of every token.
        """
        found: list[list[Token]] = [[] for _ in range(samples)]
        for index, token in self._stream(prompt, samples, max_tokens, sampling, stop):
            found[index].append(token)
            on_token(index, token)
        return [
            Generation("".join(t.text for t in tokens), tuple(t.id for t in tokens), tokens[-1].reason)
            for tokens in found
        ]

    def _stream(
        self, prompt: Prompt, samples: int, max_tokens: int, sampling: Sampling | None, stop: Sequence[str]
    ) -> Iterator[tuple[int, Token]]:
        """(sample, token), the samples in turns."""
        how = sampling or Sampling()
        _check_counts(samples, max_tokens)
        if samples > 1 and not how.temperature:
            raise UsageError(f"{samples} samples at temperature 0 are all the same: give a temperature")
        if isinstance(stop, str) or not all(isinstance(one, str) for one in stop):
            raise UsageError(f"stop is {stop!r}: give a list of strings")
        if stop and self.text is None:
            raise UsageError("stop strings need the model's tokenizer.json")
        ids, capacity = self.encode(prompt), self.decoder.capacity
        if capacity and len(ids) > capacity:
            raise InputError(
                f"the prompt has {len(ids)} tokens, the model has room for {capacity}: shorten it, or give a "
                "larger capacity"
            )
        made = []
        for index in range(samples):
            detokenizer = None if self.text is None else Detokenizer(self.text.tokenizer, ids)
            made.append(_Sample(Sampler(how, index), detokenizer, StopText(stop), list(ids), max_tokens))
        self.timing = Timing(len(ids), samples)
        return self._run(ids, made, self.timing)

    def _run(self, ids: list[int], samples: list[_Sample], timing: Timing) -> Iterator[tuple[int, Token]]:
        self._require_current(timing)
        start = time.perf_counter()
        self.decoder.reset()
        logits = self.decoder.feed(np.array([ids]), last=True)[:, -1]
        rows = [0] * len(samples)  # of the logits, and of what is in the decoder, for each of `alive`
        alive = list(range(len(samples)))
        while True:
            for row, index in zip(rows, alive, strict=True):
                token = self._next(samples[index], logits[row])
                timing.add(time.perf_counter() - start)
                yield index, token
                start = time.perf_counter()
                self._require_current(timing)
            rows = [row for row, index in zip(rows, alive, strict=True) if not samples[index].over]
            alive = [index for index in alive if not samples[index].over]
            if not alive:
                return
            if rows != list(range(len(logits))):
                self.decoder.select(rows)
            logits = self.decoder.feed(np.array([[samples[i].text[-1]] for i in alive]), last=True)[:, -1]
            rows = list(range(len(alive)))

    def _require_current(self, timing: Timing) -> None:
        """UsageError for a text that another one has followed since."""
        if timing is not self.timing:
            raise UsageError("another text was begun: a generator makes one at a time")

    def _next(self, sample: _Sample, logits: np.ndarray) -> Token:
        """Chooses the next token of a sample and says what comes of it."""
        chosen = sample.sampler.next(logits, sample.text)
        sample.text.append(chosen)
        sample.room -= 1
        piece = reason = ""
        if chosen in self.ends:
            reason = "end"
        else:
            piece = self._piece(sample, chosen)
            if not sample.room:
                reason = "length"
            elif self.decoder.capacity and len(sample.text) > self.decoder.capacity:  # it cannot be fed
                reason = "capacity"
        if reason and sample.detokenizer is not None:
            piece += sample.stop.push(sample.detokenizer.flush()) + sample.stop.flush()
        reason = "stop" if sample.stop.stopped else reason
        sample.over = bool(reason)
        return Token(chosen, piece, reason)

    def _piece(self, sample: _Sample, token: int) -> str:
        """What can be shown of the text now that `token` is there."""
        if sample.detokenizer is None or self.text is None:
            return ""
        if token >= self.text.size:
            raise InputError(
                f"the model chose token {token}, but {self.text.path} has only {self.text.size}: is it this "
                "model's tokenizer?"
            )
        return sample.stop.push(sample.detokenizer.push(token))

    def close(self) -> None:
        """Frees the model."""
        self.decoder.close()

    def __enter__(self) -> Generator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_generator(
    model: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | Text | None = None,
    *,
    engine: str = "",
    threads: int = 0,
    device: str | None = None,
    capacity: int = 0,
    room: int = 0,
    ends: Iterable[int] = (),
    public_key: bytes | None = None,
) -> Generator:
    """A generator for a model in a file.

    Args:
        model: an artifact, or an ONNX file, which ONNX Runtime runs; with a cache or without.
        tokenizer: its tokenizer.json; without, prompts are ids.
        engine: `qgraph`, `onnxruntime`, or `reference`; empty is by the file's ending.
        threads: 0 is one a core.
        device: where an artifact runs, see `qgraph.runtime.load`.
        capacity: tokens of a text, prompt included, that an artifact with state holds; a text that reaches it
            ends. 0 is the artifact's default.
        room: in place of a capacity: as much as this many tokens need, as far as the model goes.
        ends: ids that end a text, in place of those that the tokenizer and its companions tell.
        public_key: whose signature an artifact must have, see `qgraph.runtime.load`.

    Raises UsageError for a model that is no causal language model, InputError for a tokenizer that is not
    its; and as `open_decoder`.
    """
    text = tokenizer if tokenizer is None or isinstance(tokenizer, Text) else Text(tokenizer)
    decoder = open_decoder(
        model,
        engine=engine,
        threads=threads,
        device=device,
        capacity=capacity,
        room=room,
        public_key=public_key,
    )
    return Generator(decoder, text, ends)


def generate(
    model: str | os.PathLike[str],
    prompt: Prompt,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    max_tokens: int = MAX_TOKENS,
    stop: Sequence[str] = (),
    engine: str = "",
    threads: int = 0,
    device: str | None = None,
    capacity: int = 0,
    public_key: bytes | None = None,
    **sampling: float,
) -> Iterator[str]:
    """The pieces of one text, as they are made: `open_generator` and `Generator.stream` in one call.

    sampling: fields of `Sampling`, such as `temperature=0.8, seed=1`. Room is made for the prompt and
    `max_tokens`, unless `capacity` says how much.
    """
    _check_counts(1, max_tokens)
    try:
        how = Sampling(**sampling)  # type: ignore[arg-type]
    except TypeError as error:
        raise UsageError(
            f"generate: {error}: sampling has temperature, top_k, top_p, repetition_penalty, seed"
        ) from None
    text = None if tokenizer is None else Text(tokenizer)
    ids = text.encode(prompt) if isinstance(prompt, str) and text is not None else prompt
    if not isinstance(ids, str):  # one of text without a tokenizer is refused below
        ids = check_ids(ids, 0)
    room = len(ids) + max_tokens
    generator = open_generator(
        model,
        text,
        engine=engine,
        threads=threads,
        device=device,
        capacity=capacity,
        room=room,
        public_key=public_key,
    )
    tokens = generator.stream(ids, max_tokens=max_tokens, sampling=how, stop=stop)
    return _texts(generator, tokens)


def _check_counts(samples: int, max_tokens: int) -> None:
    """UsageError for what is no number of samples or tokens."""
    for name, value, most in (("samples", samples, MAX_SAMPLES), ("max_tokens", max_tokens, 2**62)):
        if type(value) is not int or not 1 <= value <= most:
            raise UsageError(f"{name} is {value!r}: give a number from 1 to {most}")


def _texts(generator: Generator, tokens: Iterator[Token]) -> Iterator[str]:
    with generator:
        for token in tokens:
            if token.text:
                yield token.text
