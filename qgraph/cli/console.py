"""What the verbs print with: escaped text, plain tables, sizes, progress."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qgraph.progress import Progress

if TYPE_CHECKING:
    from qgraph.runtime import Model

_SILENCE_S = 30.0  # at most, of a phase that goes on


def escape(text: str) -> str:
    r"""`text` with every character that a terminal would act upon (controls, ESC, bidi marks) written as \x..
    or \u...."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(rows: Sequence[Sequence[object]], header: Sequence[str] = (), right: Sequence[int] = ()) -> str:
    """Rows as aligned columns; `right` lists the columns that are aligned to the right."""
    lines = [[escape(str(cell)) for cell in row] for row in ([header] if header else []) + list(rows)]
    if not lines:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    if header:
        lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def place(model: Model, threads: int) -> str:
    """Where a model runs: "2 threads" of the CPU, or "cuda:0"."""
    return f"{threads} thread{'s' if threads > 1 else ''}" if model.device == "cpu" else model.device


def print_json(value: Any) -> None:
    """One JSON document on stdout. Control characters are escaped by JSON itself."""
    json.dump(value, sys.stdout, indent=1)
    sys.stdout.write("\n")


class PlainProgress(Progress):
    """A line a phase on stderr, when it is over: for pipes, logs and CI. A long phase has one now and then
    that says how far it is."""

    def __init__(self) -> None:
        self._name = ""
        self._start = self._said = 0.0

    def _finish(self) -> None:
        if self._name:
            print(f"  {self._name:<10} {time.monotonic() - self._start:6.1f} s", file=sys.stderr, flush=True)
        self._name = ""

    def phase(self, name: str) -> None:
        self._finish()
        self._name, self._start = name, time.monotonic()
        self._said = self._start

    def step(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if now - self._said >= _SILENCE_S:
            self._said = now
            of = f" of {total}" if total else ""
            print(f"  {self._name:<10} {done}{of}: {escape(what)}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(f"  {escape(text)}", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()


class LiveProgress(Progress):
    """A bar a phase on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._bars = Progress(
            SpinnerColumn(finished_text="[green]\u2713[/]"),
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[what]}", markup=False),
            console=Console(stderr=True),
        )
        self._task: Any = None

    def _finish(self) -> None:
        if self._task is not None:
            self._bars.update(self._task, total=1, completed=1, what="")
            self._bars.stop_task(self._task)

    def phase(self, name: str) -> None:
        self._finish()
        self._task = self._bars.add_task(name, total=None, what="")

    def step(self, done: int, total: int, what: str) -> None:
        self._bars.update(self._task, total=total or None, completed=done, what=escape(what))

    def note(self, text: str) -> None:
        self._bars.console.print(f"  {escape(text)}", markup=False, highlight=False)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        self._bars.stop()


def make_progress(quiet: bool) -> Progress:
    """The listener that fits: none when quiet, bars on a terminal, else lines."""
    if quiet:
        return Progress()
    return LiveProgress() if sys.stderr.isatty() else PlainProgress()
