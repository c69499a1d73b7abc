"""Whole models on the GPU, for benchmarks/gpu.py: beside their own CPU code, and a Llama beside torch's."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gpu_layers import Emit, Row, relative_error
from gpu_peers import AbsentError, TorchLlama, torch_on_gpu
from gpu_skeleton import LARGE_TABLE, fill, read_artifact

from qgraph import runtime
from qgraph.codegen import package
from qgraph.evaluate.samples import input_specs
from qgraph.evaluate.text_ports import TextPorts, text_ports
from qgraph.runtime import Model, _native

LOGITS = "logits"
# (texts, tokens) that one session reads one after another, for each: whole prompts, then behind them.
TEXTS = ((1, (17, 1, 1, 5)), (3, (64, 1, 9, 1)), (8, (130, 1, 1, 1)))
SMALL_TEXTS = ((2, (5, 1)),)
BATCHES = ((1, 16), (3, 37), (8, 128))
GREEDY, SMALL_GREEDY = 32, 3  # tokens, behind a prompt of
PROMPT = 12


def unpack(entry: Row, folder: Path, work: Path) -> Path:
    """The artifact of a file of the folder."""
    path = work / Path(entry["file"]).with_suffix(".qg").name
    tensors, metadata = fill(folder / entry["file"])
    package.write_path(path, tensors, metadata)
    return path


class Text:
    """A loaded decoder that reads texts, the state in its session; what it writes to holds NaN before."""

    def __init__(self, path: Path, device: str, capacity: int) -> None:
        self.model = runtime.load(path, device=device)
        self.session = self.model.session(capacity=capacity)
        self.ports: TextPorts = text_ports(input_specs(self.model), [t.name for t in self.model.outputs])
        self.vocabulary = int(self.model.outputs[0].shape[-1])

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Logits of all of ids [batch, n] behind what was read."""
        logits = np.full((*ids.shape, self.vocabulary), np.nan, np.float32)
        feeds = self.ports.feeds(ids, self.session.length)
        self.session.run(feeds, dims={LOGITS: ids.shape[1]}, outputs={LOGITS: logits})
        return logits

    def close(self) -> None:
        self.session.close()
        self.model.close()


def check_decoder(entry: Row, folder: Path, work: Path, emit: Emit, small: bool = False) -> None:
    """Logits of both devices for prompts and tokens behind them, then what each writes by itself."""
    path, name = unpack(entry, folder, work), _name(entry)
    texts = SMALL_TEXTS if small else TEXTS
    cpu, gpu = (Text(path, device, 256) for device in ("cpu", "cuda"))
    rng = np.random.default_rng(0)
    for batch, lengths in texts:
        for text in (cpu, gpu):
            text.session.reset()
        for length in lengths:
            ids = rng.integers(0, cpu.vocabulary, (batch, length))
            error = relative_error(gpu.read(ids), cpu.read(ids))
            case = f"{batch} x {length} behind {cpu.session.length - length}"
            emit({"kind": "error", "name": name, "case": case, "error": error})
    emit({"kind": "greedy", "name": name, **_greedy(cpu, gpu, SMALL_GREEDY if small else GREEDY, rng)})
    for text in (cpu, gpu):
        text.close()
    path.unlink()


def _greedy(cpu: Text, gpu: Text, count: int, rng: np.random.Generator) -> Row:
    """How many of `count` tokens the two write alike; where they part, how far ahead the CPU's own was."""
    for text in (cpu, gpu):
        text.session.reset()
    ids = rng.integers(0, cpu.vocabulary, (1, PROMPT))
    logits = [text.read(ids)[0, -1] for text in (cpu, gpu)]
    for i in range(count):
        ours, theirs = (int(np.argmax(one)) for one in logits)
        if ours != theirs:
            lead = float(logits[0][ours] - logits[0][theirs])
            off = float(np.abs(logits[0] - logits[1]).max())
            return {"equal": i, "of": count, "lead": lead, "largest_difference": off}
        logits = [text.read(np.array([[ours]]))[0, -1] for text in (cpu, gpu)]
    return {"equal": count, "of": count}


def check_encoder(entry: Row, folder: Path, work: Path, emit: Emit, small: bool = False) -> None:
    """All outputs of both devices, for padded batches."""
    path = unpack(entry, folder, work)
    cpu, gpu = (runtime.load(path, device=device) for device in ("cpu", "cuda"))
    ranges = json.loads(cpu.metadata.get("qgraph.input_ranges", "{}"))
    rng = np.random.default_rng(0)
    for batch, length in BATCHES[:1] if small else BATCHES:
        feeds = _padded(cpu, ranges, batch, length, rng)
        expected = cpu.run(feeds)
        poisoned = {name: np.full_like(value, np.nan) for name, value in expected.items()}
        found = gpu.run(feeds, outputs=poisoned)
        error = max(relative_error(found[name], expected[name]) for name in expected)
        emit({"kind": "error", "name": _name(entry), "case": f"{batch} x {length}", "error": error})
    cpu.close()
    gpu.close()
    path.unlink()


def _padded(
    model: Model, ranges: Mapping[str, list[int]], batch: int, length: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Token ids, and a mask under which the first text is a third shorter."""
    feeds = {}
    for info in model.inputs:
        low, high = ranges.get(info.name, (0, 1))
        feeds[info.name] = rng.integers(low, high + 1, (batch, length)).astype(info.dtype)
        if "mask" in info.name:
            feeds[info.name] = np.ones((batch, length), info.dtype)
            feeds[info.name][0, length - length // 3 :] = 0
    return feeds


def measure_llama(
    entry: Row, folder: Path, work: Path, prompt: int, steps: int, turns: int, emit: Emit
) -> None:
    """Prompts and steps of a Llama in turns with torch's; then where the time of a step goes."""
    path, name = unpack(entry, folder, work), _name(entry)
    nbytes = bytes_of_a_step(path)
    text = Text(path, "cuda", prompt + steps + 8)
    path.unlink()
    times: dict[str, dict[str, list[float]]] = {name: {"prompt": [], "step": []}}
    peer = None
    try:
        llama = TorchLlama(entry["shape"], prompt + steps + 8)
        peer = llama.prompt(prompt), llama.step(prompt)
        times["torch bf16"] = {"prompt": [], "step": []}
    except AbsentError as error:
        emit({"kind": "note", "text": f"without torch's Llama: {error}"})
    read, advance = _on_device(text, prompt)
    for turn in range(turns + 1):  # the first is not counted
        found = {name: (_timed(read, 1), _timed(advance, steps))}
        if peer is not None:
            found["torch bf16"] = (_timed(peer[0], 1), _timed(peer[1], steps))
        for who, (prompts, behind) in found.items():
            if turn:
                times[who]["prompt"] += prompts
                times[who]["step"] += behind
    if not np.isfinite(text.read(np.zeros((1, 1), np.int64))).all():
        raise ValueError(f"{name}: logits that are not numbers")
    for who, own in times.items():
        for what, tokens in (("prompt", prompt), ("step", 1)):
            emit(
                {
                    "kind": "llama",
                    "beside": name,
                    "name": who,
                    "what": what,
                    "tokens": tokens,
                    "layers": entry["shape"]["layers"],
                    "median": float(np.median(own[what])),
                    "best": float(np.quantile(own[what], 0.1)),
                    "read": nbytes if who == name else 0,
                }
            )
    profile(text, name, emit)
    text.close()


def bytes_of_a_step(path: Path) -> int:
    """Of the weights that one token needs: all but tables, which it reads a row of."""
    tensors, _ = read_artifact(path)
    weights = [t for t in tensors if t.name.startswith("w/")]
    tables = [t for t in weights if t.dtype == "f32" and t.data.ndim == 2 and t.data.nbytes > LARGE_TABLE]
    return sum(t.data.nbytes for t in weights) - sum(t.data.nbytes for t in tables)


def _on_device(text: Text, prompt: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """(a prompt from the start, one token more), token ids and logits in memory of the GPU where torch is.

    The first step behind a prompt binds them, the others only run, as a loop in C would: the next token is
    written where the last one was. (Where positions or a mask are inputs, each step binds.)
    """
    rng = np.random.default_rng(0)
    held = text.session

    def prepared(tokens: int) -> Callable[[], object]:
        ids = rng.integers(0, text.vocabulary, (1, tokens))
        logits: Any = np.empty((1, 1, text.vocabulary), np.float32)
        try:
            torch = torch_on_gpu()
            logits = torch.from_numpy(logits).cuda()
            on_device = torch.from_numpy(ids).cuda()
        except AbsentError:
            on_device = None

        def run() -> None:
            feeds: dict[str, Any] = dict(text.ports.feeds(ids, held.length))
            if on_device is not None:
                feeds["input_ids"] = on_device
            held.run(feeds, dims={LOGITS: 1}, outputs={LOGITS: logits})

        return run

    whole, one = prepared(prompt), prepared(1)

    bound = False

    def read() -> None:
        nonlocal bound
        held.reset()
        whole()
        bound = False

    def advance() -> None:
        nonlocal bound
        if bound:
            _native.check(_native.library().qg_run(held._open_handle()))
        else:
            one()
            bound = len(text.ports.tokens) == 1

    return read, advance


def _timed(run: Callable[[], object], count: int, warm: int = 0) -> list[float]:
    for _ in range(warm):
        run()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def profile(text: Text, name: str, emit: Emit) -> None:
    """Where one step's time goes, by kernels, largest first."""
    ids = np.zeros((1, 1), np.int64)
    for _ in range(2):  # the first makes the graph that has events in it
        found = text.session.profile(text.ports.feeds(ids, text.session.length), {LOGITS: 1})
    sums: dict[str, list[int]] = {}
    for step, nanoseconds in found.steps:
        if nanoseconds > 0:
            kernel = re.sub(r"^qg_", "", step.kernel)
            sums.setdefault(kernel, []).append(nanoseconds)
    for kernel, each in sorted(sums.items(), key=lambda item: -sum(item[1])):
        emit({"kind": "profile", "name": name, "kernel": kernel, "steps": len(each), "ns": sum(each)})


def _name(entry: Row) -> str:
    return Path(entry["file"]).name.removesuffix(".gz")
