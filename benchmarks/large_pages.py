"""One row through layers whose weights are in the page cache by large pages, and by small ones.

    python benchmarks/large_pages.py [--schemes ternary-w2a8,nvfp4-w4a8] [--shape 4096x4096] [--threads 1,2]
        [--cache MIB] [--passes 9]

A chain of layers is written twice, in pieces of 2 MiB, as qgraph writes artifacts, and of 4 KiB, and both
files are mapped as the runtime maps them. They take turns; `us` is the median of a layer, `large` how much of
the mapping the system has in large pages. Where that is 0 for both, kernel or file system have none for
files. `--cache`: the chain is four times as large.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from kernels import names, numbers, recipes, wait_awake
from machine import description, last_level_cache
from matmul_chain import X
from matmul_engines import Problem, QGraph

import qgraph

PIECES = {"2 MiB": 2 << 20, "4 KiB": 4 << 10}


def copied(source: Path, piece: int) -> Path:
    """The file, written in pieces of so many bytes."""
    to = source.with_name(f"{source.stem}.{piece}.qg")
    with source.open("rb") as data, to.open("wb", buffering=0) as file:
        while part := data.read(piece):
            file.write(part)
    return to


def in_large_pages(path: Path) -> float:
    """Share of the mapping of the file."""
    found = {"Rss": 0, "FilePmdMapped": 0}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            inside = line.endswith(str(path))
        elif inside and key[:-1] in found:
            found[key[:-1]] += int(values[0])
    return found["FilePmdMapped"] / max(1, found["Rss"])


def measure(scheme: str, problem: Problem, passes: int, work: Path) -> None:
    """Print a row for each size of pieces."""
    source, layers, _ = QGraph(scheme, work).artifact(problem)
    paths = {name: copied(source, piece) for name, piece in PIECES.items()}
    sessions = {name: qgraph.load(path, threads=problem.threads).session() for name, path in paths.items()}
    x = np.random.default_rng(0).standard_normal((1, problem.K)).astype(np.float32)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(passes + 1):
        for name, session in sessions.items():
            wait_awake(0.05)
            start = time.perf_counter()
            session.run({X: x})
            if turn:  # the first warms up
                times[name].append((time.perf_counter() - start) / layers)
    for name, found in times.items():
        large = in_large_pages(paths[name])
        print(
            f"| {scheme} | {problem.threads} | {name} | {1e6 * np.median(found):.1f} | {large:.2f} |",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schemes", type=names(recipes()), default="ternary-w2a8,nvfp4-w4a8")
    parser.add_argument("--shape", default="4096x4096", help="inputs x outputs (default: %(default)s)")
    parser.add_argument("--threads", type=numbers, default="1,2")
    parser.add_argument("--cache", type=float, help="MiB; default: what the system says")
    parser.add_argument("--passes", type=int, default=9)
    options = parser.parse_args(argv)
    K, N = map(int, options.shape.split("x"))
    cold = 4 * (last_level_cache() if options.cache is None else int(options.cache * (1 << 20)))
    print(description()["processor"])
    print("| scheme | threads | written in | us | large |\n|---|---|---|---|---|")
    for scheme in options.schemes:
        with tempfile.TemporaryDirectory() as work:
            for threads in options.threads:
                measure(scheme, Problem(K, N, threads, cold), options.passes, Path(work))


if __name__ == "__main__":
    main()
