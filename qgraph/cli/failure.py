"""Exceptions -> one line on stderr and an exit code. The only place that decides either."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import click

from qgraph.cli.console import escape
from qgraph.errors import InputError, QGraphError, ResourceError, UsageError

INTERRUPTED = 130
BROKEN_PIPE = 141


def guard(action: Callable[[], Any], debug: bool = False) -> int:
    """Call `action` and return its exit code: 0, or that of the error it raised, which is printed as one
    line."""
    if not debug:
        # Other people's warnings are for their developers; what a user must know is a message of ours.
        warnings.simplefilter("ignore")
    try:
        code = action()
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has gone: say nothing, also not while Python flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        if debug:
            traceback.print_exc()
        known = as_qgraph_error(error)
        print(f"error: {escape(str(known))}", file=sys.stderr)
        return known.exit_code


def as_qgraph_error(error: Exception) -> QGraphError:
    """The QGraphError that says what `error` means to a user."""
    if isinstance(error, QGraphError):
        return error
    if isinstance(error, click.ClickException):
        context: click.Context | None = getattr(error, "ctx", None)
        where = f" (see '{context.command_path} --help')" if context is not None else ""
        return UsageError(error.format_message().rstrip(".") + where)
    if isinstance(error, MemoryError):
        return ResourceError("out of memory: close other programs or use a machine with more")
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
        return InputError(f"{error.filename}: {(error.strerror or 'cannot be opened').lower()}")
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return ResourceError(f"{name}{error.strerror.lower()}")
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return QGraphError(f"internal error, please report it: {text}; run with --debug for the traceback")
