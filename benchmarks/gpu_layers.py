"""Linear layers on the GPU, for benchmarks/gpu.py: right or not, and how fast beside the peers.

What is timed goes over so many layers that their weights do not fit into any cache, several times over,
each layer with an output of its own; by the wall's clock, from the call to the result, so that nothing is
left out. Inputs and outputs lie on the device and are bound once (all outputs to the same memory: it is one
CUDA graph, in order). Without torch they lie in memory of the host and are copied, which is good for tests of
this program alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gpu_peers import PEERS, AbsentError, Peer, Run, torch_on_gpu
from gpu_skeleton import fill, side_by_side
from gpu_weights import matrix

from qgraph import runtime
from qgraph.codegen import package
from qgraph.runtime import _native

MOST = 4000  # outputs of a plan
WARM = 3
LEAST = 3  # turns, however long they take
SECONDS = 1.0  # of a contender's turns at most, of a number of rows and a repeat

Row = dict[str, Any]
Emit = Callable[[Row], None]


@dataclass(frozen=True)
class Sizes:
    """How much is measured. cold: bytes that the weights of a pass exceed."""

    rows: Sequence[int]
    checked_rows: Sequence[int]
    cold: int
    turns: int
    repeats: int
    passes: int


class Layers:
    """An artifact of linear layers, made of the skeleton of one and loaded on the GPU."""

    def __init__(self, entry: Row, folder: Path, work: Path, sizes: Sizes) -> None:
        self.K, self.N, self.scheme = entry["K"], entry["N"], entry["scheme"]
        tensors, metadata = fill(folder / entry["file"])
        weights = {t.name: t.data for t in tensors if t.name.startswith("w/")}
        self.nbytes = sum(data.nbytes for data in weights.values())
        self._weight: np.ndarray | None = None
        self._weights = weights
        self.layers = max(1, -(-sizes.cold // self.nbytes))
        self.passes = max(1, min(sizes.passes, MOST // self.layers))
        path = work / "layers.qg"
        package.write_path(path, side_by_side(tensors, self.layers, self.passes), metadata)
        try:
            self.model = runtime.load(path, device="cuda")
        finally:
            path.unlink()
        self._outputs = [info.name for info in self.model.outputs]
        self._input = self.model.inputs[0].name

    def bind(self, rows: int) -> tuple[Run, int]:
        """(what does all layers once on random inputs, how many it does)"""
        session = self.model.session()
        x = np.random.default_rng(rows).standard_normal((rows, self.K), np.float32)
        try:
            torch = torch_on_gpu()
            given: Any = torch.from_numpy(x).cuda()
            shared: Any = torch.empty(rows, self.N, device="cuda")
            outputs = dict.fromkeys(self._outputs, shared)
        except AbsentError:
            given, outputs = x, {name: np.empty((rows, self.N), np.float32) for name in self._outputs}
        session.run({self._input: given}, outputs=outputs)
        library = _native.library()

        def run(keep: object = (given, outputs)) -> None:
            _native.check(library.qg_run(session._open_handle()))

        return run, len(self._outputs)

    def error(self, rows: int) -> float:
        """The relative Frobenius error of the first layer's output, which held NaN before, to float64
        products with the weights as FORMAT.md has them. Infinite where the output is not finite."""
        if self._weight is None:
            self._weight = matrix(self._weights, (self.K, self.N), self.scheme)
        x = np.random.default_rng(rows).standard_normal((rows, self.K), np.float32)
        first, *others = self._outputs
        y: Any = np.full((rows, self.N), np.nan, np.float32)
        rest: Any = np.empty_like(y)
        try:
            torch = torch_on_gpu()
            y, rest = (torch.from_numpy(array).cuda() for array in (y, rest))
        except AbsentError:
            pass
        with self.model.session() as session:
            session.run({self._input: x}, outputs={first: y, **dict.fromkeys(others, rest)})
        found = y if isinstance(y, np.ndarray) else y.cpu().numpy()
        return relative_error(found, _product(x, self._weight))

    def close(self) -> None:
        self.model.close()


def _product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """float64, on the GPU where torch is."""
    try:
        torch = torch_on_gpu()
    except AbsentError:
        return x.astype(np.float64) @ weight.astype(np.float64)
    left, right = (torch.from_numpy(np.ascontiguousarray(a)).cuda().double() for a in (x, weight))
    return np.asarray((left @ right).cpu().numpy())


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Of Frobenius norms; infinite where `found` has what is not a number."""
    if not np.isfinite(found).all():
        return float("inf")
    difference = np.linalg.norm(found.astype(np.float64) - expected)
    return float(difference / max(float(np.linalg.norm(expected)), 1e-30))


def check_layers(entry: Row, folder: Path, work: Path, sizes: Sizes, emit: Emit) -> None:
    """Errors of a few layers, for each of `checked_rows`."""
    few = Sizes(sizes.rows, sizes.checked_rows, 1, 1, 1, passes=2)
    layers = Layers(entry, folder, work, few)
    for rows in sizes.checked_rows:
        emit({"kind": "error", **_about(entry), "case": f"{rows} rows", "error": layers.error(rows)})
    layers.close()


def measure_layers(
    entry: Row, folder: Path, work: Path, sizes: Sizes, emit: Emit, left: Callable[[], float]
) -> None:
    """Errors, then times of all `rows`, in turns with all peers; as far as the time that is `left` goes."""
    check_layers(entry, folder, work, sizes, emit)
    peers = list(_open_peers(entry["K"], entry["N"], sizes, emit))
    layers = Layers(entry, folder, work, sizes)
    for rows in sizes.rows:
        if left() < 2 * sizes.repeats * SECONDS * (1 + len(peers)):
            emit({"kind": "note", "text": f"no time left for {entry['file']}, {rows} rows"})
            break
        _measure_rows(entry, layers, peers, rows, sizes, emit)
    layers.close()


def _open_peers(K: int, N: int, sizes: Sizes, emit: Emit) -> Iterator[Peer]:
    for name, make in PEERS.items():
        try:
            yield make(K, N, sizes.cold, sizes.passes)
        except Exception as error:  # peers are others' software: whatever they raise, the rest goes on
            emit({"kind": "note", "text": f"without {name} of {K}x{N}: {one_line(error)}"})


def one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'without a message'}"


def _measure_rows(
    entry: Row, layers: Layers, peers: Sequence[Peer], rows: int, sizes: Sizes, emit: Emit
) -> None:
    about = _about(entry)
    names: list[tuple[str, int]] = [(about["name"], layers.nbytes)]
    runs = [layers.bind(rows)]
    for peer in peers:
        if rows > peer.most:
            continue
        try:
            runs.append(peer.bind(rows))
            names.append((peer.name, peer.nbytes))
        except Exception as error:
            emit({"kind": "note", "text": f"{peer.name}, {rows} rows of {about['shape']}: {one_line(error)}"})
    repeats = [time_turns([run for run, _ in runs], sizes.turns) for _ in range(sizes.repeats)]
    for i, ((name, nbytes), (_, count)) in enumerate(zip(names, runs, strict=True)):
        times = [[seconds / count for seconds in found[i]] for found in repeats]
        emit(
            {
                "kind": "time",
                **about,
                "beside": about["name"],
                "name": name,
                "rows": rows,
                "nbytes": nbytes,
                "operations": 2 * rows * layers.K * layers.N,
                "layers": count,
                "median": float(np.median(np.concatenate(times))),
                "best": float(np.quantile(np.concatenate(times), 0.1)),
                "repeats": [float(np.median(one)) for one in times],
            }
        )


def time_turns(runs: Sequence[Run], turns: int, seconds: float = SECONDS) -> list[list[float]]:
    """Seconds of each run, in turns: `turns`, or as many as fit into `seconds` each, at least LEAST."""
    for run in runs:
        start = time.perf_counter()
        for _ in range(WARM):
            run()
            if time.perf_counter() - start > seconds / LEAST:
                break
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(max(turns, LEAST)):
        for run, own in zip(runs, times, strict=True):
            if turn >= LEAST and sum(own) > seconds:
                continue
            start = time.perf_counter()
            run()
            own.append(time.perf_counter() - start)
    return times


def _about(entry: Row) -> Row:
    recipe = entry["scheme"] + (f"/{entry['compute']}" if entry.get("compute", "f32") != "f32" else "")
    return {"name": f"qgraph {recipe}", "scheme": entry["scheme"], "shape": f"{entry['K']}x{entry['N']}"}
