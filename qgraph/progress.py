"""How long-running work says what it is doing."""

from __future__ import annotations

from types import TracebackType


class Progress:
    """A listener that hears nothing. The command line has ones that print."""

    def phase(self, name: str) -> None:
        """The phase `name` begins; the one before is over."""

    def step(self, done: int, total: int, what: str) -> None:
        """`done` of the phase's `total` pieces (0: not known) are finished; `what` is the current one."""

    def note(self, text: str) -> None:
        """Something that the user is told once, on a line of its own."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The work is over, well or not."""
