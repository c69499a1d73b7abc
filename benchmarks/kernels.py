"""Linear layers alone, beside the machine's limits and every peer that is installed, in one run.

    python benchmarks/kernels.py [--shapes 4096x4096,384x1536] [--rows 1,8,512] [--threads 1,2]
        [--schemes nvfp4,nvfp4/int8] [--peers ort-f32,torch-bf16 | --peers none]
        [--ggml INCLUDE LIBRARIES]
        [--passes 10] [--seconds 2] [--repeats 2] [--cache MIB] [--json FILE] [--plot FILE.svg]

A shape is inputs x outputs of a layer. What is timed is a pass over a chain of such layers, each with weights
of its own, through the engine as its users call it: artifacts by `Session.run`, ONNX Runtime with bound
inputs and outputs. The time of a layer is that of the pass by the number of layers, so that of the wall time
nothing is left out and Python is in it once; all that a layer needs (rounding of activations, sums, in a
chain of non-square layers a copy of some columns) is in it. For up to 8 rows the weights of a chain are four
times the last-level cache, so they come from memory; for more rows, which use a weight often, they are as
large as the cache.

Engines and limits take turns, and wait between, so that no thread pool spins into another's turn; awake, as a
core that has slept is slow for some milliseconds. A turn is two passes (one, where that takes long), of which
the second counts; up to 8 rows as much memory again is read between them, so that no weights are left in a
cache. `us` is the median of all passes, `best` their best decile, `cpu` the median of the time on
processors, all threads together, which on a shared machine is the fairest figure of one thread; `repeats` is
by how much the medians of the repeats differ. For up to 8 rows the limit is reading memory (`GB/s` counts
weights and scales), else the fused multiply-adds in float32, all on as many threads, measured in the same
turns: `limit` is the share of it by medians, `best` and `cpu` behind it by those. An engine that multiplies
in bfloat16 or int8 can exceed the second; their own limits are in the last lines of a group. What activations
are rounded to is in column `x` (of OpenVINO what its settings say): only equals compare. `nvfp4/int8` is the
scheme with `--compute int8`, `ternary/small` with `--packing small`, five codes a byte.

Peers that are not installed are named with the reason, and left out. llama.cpp takes part with the folders
of its headers and libraries (`--ggml llama.cpp/ggml/include llama.cpp/build/bin`). `--plot` needs matplotlib.
On a shared machine read `others`, what other processes had of the cores, first.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ggml_engine import TYPES as GGML_TYPES
from ggml_engine import Ggml
from machine import Limit, Neighbours, compute_limits, description, last_level_cache, memory_limit
from matmul_engines import PEERS, AbsentError, Contender, Engine, Problem, QGraph

from qgraph.schemes import COMPUTES, PACKINGS, SCHEMES

FEW = 8  # rows up to which reading the weights is the limit
PAUSE_S = 0.05  # longer than thread pools spin after a run
WARM_S = 0.1  # a pass that takes as long does not need one before it
TIMES = ("median", "best", "cpu_median")  # of a cell
LEAST = 3  # passes of a contender, however long they take


@dataclass(frozen=True)
class Cell:
    """One table row: an engine, or a limit, on one problem."""

    shape: str
    rows: int
    threads: int
    name: str
    activations: str  # empty of limits
    layers: int
    nbytes: int  # of a layer's weights; of a limit, read at once
    operations: int  # of a layer
    repeats: list[list[float]] = field(default_factory=list)  # seconds a layer
    cpu: list[float] = field(default_factory=list)  # of them, on processors: all threads together

    @property
    def median(self) -> float:
        return float(np.median(np.concatenate(self.repeats)))

    @property
    def best(self) -> float:
        return float(np.quantile(np.concatenate(self.repeats), 0.1))

    @property
    def cpu_median(self) -> float:
        return float(np.median(self.cpu))

    @property
    def deviation(self) -> float:
        """By how much the medians of the repeats differ; 0 of one."""
        medians = [float(np.median(times)) for times in self.repeats]
        return max(medians) / min(medians) - 1

    @property
    def amount(self) -> int:
        """Bytes where reading is the limit, else operations."""
        return self.nbytes if self.rows <= FEW else self.operations


def wait_awake(seconds: float) -> None:
    """Returns so much later, and keeps the core busy until then."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def time_turns(
    runs: Sequence[Callable[[], object]], passes: int, seconds: float, evict: Callable[[], object]
) -> list[list[tuple[float, float]]]:
    """(wall, processor) seconds of passes of each, in turns: `passes`, or as many as fit into so many seconds
    each, at least LEAST. `evict` comes right before each."""
    times: list[list[tuple[float, float]]] = [[] for _ in runs]
    for turn in range(max(passes, LEAST)):
        for run, own in zip(runs, times, strict=True):
            if turn >= LEAST and sum(wall for wall, _ in own) > seconds:
                continue
            wait_awake(PAUSE_S)
            if not own or own[-1][0] < WARM_S:
                run()
            evict()
            start, cpu = time.perf_counter(), time.process_time()
            run()
            own.append((time.perf_counter() - start, time.process_time() - cpu))
    return times


def opened(engines: Sequence[tuple[str, Engine]], problem: Problem) -> Iterator[Contender]:
    """The engines that can; the others are printed with the reason."""
    for name, engine in engines:
        try:
            yield engine(problem)
        except AbsentError as reason:
            print(f"without {name}: {reason}", flush=True)


def measure_group(
    contenders: Sequence[Contender],
    limits: Sequence[Limit],
    problem: Problem,
    rows: Sequence[int],
    options: argparse.Namespace,
    evict: Callable[[], object],
) -> list[Cell]:
    """All numbers of rows on the same chains; a repeat goes over all of them before the next begins."""
    K, N = problem.K, problem.N
    cells: dict[int, list[Cell]] = {}
    for count in rows:
        common = (f"{K}x{N}", count, problem.threads)
        cells[count] = [
            Cell(*common, c.name, c.activations, c.layers, c.nbytes, 2 * count * K * N) for c in contenders
        ] + [Cell(*common, limit.name, "", 1, limit.amount, limit.amount) for limit in limits]
    rng = np.random.default_rng(0)
    inputs = {count: rng.standard_normal((count, K), dtype=np.float32) for count in rows}
    for _ in range(options.repeats):
        for count in rows:
            runs = [c.bind(inputs[count]) for c in contenders] + [limit.run for limit in limits]
            for run in runs:
                run()  # touches what is mapped, and wakes threads
            found = time_turns(runs, options.passes, options.seconds, evict)
            for cell, times in zip(cells[count], found, strict=True):
                cell.repeats.append([wall / cell.layers for wall, _ in times])
                cell.cpu.extend(cpu / cell.layers for _, cpu in times)
    return [cell for count in rows for cell in cells[count]]


def measure_shape(
    shape: tuple[int, int], engines: Sequence[tuple[str, Engine]], options: argparse.Namespace
) -> list[Cell]:
    """A shape on every number of threads, first the rows that read, then those that compute."""
    cells = []
    for threads in options.threads:
        for few in (True, False):
            rows = [count for count in options.rows if (count <= FEW) == few]
            if not rows:
                continue
            problem = Problem(*shape, threads, (4 if few else 1) * options.cache)
            limits = [memory_limit(threads, 4 * options.cache)] if few else compute_limits(threads)
            evict = memory_limit(threads, 4 * options.cache).run if few else lambda: None
            cells += measure_group(list(opened(engines, problem)), limits, problem, rows, options, evict)
    return cells


def print_tables(cells: Sequence[Cell]) -> None:
    """A shape: what each has, and what it is to each scheme of ours."""
    columns = ("rows", "threads", "", "x", "us", "best", "cpu", "GB/s", "GFLOP/s")
    columns += ("limit", "best", "cpu", "repeats")
    print(f"\n### {cells[0].shape}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for group in grouped(cells):
        limit = next(cell for cell in group if not cell.activations)
        for cell in group:
            share = [f"{of(cell, limit, time):.2f}" if cell.activations else "" for time in TIMES]
            times = [f"{1e6 * getattr(cell, time):.1f}" if cell.activations else "" for time in TIMES]
            figures = [*times, *rates(cell), *share, f"{cell.deviation:.0%}"]
            about = [cell.rows, cell.threads, cell.name, cell.activations]
            print(f"| {' | '.join(map(str, [*about, *figures]))} |")
    print_ratios(cells)


def rates(cell: Cell) -> list[str]:
    """Thousand million bytes and operations a second; of a limit what it is the limit of."""
    reads = cell.activations or cell.rows <= FEW
    computes = cell.activations or cell.rows > FEW
    amounts = ((cell.nbytes, reads), (cell.operations, computes))
    return [f"{amount / cell.median / 1e9:.1f}" if shown else "" for amount, shown in amounts]


def of(cell: Cell, limit: Cell, time: str) -> float:
    """How much of the limit a cell reaches, by one of TIMES."""
    return (cell.amount / getattr(cell, time)) / (limit.amount / getattr(limit, time))


def print_ratios(cells: Sequence[Cell]) -> None:
    """How many times as fast as each peer ours are: one thread by processor time, else by the wall's."""
    peers = list(dict.fromkeys(c.name for c in cells if c.activations and not is_ours(c)))
    if not peers or not any(is_ours(cell) for cell in cells):
        return
    columns = ("rows", "threads", "times as fast as", *peers)
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for group in grouped(cells):
        medians = {c.name: c.cpu_median if c.threads == 1 else c.median for c in group}
        for cell in filter(is_ours, group):
            ratios = [f"{medians[p] / medians[cell.name]:.2f}" if p in medians else "" for p in peers]
            print(f"| {cell.rows} | {cell.threads} | {cell.name} | {' | '.join(ratios)} |")


def is_ours(cell: Cell) -> bool:
    return cell.name.startswith("qgraph ")


def grouped(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that took turns, ordered by rows and threads."""
    groups: dict[tuple[int, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.rows, cell.threads), []).append(cell)
    return [groups[key] for key in sorted(groups)]


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Operations a second over rows, a panel for each shape and number of threads."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels: dict[tuple[str, int], dict[str, list[Cell]]] = {}
    for cell in cells:
        panels.setdefault((cell.shape, cell.threads), {}).setdefault(cell.name, []).append(cell)
    shapes, threads = (list(dict.fromkeys(key[i] for key in panels)) for i in (0, 1))
    size = (5.5 * len(threads), 3.8 * len(shapes))
    figure, axes = pyplot.subplots(len(shapes), len(threads), figsize=size, squeeze=False)
    for (shape, count), lines in panels.items():
        panel = axes[shapes.index(shape)][threads.index(count)]
        for name, line in lines.items():
            if name == "DRAM read":
                continue
            style = "-" if is_ours(line[0]) else "--" if line[0].activations else ":"
            rows = [cell.rows for cell in line]
            panel.plot(rows, [c.operations / c.median / 1e9 for c in line], style, marker=".", label=name)
        panel.set(xscale="log", yscale="log", xlabel="rows", ylabel="GFLOP/s")
        panel.set_title(f"{shape}, {count} thread{'s' * (count > 1)}")
    axes[0][0].legend(fontsize="xx-small")
    figure.tight_layout()
    figure.savefig(path)
    print(f"\nwrote {path}")


def document(
    cells: Sequence[Cell], options: argparse.Namespace, shares: Mapping[str, float]
) -> dict[str, Any]:
    """What `--json` writes: enough to compute every table again."""
    plain = {
        name: [str(v) for v in value] if isinstance(value, list | tuple) else str(value)
        for name, value in vars(options).items()
    }
    return {
        "machine": description(),
        "neighbours": dict(shares),
        "options": plain,
        "cells": [*map(asdict, cells)],
    }


def numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text}: numbers above 0, please")
    return found


def shapes(text: str) -> list[tuple[int, int]]:
    found = []
    for part in text.split(","):
        K, N = map(int, part.split("x"))
        if not 1 <= K <= N:
            raise argparse.ArgumentTypeError(f"{part}: a chain needs at least as many outputs as inputs")
        found.append((K, N))
    return found


def recipes() -> list[str]:
    """Schemes, and schemes with a `/` and what products of many rows round activations to, or how ternary
    weights are held."""
    schemes = [name for name, scheme in SCHEMES.items() if scheme.solvers and not scheme.activation_format]
    pairs = [(scheme, compute) for scheme in schemes for compute in COMPUTES[1:]]
    computed = ["/".join(pair) for pair in pairs if pair[0] == "nvfp4" or pair[1] != "bf16"]
    return [*SCHEMES, *computed, *(f"ternary/{packing}" for packing in PACKINGS[1:])]


def names(known: Collection[str]) -> Callable[[str], list[str]]:
    """Names of a table, comma-separated, or `none`."""

    def parse(text: str) -> list[str]:
        found = [] if text == "none" and "none" not in known else text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known: {', '.join(known)}")
        return found

    return parse


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    schemes = "nvfp4,nvfp4-w4a8,ternary,int4,int8,none"
    parser.add_argument("--shapes", type=shapes, default="4096x4096,4096x14336,2048x2048,384x1536")
    parser.add_argument("--rows", type=numbers, default="1,8,32,128,512")
    parser.add_argument("--threads", type=numbers, default="1,2")
    parser.add_argument("--schemes", type=names(recipes()), default=schemes)
    parser.add_argument("--peers", type=names(PEERS), default=",".join(PEERS))
    parser.add_argument(
        "--ggml",
        type=Path,
        nargs=2,
        metavar=("INCLUDE", "LIBRARIES"),
        help="llama.cpp's headers and libraries",
    )
    parser.add_argument("--passes", type=int, default=10, help="of each, in a repeat (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=2, help="of each in a repeat, at most, but for 3 passes (default: 2)"
    )
    parser.add_argument("--repeats", type=int, default=2, help="of the whole (default: %(default)s)")
    parser.add_argument(
        "--cache", type=float, help="MiB of the last-level cache (default: as the system says)"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--work", type=Path, help="keeps what is compiled, and takes it from there")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables of every shape."""
    options = arguments().parse_args(argv)
    options.cache = round(options.cache * 2**20) if options.cache else last_level_cache()
    about = description()
    print(f"{about['processor']}, {about['cores']} cores, last-level cache {options.cache / 2**20:g} MiB")
    cells: list[Cell] = []
    start, neighbours = time.perf_counter(), Neighbours()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        engines: list[tuple[str, Engine]] = [(scheme, QGraph(scheme, work)) for scheme in options.schemes]
        engines += [(name, PEERS[name]()) for name in options.peers]
        if options.ggml:
            engines += [(f"llama.cpp {kind}", Ggml(kind, *options.ggml)) for kind in GGML_TYPES]
        else:
            print("without llama.cpp: give --ggml")
        for shape in options.shapes:
            found = measure_shape(shape, engines, options)
            print_tables(found)
            cells += found
    shares = neighbours.shares(time.perf_counter() - start)
    print("\nOf the cores' time meanwhile: " + ", ".join(f"{name} {v:.0%}" for name, v in shares.items()))
    if options.json:
        options.json.write_text(
            json.dumps(document(cells, options, shares), indent=1) + "\n", encoding="utf-8"
        )
        print(f"wrote {options.json}")
    if options.plot:
        plot(cells, options.plot)


if __name__ == "__main__":
    main()
