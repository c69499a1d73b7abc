"""What a user can get wrong, or the machine refuse, as exceptions: each carries the exit code of the CLI.

A message is one line: what is wrong, where, and what to do about it.
"""

from __future__ import annotations


class QGraphError(Exception):
    """Base of every error that qgraph raises on purpose. Exit code 70: a defect of qgraph itself."""

    exit_code = 70


class UsageError(QGraphError):
    """A wrong option, name or combination of them."""

    exit_code = 2


class InputError(QGraphError):
    """A model, artifact or tensor that is missing, damaged or not what it claims to be."""

    exit_code = 3


class UnsupportedError(QGraphError):
    """A valid input that this version cannot handle: an operator, data type, CPU or format version."""

    exit_code = 4


class BudgetError(QGraphError):
    """The result exists but misses what was asked for: accuracy, size, or realised precision (`--strict`)."""

    exit_code = 5


class ResourceError(QGraphError):
    """The machine ran out of something or refused it: disk, memory, permission, a missing compiler."""

    exit_code = 6


class SignatureError(QGraphError):
    """An artifact that is not signed by the key that was asked for, or was changed after it was signed."""

    exit_code = 7
