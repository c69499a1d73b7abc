"""One way to feed a causal language model a text bit by bit, whatever it is.

An artifact with state keeps its cache itself. An ONNX file with a cache gets back what it gave. A model
without a cache is given the whole text every time: slow, and the measure for the other two.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from qgraph.errors import InputError, UsageError
from qgraph.evaluate.runners import ArtifactRunner, OnnxRuntimeRunner, ReferenceRunner, Runner, open_runner
from qgraph.evaluate.samples import artifact_ranges
from qgraph.evaluate.text_ports import IDS, POSITIONS, TextPorts, empty_cache, no_logit, text_ports

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from qgraph.runtime import Model, Profile

    Ids = npt.NDArray[np.int64]
    Logits = npt.NDArray[np.float32]

LOGITS = "logits"
# Tokens, of all texts together, that an artifact with state reads in one run where only the last logits are
# wanted: memory for temporaries grows by the token, speed no further.
TOKENS_AT_ONCE = {"cpu": 256, "cuda": 2048}


class Decoder(Protocol):
    """A text, or several of one length, that a model is reading.

    name: the engine, for tables. vocabulary: logits a position, 0 if the file does not tell. capacity: tokens
    a text may have, 0 if nobody told.
    """

    name: str
    vocabulary: int
    capacity: int

    @property
    def length(self) -> int:
        """Tokens read so far."""

    def feed(self, ids: Ids, last: bool = False) -> Logits:
        """Reads on.

        Args:
            ids: int64 [batch, sequence], at least one token; the batch is that of the text so far.
            last: only the logits of the last position are wanted.

        Returns float32 [batch, sequence or 1, vocabulary].

        Raises InputError: ids of another shape, above the vocabulary, more tokens than `capacity`; after an
        error the text is as it was.
        """

    def select(self, rows: Sequence[int]) -> None:
        """Text i goes on from text rows[i], so that texts can be dropped, or become several."""

    def reset(self) -> None:
        """Forgets the text."""

    def close(self) -> None:
        """Frees what it holds."""


def open_decoder(
    path: str | os.PathLike[str],
    *,
    engine: str = "",
    threads: int = 0,
    device: str | None = None,
    capacity: int = 0,
    room: int = 0,
    public_key: bytes | None = None,
) -> Decoder:
    """A decoder for an artifact or an ONNX file. engine, threads, device and public_key: see `open_runner`.
    capacity: tokens that a text may have. 0: of an artifact with state as much as `room` tokens need, as far
    as the model goes, or without `room` its own default; of other models no limit but their own.

    Raises UsageError for a model that is no causal language model, UnsupportedError for a cache that cannot
    be followed; and as `open_runner` and `qgraph.runtime.load`.
    """
    runner = open_runner(
        path,
        engine=engine,
        threads=threads,
        device=device,
        capacity=capacity,
        room=room,
        public_key=public_key,
    )
    ports = text_ports(runner.specs, runner.outputs, logits=LOGITS, where=os.fspath(path))
    if isinstance(runner, ArtifactRunner) and runner.has_state:
        return StatefulDecoder(runner, ports)
    if ports.cache:
        assert isinstance(runner, OnnxRuntimeRunner | ReferenceRunner)  # an artifact has no cache ports
        return CachedDecoder(runner, ports, capacity)
    return WholeTextDecoder(runner, ports, capacity)


def stateful_decoder(model: Model, *, room: int) -> StatefulDecoder:
    """A decoder for a loaded artifact with state, which texts of so many tokens fit in. Errors as
    `open_decoder`."""
    runner = ArtifactRunner(model, room=room)
    return StatefulDecoder(runner, text_ports(runner.specs, runner.outputs, where=os.fspath(model.path)))


def open_text_runner(
    path: str | os.PathLike[str],
    *,
    logits: str = LOGITS,
    engine: str = "",
    threads: int = 0,
    device: str | None = None,
    room: int = 0,
) -> Runner:
    """As `open_runner`, for whole texts of at most `room` tokens: a cache is empty at the start of every run,
    and no port. logits: the output's name. Raises UsageError for a model that is no causal language model."""
    runner = open_runner(path, engine=engine, threads=threads, device=device, room=room)
    ports = text_ports(runner.specs, runner.outputs, logits=logits, where=os.fspath(path))
    if isinstance(runner, OnnxRuntimeRunner | ReferenceRunner) and ports.cache:
        return FromStart(runner, ports.cache)
    return runner


class FromStart:
    """A model with a cache as one without: every run reads a text from its start.

    cache: past input -> present output. Raises InputError for one that the model does not have.
    """

    def __init__(self, runner: OnnxRuntimeRunner | ReferenceRunner, cache: Mapping[str, str]) -> None:
        for names, known in ((cache, runner.inputs), (cache.values(), runner.outputs)):
            if missing := [name for name in names if name not in known]:
                raise InputError(f"the model has no '{missing[0]}', which is part of the cache")
        self._runner = runner
        self._pasts = [spec for spec in runner.specs if spec.name in cache]
        self.name = runner.name
        self.specs = tuple(spec for spec in runner.specs if spec.name not in cache)
        self.inputs = tuple(spec.name for spec in self.specs)
        self.outputs = tuple(name for name in runner.outputs if name not in cache.values())
        self.output_shapes = {name: runner.output_shapes[name] for name in self.outputs}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Runner.run`."""
        empty = empty_cache(self._pasts, feeds)
        values = self._runner.run_values({**feeds, **empty}, self.outputs)
        return {name: _numpy(value) for name, value in values.items()}


class StatefulDecoder:
    """An artifact whose session holds the cache. See `Decoder`."""

    def __init__(self, runner: ArtifactRunner, ports: TextPorts) -> None:
        self._runner, self._ports, self.session = runner, ports, runner.session
        self.name, self.vocabulary = runner.name, _vocabulary(runner)
        # Where positions are an input, their table is what the artifact tells of how many there are.
        _, last = artifact_ranges(runner.model).get(POSITIONS, (0, 0))
        positions = last + 1 if last > 1 else self.session.capacity
        self.capacity = min(self.session.capacity, positions)

    @property
    def length(self) -> int:
        return self.session.length

    @property
    def threads(self) -> int:
        """Number of threads in use."""
        return self.session.threads

    def feed(self, ids: Ids, last: bool = False) -> Logits:
        import numpy as np

        ids, before = _checked(ids, self.vocabulary), self.length
        _require_room(before + ids.shape[1], self.capacity)
        most = max(1, TOKENS_AT_ONCE[self._runner.model.device.partition(":")[0]] // len(ids))
        try:
            for part in np.array_split(ids, -(-ids.shape[1] // most) if last else 1, axis=1):
                feeds = self._ports.feeds(part, self.length)
                logits: Logits = self.session.run(feeds, dims=self._dims(last))[LOGITS]
        except BaseException:
            if self.length > before:
                self.truncate(before)
            raise
        return logits[:, -1:] if last else logits

    def profile(self, ids: Ids) -> Profile:
        """As `feed` with `last`, in one run, for the time of every step."""
        feeds = self._ports.feeds(_checked(ids, self.vocabulary), self.length)
        return self.session.profile(feeds, dims=self._dims(True))

    def _dims(self, last: bool) -> dict[str, int]:
        return {LOGITS: 1} if last and self._runner.output_shapes[LOGITS][1] == LOGITS else {}

    def select(self, rows: Sequence[int]) -> None:
        self.session.copy_state(self.session, rows)

    def reset(self) -> None:
        self.truncate(0)

    def truncate(self, length: int) -> None:
        """Forgets all but the first tokens of the text."""
        self.session.truncate(length)

    def close(self) -> None:
        self._runner.close()


class CachedDecoder:
    """An ONNX file with a cache: what one run gives back is the past of the next. See `Decoder`."""

    def __init__(self, runner: OnnxRuntimeRunner | ReferenceRunner, ports: TextPorts, capacity: int) -> None:
        self._runner, self._ports, self.capacity = runner, ports, capacity
        self.name, self.vocabulary = runner.name, _vocabulary(runner)
        self.length = 0
        self._cache: dict[str, Any] = {}

    def feed(self, ids: Ids, last: bool = False) -> Logits:
        ids = _checked(ids, self.vocabulary)
        _require_room(self.length + ids.shape[1], self.capacity)
        feeds = self._ports.feeds(ids, self.length)
        cache = self._cache or empty_cache(self._ports.pasts, feeds)
        outputs = [LOGITS, *self._ports.cache.values()]
        values = self._runner.run_values({**feeds, **cache}, outputs)
        self._cache = {past: values[present] for past, present in self._ports.cache.items()}
        self.length += ids.shape[1]
        logits: Logits = _numpy(values[LOGITS])
        return logits[:, -1:] if last else logits

    def select(self, rows: Sequence[int]) -> None:
        self._cache = {name: _numpy(value)[list(rows)] for name, value in self._cache.items()}

    def reset(self) -> None:
        self.length, self._cache = 0, {}

    def close(self) -> None:
        self.reset()


class WholeTextDecoder:
    """A model without a cache, which reads the text from its start each time. See `Decoder`."""

    def __init__(self, runner: Runner, ports: TextPorts, capacity: int) -> None:
        self._runner, self._ports = runner, ports
        self.name, self.vocabulary = runner.name, _vocabulary(runner)
        self.capacity = min(filter(None, (capacity, _most_positions(runner))), default=0)
        self._text: Ids | None = None

    @property
    def length(self) -> int:
        return 0 if self._text is None else self._text.shape[1]

    def feed(self, ids: Ids, last: bool = False) -> Logits:
        import numpy as np

        ids = _checked(ids, self.vocabulary)
        text = ids if self._text is None else np.concatenate([self._text, ids], axis=1)
        _require_room(text.shape[1], self.capacity)
        wanted = 1 if last else ids.shape[1]
        feeds = self._ports.feeds(text, 0)
        if isinstance(self._runner, ArtifactRunner) and self._runner.output_shapes[LOGITS][1] == LOGITS:
            logits = self._runner.session.run(feeds, dims={LOGITS: wanted})[LOGITS]
        else:
            logits = self._runner.run(feeds)[LOGITS]
        if logits.shape[1] not in (wanted, text.shape[1]):
            raise InputError(f"logits {list(logits.shape)} for {list(text.shape)} tokens: not one a position")
        self._text = text
        return logits[:, -wanted:]

    def select(self, rows: Sequence[int]) -> None:
        self._text = None if self._text is None else self._text[list(rows)]

    def reset(self) -> None:
        self._text = None

    def close(self) -> None:
        self.reset()


def _most_positions(runner: Runner) -> int:
    """Of an artifact without state: tokens that its input takes; 0 if the file does not tell."""
    if not isinstance(runner, ArtifactRunner):
        return 0
    length = next(spec.shape[1] for spec in runner.specs if spec.name == IDS)
    most = next((dim.max for dim in runner.model.dims if dim.name == length), 0)
    return length if isinstance(length, int) else most


def _vocabulary(runner: Runner) -> int:
    shape = runner.output_shapes[LOGITS]
    if len(shape) != 3:
        raise UsageError(f"the output '{LOGITS}' is {list(shape)}: expected [batch, sequence, vocabulary]")
    return shape[2] if isinstance(shape[2], int) else 0


def _checked(ids: Ids, vocabulary: int) -> Ids:
    import numpy as np

    ids = np.asarray(ids)
    if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
        raise InputError(f"ids are {ids.dtype} {list(ids.shape)}: expected integers [batch, sequence]")
    if ids.min() < 0 or (vocabulary and ids.max() >= vocabulary):
        raise no_logit(ids.min() if ids.min() < 0 else ids.max(), vocabulary)
    return ids


def _require_room(tokens: int, capacity: int) -> None:
    if capacity and tokens > capacity:
        raise InputError(f"{tokens} tokens are more than the capacity of {capacity}: give a larger one")


def _numpy(value: Any) -> np.ndarray:
    import numpy as np

    return value if isinstance(value, np.ndarray) else value.numpy()
