"""`qgraph generate`: text from a causal language model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qgraph.cli.console import escape, print_json
from qgraph.cli.options import device_option, json_option, public_key_option, standard_options, threads_option
from qgraph.errors import InputError, UsageError
from qgraph.generation import MAX_SAMPLES, MAX_TOKENS

if TYPE_CHECKING:
    from qgraph.generation import Generator, Sampling, Timing
    from qgraph.generation.text import Text

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("model", type=_PATH)
@click.option("--tokenizer", type=_PATH, help="The model's tokenizer.json.")
@click.option("-p", "--prompt", help="The text to go on from.")
@click.option("--prompt-file", type=_PATH, help="A file with it, UTF-8; - is stdin.")
@click.option("--prompt-ids", metavar="'N N ..'", help="Token ids to go on from, in place of a text.")
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(1),
    default=MAX_TOKENS,
    show_default=True,
    help="Generate at most so many.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Draw tokens, the more freely the higher; 0 takes the most likely one.",
)
@click.option(
    "--top-k", type=click.IntRange(0), default=0, help="Draw from so many of the most likely tokens."
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    help="Draw from the fewest tokens whose probabilities reach this.",
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(1e-3, 1e3),
    default=1.0,
    help="Above 1 makes tokens that are there already less likely.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the draws.")
@click.option(
    "--samples",
    type=click.IntRange(1, MAX_SAMPLES),
    default=1,
    show_default=True,
    help="Texts from the one prompt.",
)
@click.option("--stop", multiple=True, help="A string that ends the text. Repeatable.")
@click.option("--ignore-end", is_flag=True, help="Go on where the model ends the text.")
@click.option("--echo", is_flag=True, help="Print the prompt, too.")
@click.option("--ids", "as_ids", is_flag=True, help="Print token ids in place of text.")
@click.option("--stats", is_flag=True, help="Print how fast it was, on stderr.")
@click.option(
    "--capacity",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Tokens that a text may have, prompt included.  [default: what the prompt and --max-tokens need]",
)
@click.option(
    "--engine",
    type=click.Choice(["qgraph", "onnxruntime", "ort", "reference"]),
    default=None,
    help="What runs MODEL: ort is for files of --export ort.  [default: qgraph for .qg, else onnxruntime]",
)
@threads_option
@device_option
@public_key_option
@json_option
@standard_options
def command(
    model: Path,
    tokenizer: Path | None,
    prompt: str | None,
    prompt_file: Path | None,
    prompt_ids: str | None,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    seed: int,
    samples: int,
    stop: tuple[str, ...],
    ignore_end: bool,
    echo: bool,
    as_ids: bool,
    stats: bool,
    capacity: int,
    engine: str | None,
    threads: int,
    device: str | None,
    public_key: bytes | None,
    as_json: bool,
) -> None:
    """Generate text with the causal language model MODEL: an artifact (.qg), or an ONNX file, which ONNX
    Runtime runs. The text appears as it is made; several samples appear when all are complete. Loading an
    artifact equals running a program: run only those you trust."""
    from qgraph.generation import Sampling, open_generator
    from qgraph.generation.text import Text

    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    text = None if tokenizer is None else Text(tokenizer)
    if as_json and echo:
        raise UsageError("--echo: with --json the prompt is 'prompt_ids' anyway: leave one of the two out")
    if text is None and not (as_ids or as_json):
        raise UsageError("text needs the model's --tokenizer; --prompt-ids with --ids or --json does without")
    ids = _prompt(text, prompt, prompt_file, prompt_ids)
    room = len(ids) + max_tokens
    with open_generator(
        model,
        text,
        engine=engine or "",
        threads=threads,
        device=device,
        capacity=capacity,
        room=room,
        public_key=public_key,
    ) as generator:
        if ignore_end:
            generator.ends = frozenset()
        job = _Job(generator, ids, max_tokens, sampling, stop, as_ids)
        try:
            if as_json:
                print_json(job.document(samples))
            elif samples > 1:
                job.print_samples(samples, echo)
            else:
                job.stream(echo)
        finally:  # also after Ctrl-C
            if stats and generator.timing.generated_tokens:
                print(_speeds(generator.timing), file=sys.stderr, flush=True)


def _prompt(text: Text | None, prompt: str | None, file: Path | None, ids: str | None) -> list[int]:
    """The prompt's ids, from the one option that gives it."""
    if [prompt, file, ids].count(None) != 2:
        raise UsageError("give one of --prompt, --prompt-file and --prompt-ids")
    if ids is not None:
        words = ids.replace(",", " ").split()
        if not words or not all(word.isdecimal() and len(word) < 19 for word in words):
            raise UsageError(f"--prompt-ids {ids}: expected token ids, e.g. --prompt-ids '1 403 407'")
        return [int(word) for word in words]
    if text is None:
        raise UsageError("a prompt of text needs the model's --tokenizer: give it, or --prompt-ids")
    return text.encode(_read(file) if prompt is None and file is not None else prompt or "")


def _read(file: Path) -> str:
    from qgraph.evaluate.files import existing_file

    try:
        if str(file) == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        return existing_file(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not text in UTF-8: {error}") from error


class _Job:
    """What is to be generated, and the ways to print it."""

    def __init__(
        self,
        generator: Generator,
        ids: list[int],
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str],
        as_ids: bool,
    ) -> None:
        self._generator, self._ids, self._as_ids = generator, ids, as_ids
        self._options: dict[str, Any] = {"max_tokens": max_tokens, "sampling": sampling, "stop": stop}

    def stream(self, echo: bool) -> None:
        """One text, as it is made."""
        shown, reason = echo, ""
        if echo:
            self._write(self._text(self._ids))
        try:
            for token in self._generator.stream(self._ids, **self._options):
                self._write(f"{' ' if shown else ''}{token.id}" if self._as_ids else token.text)
                shown, reason = True, token.reason
        finally:
            if shown:
                self._write("\n")
        _note(reason, self._generator)

    def print_samples(self, samples: int, echo: bool) -> None:
        """All texts, each behind a line that counts them."""
        found = self._generator.generate(self._ids, samples=samples, **self._options)
        for i, one in enumerate(found):
            ids = [*self._ids, *one.ids] if echo else list(one.ids)
            text = self._text(ids) if self._as_ids else (self._text(self._ids) if echo else "") + one.text
            self._write(f"--- {i + 1} of {samples}\n{text}\n")
            _note(one.reason, self._generator)

    def document(self, samples: int) -> dict[str, object]:
        """All texts, and how long they took."""
        found = self._generator.generate(self._ids, samples=samples, **self._options)
        timing = self._generator.timing
        speeds = {"prompt_tokens_per_s": timing.prompt_speed, "generated_tokens_per_s": timing.speed}
        return {
            "engine": self._generator.decoder.name,
            "prompt_ids": self._ids,
            "samples": [asdict(one) for one in found],
            "timing": {**asdict(timing), **speeds},
        }

    def _text(self, ids: list[int]) -> str:
        text = self._generator.text
        if self._as_ids or text is None:
            return " ".join(map(str, ids))
        shown: str = text.tokenizer.decode(ids, skip_special_tokens=True)
        return shown

    def _write(self, text: str) -> None:
        """On a terminal without what that would act upon; elsewhere as it is."""
        if sys.stdout.isatty():
            text = "".join(c if c in "\n\t" else escape(c) for c in text)
        sys.stdout.write(text)
        sys.stdout.flush()


def _note(reason: str, generator: Generator) -> None:
    """Says why a text ended, where nobody asked for it."""
    if reason == "capacity":
        capacity = generator.decoder.capacity
        print(f"note: the text ends at the capacity of {capacity} tokens", file=sys.stderr, flush=True)


def _speeds(timing: Timing) -> str:
    return (
        f"prompt: {timing.prompt_tokens} tokens, {timing.prompt_speed:.1f} tokens/s, "
        f"first token after {timing.first_seconds:.3f} s\n"
        f"generated: {timing.generated_tokens} tokens, {timing.speed:.1f} tokens/s"
    )
