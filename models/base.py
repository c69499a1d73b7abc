"""What a model of this folder offers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class ModelInput:
    """One input of the exported graph; `shape` holds ints and names of dynamic dimensions."""

    name: str
    dtype: str  # numpy's name
    shape: tuple[int | str, ...]


class ExportableModel(Protocol):
    """A trained model with its export."""

    name: str
    title: str
    inputs: tuple[ModelInput, ...]
    output: str  # the output that its metric reads

    def export(self, path: str | os.PathLike[str], *, verbose: bool = False) -> Path:
        """Writes the float ONNX file, whole or not at all; the same bytes every time. Returns its path.

        Raises ResourceError where a package it needs is missing (with the command that installs it), or the
        file cannot be written.
        """

    def tokenizer_path(self) -> Path:
        """The `tokenizer.json` that turns text into the inputs."""


class ExampleModel(ExportableModel, Protocol):
    """A sentence encoder with its reference metric."""

    @property
    def embed(self) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """The reference metric's view of the outputs: (output, attention mask) -> unit vectors to compare."""
