"""Exceptions -> one line on stderr and an exit code. The only place that decides either."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import click

from qgraph.cli.console import escape
from qgraph.errors import InputError, QGraphError, ResourceError, UsageError

INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE
_STOPPING = (signal.SIGTERM, signal.SIGHUP)  # Python itself makes an exception of SIGINT


class _Stopped(BaseException):
    """A signal asks the process to end: like KeyboardInterrupt, so that files in the making are removed."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise _Stopped, once, unless the caller's process ignores or handles them."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # cleaning up is not interrupted
        raise _Stopped(number)

    ours = [number for number in _STOPPING if signal.getsignal(number) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        ours = []  # only the main thread may
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _prepare_streams() -> None:
    """stdout and stderr take whatever is printed: where closed, too, or of a small encoding."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # a closed one: no file of ours may get its number
    os.close(descriptor)
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115  None: closed at start
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone, after SIGHUP above all
        print(f"error: {text}", file=sys.stderr, flush=True)


def _silence_stdout() -> None:
    """What is still buffered goes nowhere: Python flushes stdout at exit, too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def guard(action: Callable[[], Any], debug: bool = False) -> int:
    """Call `action` and return its exit code: 0, or that of the error it raised, which is printed as one
    line."""
    if not debug:
        # Other people's warnings are for their developers; what a user must know is a message of ours.
        warnings.simplefilter("ignore")
    _prepare_streams()
    try:
        with _signals():
            code = action()
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted")
        return INTERRUPTED
    except _Stopped as stopped:
        _say((signal.strsignal(stopped.number) or "stopped").lower())
        return 128 + stopped.number
    except (BrokenPipeError, SystemExit):
        # The reader of a pipe has gone: say nothing. Click makes a SystemExit of it, and of nothing else when
        # not standalone.
        _silence_stdout()
        return BROKEN_PIPE
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return UsageError.exit_code
    except Exception as error:
        if debug:
            traceback.print_exc()
        known = as_qgraph_error(error)
        _say(escape(str(known)))
        try:
            sys.stdout.flush()
        except OSError:  # a full device: Python would try once more at exit, and say so
            _silence_stdout()
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
