"""The jobs of benchmarks/gpu.py, in a process of their own: a GPU that fails, or a kernel that does not end,
takes no more than the job with it.

    python benchmarks/gpu_worker.py '{"folder": "...", "jobs": ["limits", "models minilm-nvfp4.gz"], ...}'

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

from gpu_layers import Row, Sizes, check_layers, measure_layers
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
        what, _, file = job.partition(" ")
        getattr(self, f"_{what}")(file)

    def _limits(self, file: str) -> None:
        limits()

    def _models(self, file: str) -> None:
        entry = self._entry(file)
        check: Callable[..., None] = check_decoder if entry["kind"] == "decoder" else check_encoder
        check(entry, self._folder, self._work, emit, self._settings["small"])

    def _layers(self, file: str) -> None:
        about = self._entry(file), self._folder, self._work, self._sizes, emit
        if self._settings["small"]:
            check_layers(*about)
        else:
            measure_layers(*about, self._left)

    def _llama(self, file: str) -> None:
        sizes = [self._settings[name] for name in ("prompt", "steps", "turns")]
        measure_llama(self._entry(file), self._folder, self._work, *sizes, emit)

    def _entry(self, file: str) -> Row:
        return next(entry for entry in self._entries if entry["file"] == file)

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
