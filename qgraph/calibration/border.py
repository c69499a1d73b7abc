"""The values between two segments, on disk: one file a value, its batches one after the other."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from qgraph.atomic import atomic_write
from qgraph.errors import ResourceError

MANIFEST = "border.json"
_SUFFIX, _DIGITS = ".values", 6  # of a file's name: the number of the write, then that of the value


@dataclass
class StoredValue:
    """Where the batches of one value are."""

    file: str
    dtype: str  # numpy's
    shapes: list[list[int]]  # of each batch
    sha256: str = ""  # of the file

    def offset(self, batch: int) -> int:
        """Where in the file a batch begins."""
        return sum(math.prod(shape) for shape in self.shapes[:batch]) * np.dtype(self.dtype).itemsize


class Border:
    """The values that are alive at a position of the walk, in `folder`, which is theirs alone.

    `write` replaces them by those of a later position: until all of these are on the disk, those of the
    earlier one stand. With `keep`, what an earlier process left there is taken up if it is whole, and else
    removed; without, nothing is to survive this process.

    Raises ResourceError when the disk is full or refuses.
    """

    def __init__(self, folder: Path, *, keep: bool = False) -> None:
        self.folder, self._keep = folder, keep
        self.position = -1  # the last that was written
        self._values: dict[str, StoredValue] = {}
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if keep:
                self._load()
            self._sweep()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        """The keys of what is alive."""
        return iter(self._values)

    def read(self, key: str, batch: int) -> npt.NDArray[Any]:
        """One batch of a value, as it was put. Many threads may read at once."""
        value = self._values[key]
        shape = value.shapes[batch]
        array = np.fromfile(
            self.folder / value.file, np.dtype(value.dtype), math.prod(shape), offset=value.offset(batch)
        )
        return array.reshape(shape)

    @contextlib.contextmanager
    def write(self, position: int, alive: Iterable[str]) -> Iterator[BorderWriter]:
        """Yields what takes the batches of those `alive` that are not here yet, in order.

        When the block ends well, `alive` is what the border holds, and it survives a crash from then on.
        """
        alive = sorted(set(alive))
        serial = 1 + max((int(value.file[:_DIGITS]) for value in self._values.values()), default=-1)
        new_keys = [key for key in alive if key not in self._values]
        writer = BorderWriter(self.folder, serial, new_keys, durable=self._keep)
        with disk_errors(self.folder):
            try:
                yield writer
                new = writer.close()
            except BaseException:
                writer.discard()
                raise
            self._values = {key: new.get(key) or self._values[key] for key in alive}
            self.position = position
            if self._keep:
                self._save()
            self._sweep()

    def clear(self) -> None:
        """Forget everything."""
        self.position, self._values = -1, {}
        with disk_errors(self.folder):
            (self.folder / MANIFEST).unlink(missing_ok=True)
            self._sweep()

    def _save(self) -> None:
        body = {"position": self.position, "values": {key: asdict(v) for key, v in self._values.items()}}
        text = json.dumps(body, sort_keys=True)
        with atomic_write(self.folder / MANIFEST) as file:
            file.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "border": text}))

    def _load(self) -> None:
        """What the manifest tells, if it and every file that it names are undamaged; else nothing."""
        try:
            outer = json.loads((self.folder / MANIFEST).read_text())
            if hashlib.sha256(outer["border"].encode()).hexdigest() != outer["sha256"]:
                return
            body = json.loads(outer["border"])
            values = {key: StoredValue(**entry) for key, entry in body["values"].items()}
            for value in values.values():
                with (self.folder / value.file).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != value.sha256:
                        return
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return
        self.position, self._values = body["position"], values

    def _sweep(self) -> None:
        """Removes files that nothing refers to: of an earlier position, or of a process that was killed."""
        named = {value.file for value in self._values.values()}
        for path in self.folder.glob(f"*{_SUFFIX}"):
            if path.name not in named:
                path.unlink(missing_ok=True)
        if not self._values:
            (self.folder / MANIFEST).unlink(missing_ok=True)


class BorderWriter:
    """Files in the making. `put` the batches of every key in order.

    durable: they are to survive this process, so that they are hashed, and waited for until they are on the
    disk.
    """

    def __init__(self, folder: Path, serial: int, keys: list[str], *, durable: bool) -> None:
        self.keys = tuple(keys)  # that are wanted
        self._durable = durable
        self._files = {key: folder / f"{serial:0{_DIGITS}}-{i:04}{_SUFFIX}" for i, key in enumerate(keys)}
        self._open: dict[str, BinaryIO] = {}
        self._values: dict[str, StoredValue] = {}
        self._digests: dict[str, Any] = {}

    def put(self, key: str, array: npt.NDArray[Any]) -> None:
        """Appends the next batch of `key`."""
        if key not in self._open:
            self._open[key] = self._files[key].open("wb")
            self._values[key] = StoredValue(self._files[key].name, array.dtype.name, [])
            self._digests[key] = hashlib.sha256()
        value = self._values[key]
        assert value.dtype == array.dtype.name, key
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self._open[key].write(data)
        if self._durable:
            self._digests[key].update(data)
        value.shapes.append(list(array.shape))

    def close(self) -> dict[str, StoredValue]:
        """Ends the files."""
        for key, file in self._open.items():
            file.flush()
            if self._durable:
                os.fsync(file.fileno())
                self._values[key].sha256 = self._digests[key].hexdigest()
            file.close()
        return self._values

    def discard(self) -> None:
        """Removes the files."""
        for file in self._open.values():
            with contextlib.suppress(OSError):
                file.close()
        for path in self._files.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """OSError as ResourceError: what could not be kept, and what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else (error.strerror or str(error))
        raise ResourceError(
            f"calibration cannot keep its files in {path}: {reason}: free some space there, or let "
            "QGRAPH_CACHE_DIR name a folder with more"
        ) from error
