"""The jobs of benchmarks/gpu.py, in a process of their own: a GPU that fails, or a kernel that does not end,
takes no more than the job with it.

    python benchmarks/gpu_worker.py '{"folder": "...", "jobs": ["limits", "layers 4096x14336"], ...}'

A line of standard output that begins with MARK is a result, as JSON. After a job that failed the process
ends.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_layers import Row, Sizes, check_layers, measure_shape
from gpu_models import check_decoder, check_encoder, measure_llama
from gpu_peers import AbsentError, copy_bandwidth, gemm_rate, torch_on_gpu

from qgraph import runtime

MARK = "\x1e"


def emit(row: Row) -> None:
    print(MARK + json.dumps(row), flush=True)


def note(text: str) -> None:
    emit({"kind": "note", "text": text})


def limits() -> None:
    """What the GPU can do, and what this is run on."""
    for device in runtime.devices():
        note(f"{device.name}: {device.description}")
    if problem := runtime.device_problem():
        note(f"no GPU: {problem}")
    try:
        torch = torch_on_gpu()
    except AbsentError as error:
        note(f"limits and peers are not measured: {error}")
        return
    note(f"torch {torch.__version__}, CUDA {torch.version.cuda}")
    emit({"kind": "limit", "name": "copy", "value": copy_bandwidth()})
    emit({"kind": "limit", "name": "gemm", "value": gemm_rate()})


class Worker:
    """settings: folder, jobs, entries of the manifest, the fields of Sizes, prompt, turns of a Llama, small,
    and seconds for all jobs."""

    def __init__(self, settings: dict[str, Any], work: Path) -> None:
        self._folder, self._work, self._settings = Path(settings["folder"]), work, settings
        self._sizes = Sizes(**settings["sizes"])
        self._entries: list[Row] = settings["entries"]
        self._end = time.monotonic() + settings["seconds"]

    def run(self, job: str) -> None:
        what, _, which = job.partition(" ")
        getattr(self, f"_{what}")(which)

    def _limits(self, which: str) -> None:
        limits()

    def _models(self, which: str) -> None:
        for entry in self._of("decoder", "encoder"):
            check: Callable[..., None] = check_decoder if entry["kind"] == "decoder" else check_encoder
            if self._left() < 10:
                note(f"no time left for {entry['file']}")
                continue
            check(entry, self._folder, self._work, emit, self._settings["small"])

    def _layers(self, which: str) -> None:
        entries = [entry for entry in self._of("layer") if f"{entry['K']}x{entry['N']}" == which]
        if not self._settings["small"]:
            measure_shape(entries, self._folder, self._work, self._sizes, emit, self._left)
            return
        for entry in entries:
            check_layers(entry, self._folder, self._work, self._sizes, emit)

    def _llama(self, which: str) -> None:
        for entry in self._of("llama"):
            if entry["file"] == which:
                sizes = [self._settings[name] for name in ("prompt", "steps", "turns")]
                measure_llama(entry, self._folder, self._work, *sizes, emit)

    def _of(self, *kinds: str) -> list[Row]:
        return [entry for entry in self._entries if entry["kind"] in kinds]

    def _left(self) -> float:
        return self._end - time.monotonic()


def main(settings: dict[str, Any]) -> int:
    with tempfile.TemporaryDirectory(dir=settings["work"]) as work:
        worker = Worker(settings, Path(work))
        for job in settings["jobs"]:
            emit({"kind": "job", "job": job})
            try:
                worker.run(job)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                said = (str(error).strip().splitlines() or [""])[0]
                place = f"{Path(where.filename).name}:{where.lineno}"
                emit({"kind": "failure", "job": job, "text": f"{type(error).__name__}: {said} ({place})"})
                return 1
            emit({"kind": "done", "job": job})
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
