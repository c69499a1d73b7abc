"""What a calibration has done so far, on disk: a run that was interrupted goes on from there.

A journal is a folder:

    journal.json            what the run was given, for people
    lock                    held by the process at work
    group-00007.safetensors the record of a stage, as `GroupHandler.solve` made it
                            or calibration itself
    border/                 values between two stages (border.py), only while a walk is under way

Records are written whole or not at all, and carry the SHA-256 of their content and the stage: one that is
damaged counts as missing. All that a result depends on is part of the folder's name, so results of different
runs never mix.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qgraph.atomic import atomic_write
from qgraph.cache import cache_dir
from qgraph.calibration.border import Border, disk_errors
from qgraph.errors import ResourceError

if TYPE_CHECKING:
    from qgraph.passes.linear_groups import Arrays, Stage

# Of the layout of the folder, and of the calibration itself: statistics of another version are not reused.
_VERSION = 1


class Journal:
    """The journal of the run that is given by `inputs`, in a folder that is made when it is opened.

    Args:
        inputs: all that the results depend on, as JSON: hashes of the model and the data, the recipe. The
            versions of qgraph, numpy and ONNX Runtime are added, and a hash of qgraph's own sources.
        root: where journals are kept; None: below the cache folder.
    """

    def __init__(self, inputs: Mapping[str, Any], *, root: str | os.PathLike[str] | None = None) -> None:
        self._inputs = {"format": _VERSION, **_versions(), **inputs}
        text = json.dumps(self._inputs, sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        base = cache_dir() / "calibration" if root is None else Path(root)
        self.folder = base / self.fingerprint[:32]

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Within the block the journal is this process's alone.

        Raises ResourceError when another process holds it, or the folder cannot be made.
        """
        with contextlib.ExitStack() as stack:
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((self.folder / "lock").open("a+"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ResourceError(
                        "another process is calibrating the same model with the same data and recipe "
                        f"({self.folder}): wait for it, its results will be used; or let QGRAPH_CACHE_DIR "
                        "name another folder"
                    ) from None
                self._remove_leftovers()
            with atomic_write(self.folder / "journal.json") as file:
                file.write_text(json.dumps(self._inputs, sort_keys=True, indent=1) + "\n")
            yield

    def border(self, *, keep: bool) -> Border:
        """For the values between two stages; with `keep` it holds them as far as an earlier run got."""
        return Border(self.folder / "border", keep=keep)

    def read(self, index: int, stage: Stage) -> Arrays | None:
        """The record of a stage; None when there is none that is whole."""
        from safetensors import SafetensorError, safe_open

        path = self._path(index)
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError, ValueError, TypeError, KeyError):
            return None
        return arrays if metadata.get("sha256") == _digest(stage, arrays) else None

    def write(self, index: int, stage: Stage, record: Mapping[str, npt.NDArray]) -> Arrays:
        """Keeps the record of a stage. Returns it as `read` will: what is put into effect is the same whether
        it comes from here or from there.

        Raises ResourceError when it cannot be written.
        """
        from safetensors.numpy import save

        arrays = {name: np.array(array, order="C") for name, array in record.items()}
        data = save(arrays, {"sha256": _digest(stage, arrays)})
        with atomic_write(self._path(index)) as file, disk_errors(self.folder):
            file.write_bytes(data)
        kept = self.read(index, stage)
        if kept is None:
            raise ResourceError(f"{self._path(index)}: what was written cannot be read back: check the disk")
        return kept

    def finish(self) -> None:
        """The walk is over: its records are all that stays."""
        shutil.rmtree(self.folder / "border", ignore_errors=True)

    def _path(self, index: int) -> Path:
        return self.folder / f"group-{index:05d}.safetensors"

    def _remove_leftovers(self) -> None:
        """Of writes that were interrupted."""
        for path in self.folder.glob(".*.tmp"):
            shutil.rmtree(path, ignore_errors=True)


def _versions() -> dict[str, str]:
    """Of everything that computes the results."""
    from qgraph import __version__
    from qgraph.calibration.session import onnxruntime

    return {
        "qgraph": __version__,
        "sources": _sources(),
        "numpy": np.__version__,
        "onnxruntime": onnxruntime().__version__,
    }


@cache
def _sources() -> str:
    """SHA-256 of the code that makes statistics and records: who changes a solver gets new records."""
    digest = hashlib.sha256()
    for part in ("calibration", "formats", "passes", "solvers"):
        folder = Path(import_module(f"qgraph.{part}").__path__[0])
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{part}/{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _digest(stage: Stage, arrays: Mapping[str, npt.NDArray]) -> str:
    """SHA-256 of whose record it is, and all that is in it."""
    digest = hashlib.sha256(json.dumps([stage.K, stage.values, stage.nodes, stage.weights]).encode())
    for name in sorted(arrays):
        digest.update(json.dumps([name, arrays[name].dtype.str, arrays[name].shape]).encode())
        digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
