"""Makes something happen before a certain call: for scripts that interrupt themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def before_call(owner: Any, name: str, count: int, happen: Callable[[], object]) -> None:
    """`happen` before the `count`-th call of the function `name` of the class or module `owner`."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            happen()
        return original(*args, **options)

    setattr(owner, name, counted)
