"""Kernels and whole models on an NVIDIA GPU, beside its limits and every peer that is installed, in one run.

    python benchmarks/gpu_prepare.py FOLDER      where qgraph is installed in full
    python benchmarks/gpu.py FOLDER              where the GPU is
        [--json FILE] [--only limits,models,layers,llama] [--match TEXT] [--rows 1,8,512] [--cold MB]
        [--passes 8] [--turns 20] [--repeats 2] [--prompt 512] [--steps 32] [--seconds 520] [--work FOLDER]
        [--sanitize]

The second needs numpy, ml_dtypes and a C++ compiler, neither ONNX nor TVM, and this repository on PYTHONPATH.
torch brings the limits and the peers; what is missing is named, and left out.

* limits: copies on the device (bytes read and written), cuBLAS in bfloat16 on square matrices of 8192.
* models: CPU code and CUDA code of one artifact on the same inputs, outputs full of NaN before; relative
  Frobenius error of the logits for prompts and steps behind them, and what each writes by itself.
* layers: 1 to 2048 rows through so many layers that no cache holds their weights (`--cold`), `--passes` times
  over in one CUDA graph; outputs also against float64 products with the weights as runtime/FORMAT.md defines
  them. Peers take turns with qgraph: cuBLAS bf16 and tinygemm int4 (up to 64 rows) of torch, Humming if
  installed. They read and write bfloat16 activations, qgraph float32. `share`: up to 8 rows of the copy
  bandwidth, by the bytes of weights; above of cuBLAS on the same shape and rows, in the same turns.
* llama: layers of 7B shape with random weights: a prompt, and token by token behind it with logits read by
  nobody, beside a Llama written in torch (bfloat16, static cache, one CUDA graph for a prompt or step). Then
  where the time of a step goes, by kernel.

All times are the wall's, from the call to the result. `us` is the median, `best` the best decile, `repeats`
by how much the medians of the repeats differ. Jobs run in a process of their own: one that fails, or takes
too long, is named, and the rest goes on. The status is 1 if a job failed, or an error was above its limit; a
target of speed that was missed is only printed.

`--sanitize` compares only, with little data: for
`compute-sanitizer --target-processes all --error-exitcode 9 python benchmarks/gpu.py FOLDER --sanitize`.
"""

from __future__ import annotations

import argparse
import json
import platform
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_worker import MARK, Row

JOB_SECONDS = 90.0  # that a job may take
PARTS = ("limits", "models", "layers", "llama")
FEW = 8  # rows up to which reading weights is the limit
FIRST = "4096x14336"  # the shape that targets are set for
LAYER_ERROR = 5e-3  # to exact products
MODEL_ERROR = 2e-2  # between the devices

# Targets of speed: (scheme, shape, rows) -> share of the copy bandwidth at least, microseconds at most.
READING = {("nvfp4", FIRST, 1): (0.65, 11.8), ("ternary", FIRST, 1): (None, 7.0)}
COMPUTING = {512: 0.6, 2048: 0.6}  # rows -> share of cuBLAS at least, of schemes with 4-bit weights:
FOUR_BITS = ("nvfp4", "int4")
LLAMA_RATIO = 2.5  # steps, to torch bf16


def jobs_of(entries: Sequence[Row], parts: Sequence[str]) -> list[str]:
    """What there is to do, what targets are set for first."""
    first = [e for e in entries if _shape(e) == FIRST]
    others = [e for e in entries if e["kind"] == "layer" and e not in first]
    models = [e for e in entries if e["kind"] in ("decoder", "encoder")]
    llamas = [e for e in entries if e["kind"] == "llama"]
    order = (("models", models), ("layers", first), ("llama", llamas), ("layers", others))
    jobs = ["limits", *(f"{part} {entry['file']}" for part, group in order for entry in group)]
    return [job for job in jobs if job.split()[0] in parts]


def _shape(entry: Row) -> str:
    return f"{entry['K']}x{entry['N']}" if entry["kind"] == "layer" else ""


class Supervisor:
    """Runs jobs in a worker, and in another one after a failure."""

    def __init__(self, settings: dict[str, Any], end: float) -> None:
        self._settings, self._end, self._start = settings, end, time.monotonic()
        self.rows: list[Row] = []

    def run(self, jobs: list[str]) -> None:
        while jobs:
            if (left := self._end - time.monotonic()) < 5:
                self._add({"kind": "failure", "job": ", ".join(jobs), "text": "no time left"})
                return
            ended = self._work(jobs, left)
            jobs = jobs[ended:]

    def _work(self, jobs: list[str], left: float) -> int:
        """How many of the jobs are over, one at least."""
        settings = {**self._settings, "jobs": jobs, "seconds": left}
        command = [sys.executable, str(Path(__file__).with_name("gpu_worker.py")), json.dumps(settings)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()

        def listen(stream: Any = process.stdout) -> None:
            for line in stream:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=listen, daemon=True).start()
        over, limit, job, failed = 0, time.monotonic() + JOB_SECONDS, jobs[0], False
        try:
            while True:
                wait = min(limit, self._end) - time.monotonic()
                try:
                    line = lines.get(timeout=max(wait, 0.01))
                except queue.Empty:
                    self._add({"kind": "failure", "job": job, "text": "took too long, and was ended"})
                    return over + 1
                if line is None:
                    break
                if not line.startswith(MARK):
                    print(line, end="", flush=True)
                    continue
                row = json.loads(line[1:])
                self._add(row)
                if row["kind"] == "job":
                    job, limit = row["job"], time.monotonic() + JOB_SECONDS
                over += row["kind"] in ("done", "failure")
                failed |= row["kind"] == "failure"
            status = process.wait()
            if status and not failed:
                self._add({"kind": "failure", "job": job, "text": f"the process ended with {status}"})
                over += 1
            return max(over, 1)
        finally:
            process.kill()
            process.wait()

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        print(f"[{time.monotonic() - self._start:5.1f} s] {line_of(row)}", flush=True)


def line_of(row: Row) -> str:
    """A result as a line of progress."""
    kind = row["kind"]
    if kind == "job":
        return f"--- {row['job']}"
    if kind == "failure":
        return f"FAILED {row['job']}: {row['text']}"
    if kind == "error":
        return f"{row['name']}, {row.get('shape', '')} {row['case']}: error {row['error']:.1e}"
    if kind == "time":
        return f"{row['shape']}, {row['rows']} rows, {row['name']}: {1e6 * row['median']:.2f} us"
    if kind == "llama":
        return f"{row['name']}: {row['what']} {1e3 * row['median']:.3f} ms"
    return row.get("text") or json.dumps({k: v for k, v in row.items() if k != "kind"})


def print_tables(rows: Sequence[Row]) -> bool:
    """All of it; whether the errors are below their limits."""
    found = {row["name"]: row["value"] for row in _of(rows, "limit")}
    if found:
        print(f"\ncopy {found['copy'] / 1e12:.2f} TB/s, cuBLAS bf16 {found['gemm'] / 1e12:.0f} TFLOP/s")
    right = print_errors(rows)
    print_layers(rows, found)
    print_llama(rows, found)
    print_profiles(rows)
    for row in _of(rows, "failure"):
        print(f"FAILED {row['job']}: {row['text']}")
    return right


def _of(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def _table(title: str, columns: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    if lines:
        print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for line in lines:
            print(f"| {' | '.join('' if cell is None else str(cell) for cell in line)} |")


def print_errors(rows: Sequence[Row]) -> bool:
    """The largest error of each, and its limit."""
    groups: dict[str, list[Row]] = {}
    for row in _of(rows, "error"):
        groups.setdefault(" ".join(filter(None, (row["name"], row.get("shape")))), []).append(row)
    greedy = {row["name"]: row for row in _of(rows, "greedy")}
    lines, right = [], True
    for name, each in groups.items():
        worst = max(each, key=lambda row: float(row["error"]))
        limit = LAYER_ERROR if "shape" in worst else MODEL_ERROR
        good = worst["error"] <= limit
        right &= good
        said = _said(greedy[name]) if name in greedy else None
        lines.append((name, len(each), f"{worst['error']:.1e}", worst["case"], limit, _met(good), said))
    columns = ("", "cases", "largest error", "of", "limit", "met", "greedy tokens")
    _table("Right or not", columns, lines)
    return right


def _said(row: Row) -> str:
    if row["equal"] == row["of"]:
        return f"{row['of']} equal"
    lead, off = row["lead"], row["largest_difference"]
    return f"{row['equal']} equal, then the CPU's led by {lead:.2g}, logits differ by up to {off:.2g}"


def _met(good: bool) -> str:
    return "yes" if good else "NO"


def print_layers(rows: Sequence[Row], limits: dict[str, float]) -> None:
    """A table a shape: every number of rows, with what took turns."""
    shapes: dict[str, list[Row]] = {}
    for row in _of(rows, "time"):
        shapes.setdefault(row["shape"], []).append(row)
    columns = ("rows", "", "us", "best", "TB/s", "TFLOP/s", "share", "repeats", "target", "met")
    for shape, each in shapes.items():
        lines = []
        for row in sorted(each, key=lambda row: (row["rows"], row["beside"], row["name"] != row["beside"])):
            share = _share(row, each, limits)
            target, met = _target(row, share)
            few = row["rows"] <= FEW
            lines.append(
                (
                    row["rows"],
                    row["name"],
                    f"{1e6 * row['median']:.2f}",
                    f"{1e6 * row['best']:.2f}",
                    f"{row['nbytes'] / row['median'] / 1e12:.2f}" if few else None,
                    f"{row['operations'] / row['median'] / 1e12:.0f}" if not few else None,
                    None if share is None else f"{share:.2f}",
                    f"{max(row['repeats']) / min(row['repeats']) - 1:.0%}",
                    target,
                    met,
                )
            )
        _table(f"Layers, {shape}", columns, lines)


def _share(row: Row, others: Sequence[Row], limits: dict[str, float]) -> float | None:
    """Of the copy bandwidth, or of cuBLAS in the same turns; None where that was not measured."""
    if row["rows"] <= FEW:
        return row["nbytes"] / row["median"] / limits["copy"] if "copy" in limits else None
    same = ("shape", "rows", "beside")
    for other in others:
        if other["name"] == "torch bf16" and all(other[key] == row[key] for key in same):
            return float(other["median"] / row["median"])
    return None


def _target(row: Row, share: float | None) -> tuple[str | None, str | None]:
    if row["name"] != row["beside"]:
        return None, None
    key = (row["scheme"], row["shape"], row["rows"])
    if key in READING:
        least, most = READING[key]
        us = 1e6 * row["median"]
        said = f"{most} us" + (f" or share {least}" if least else "")
        return said, _met(us <= most or bool(least and share is not None and share >= least))
    if row["rows"] in COMPUTING and row["scheme"] in FOUR_BITS:
        least = COMPUTING[row["rows"]]
        return f"share {least}", "?" if share is None else _met(share >= least)
    return None, None


def print_llama(rows: Sequence[Row], limits: dict[str, float]) -> None:
    """Prompts and steps; the last column is how many times as fast as torch."""
    every, lines = _of(rows, "llama"), []
    for row in every:
        torch = [o for o in every if o["name"] == "torch bf16" and o["beside"] == row["beside"]]
        beside = next((o["median"] for o in torch if o["what"] == row["what"]), None)
        ratio = beside / row["median"] if beside and row["name"] == row["beside"] else None
        share = row["read"] / row["median"] / limits["copy"] if row["read"] and "copy" in limits else None
        step = row["what"] == "step"
        lines.append(
            (
                row["name"],
                row["layers"],
                "a token" if step else f"{row['tokens']} tokens",
                f"{1e3 * row['median']:.3f}",
                f"{1e3 * row['best']:.3f}",
                f"{row['tokens'] / row['median']:.0f}",
                f"{share:.2f}" if step and share is not None else None,
                f"{ratio:.2f}" if ratio else None,
                f"{LLAMA_RATIO} times" if step and row["name"] == row["beside"] else None,
                _met(ratio >= LLAMA_RATIO) if step and ratio else None,
            )
        )
    columns = (
        "",
        "layers",
        "reads",
        "ms",
        "best",
        "tokens/s",
        "share of copy",
        "times torch",
        "target",
        "met",
    )
    _table("Layers of a Llama of 7B shape, with embedding and head", columns, lines)


def print_profiles(rows: Sequence[Row]) -> None:
    profiles: dict[str, list[Row]] = {}
    for row in _of(rows, "profile"):
        profiles.setdefault(row["name"], []).append(row)
    for name, each in profiles.items():
        whole = sum(row["ns"] for row in each)
        lines = [
            (row["kernel"], row["steps"], f"{row['ns'] / 1e3:.1f}", f"{row['ns'] / whole:.0%}")
            for row in sorted(each, key=lambda row: -row["ns"])
        ]
        _table(f"A step of {name}, {whole / 1e3:.0f} us", ("kernel", "steps", "us", "share"), lines)


def document(rows: Sequence[Row], options: argparse.Namespace) -> dict[str, Any]:
    """What `--json` writes."""
    given = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    return {
        "machine": platform.platform(),
        "python": platform.python_version(),
        "options": given,
        "rows": list(rows),
    }


def arguments() -> argparse.ArgumentParser:
    summary, _, about = (__doc__ or "").partition("\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=about, formatter_class=form)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", type=_parts, default=list(PARTS))
    parser.add_argument("--match", default="", help="only files whose names have this in them")
    parser.add_argument("--rows", type=_numbers, default=[1, 2, 4, 8, 16, 64, 512, 2048])
    parser.add_argument(
        "--cold", type=float, default=480, help="million bytes of weights in a pass, at least"
    )
    parser.add_argument("--passes", type=int, default=8, help="over all layers, in one run")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512, help="tokens that the Llama reads first")
    parser.add_argument("--steps", type=int, default=32, help="that it takes behind them, in a turn")
    parser.add_argument("--seconds", type=float, default=520, help="for all of it")
    parser.add_argument("--work", type=Path, help="a folder with room for a gigabyte (default: temporary)")
    parser.add_argument("--sanitize", action="store_true")
    return parser


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"unknown {unknown[0]}; known: {', '.join(PARTS)}")
    return parts


def settings_of(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    checked = [1, 2, 8, 16, 64] if not options.sanitize else [1, 4, 16]
    yield "folder", str(options.folder)
    yield "work", str(options.work) if options.work else None
    yield "small", options.sanitize
    yield "prompt", options.prompt
    yield "steps", options.steps
    yield "turns", max(2, options.turns // 4)
    yield (
        "sizes",
        {
            "rows": options.rows,
            "checked_rows": checked,
            "cold": round(options.cold * 1e6),
            "turns": options.turns,
            "repeats": options.repeats,
            "passes": options.passes,
        },
    )


def main(given: list[str] | None = None) -> int:
    options = arguments().parse_args(given)
    end = time.monotonic() + options.seconds
    entries = [
        entry
        for entry in json.loads((options.folder / "manifest.json").read_text())
        if options.match in entry["file"]
    ]
    parts = [part for part in options.only if not options.sanitize or part in ("models", "layers")]
    supervisor = Supervisor({**dict(settings_of(options)), "entries": entries}, end)
    try:
        supervisor.run(jobs_of(entries, parts))
    finally:
        right = print_tables(supervisor.rows)
        if options.json:
            options.json.write_text(json.dumps(document(supervisor.rows, options)) + "\n")
    return 0 if right and not _of(supervisor.rows, "failure") else 1


if __name__ == "__main__":
    sys.exit(main())
