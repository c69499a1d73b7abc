"""Decoding while other programs want the cores, too: what is left of the quiet speed.

    python benchmarks/busy_machine.py [llama-134m] [--schemes nvfp4,ternary] [--peers ort-int4]
        [--threads 1,2] [--spinners 4] [--tokens 64] [--rounds 6] [--work FOLDER]

A round of a model is so many tokens behind a short prompt on the machine as it is, and as many with
`spinners` processes that do nothing but count. Speeds are all tokens by all time, since it is the stalls that
matter: a median would not see them. `p99` is the time that one token in a hundred takes longer than.

`fair` is what a scheduler that treats all threads alike leaves of the processor time that `threads` busy
threads have on a quiet machine, and `got` what the model had of it: a program that waits asleep gets less, as
it asks for less. Linux shares by time, so a memory-bound program may keep more of its speed than of its time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from kernels import names, numbers, recipes
from llama_shapes import SHAPES
from machine import description

from models import PEERS, Worker, prepare  # noqa: TID251 - the program beside this one

PROMPT = 64
COUNTING = "n = 0\nwhile True: n += 1"

Times = list[tuple[float, float]]  # seconds a token: of the wall clock, and on processors


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """So many processes that count, until the block ends."""
    processes = [subprocess.Popen([sys.executable, "-c", COUNTING]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def decode(worker: Worker, tokens: int) -> Times:
    """Of a text of its own."""
    worker.ask("prefill", PROMPT)
    return worker.ask("decode", tokens)


def measure(name: str, path: Path, threads: int, options: argparse.Namespace) -> str:
    """A row of the table."""
    worker = Worker(path, threads, kind="decoder", room=PROMPT + options.tokens)
    quiet: Times = []
    busy: Times = []
    try:
        decode(worker, options.tokens)
        for _ in range(options.rounds):
            quiet += decode(worker, options.tokens)
            with spinning(options.spinners):
                busy += decode(worker, options.tokens)
    finally:
        worker.close()
    (before, own), (after, left) = (np.array(times).sum(axis=0) for times in (quiet, busy))
    cores = len(os.sched_getaffinity(0))
    fair = min(1.0, cores / (threads + options.spinners)) / min(1.0, cores / threads)
    speeds = [f"{len(quiet) / seconds:.1f}" for seconds in (before, after)]
    slowest = [f"{1e3 * np.quantile(np.array(times)[:, 0], 0.99):.1f}" for times in (quiet, busy)]
    shares = f"{before / after:.2f} | {fair:.2f} | {left / after / (own / before):.2f}"
    return f"| {threads} | {name} | {speeds[0]} | {speeds[1]} | {shares} | {' / '.join(slowest)} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of every model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["llama-134m"], help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--schemes", type=names(recipes()), default="nvfp4,ternary")
    parser.add_argument("--peers", type=names(PEERS), default="ort-int4")
    parser.add_argument("--threads", type=numbers, default="1,2")
    parser.add_argument("--spinners", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--work", type=Path, help="of models.py: keeps what is exported and compiled")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.models if name not in SHAPES]:
        parser.error(f"unknown model {', '.join(unknown)}; known: {', '.join(SHAPES)}")
    about = description()
    print(f"{about['processor']}, {about['cores']} cores, {options.spinners} programs beside")
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        for model in options.models:
            files = prepare(model, options.schemes, options.peers, work)
            print(f"\n### {model}\n\n| threads |  | quiet, tokens/s | busy | kept | fair | got | p99, ms |")
            print("|---|---|---|---|---|---|---|---|")
            for threads in options.threads:
                for name, path in files.items():
                    print(measure(name, path, threads, options), flush=True)


if __name__ == "__main__":
    main()
