"""Whole models beside ONNX Runtime and llama.cpp: speed, memory, and the time to the first result.

    python benchmarks/models.py [minilm llama-134m llama-1b] [--schemes nvfp4,nvfp4/int8] [--peers ort-f32]
        [--in-ort] [--threads 1,2] [--prefill 512] [--decode 64] [--rounds 5] [--repeats 2]
        [--minilm FILE.onnx] [--llama-bench PATH --gguf FILE [FILE ...]] [--work FOLDER] [--json FILE]

minilm is the encoder, at batch 1 x 16 tokens and 32 x 128. The Llamas have random weights (134 M and 1.1 B):
only their shape counts. They read a prompt, and then so many tokens behind it, one by one. All embeddings and
heads are in the scheme, too. `ort-f32` is the exported model, `ort-int4` what ONNX Runtime's own
MatMulNBitsQuantizer makes of it (blocks of 32, activations rounded to int8); ONNX Runtime computes the logits
of all positions of a prompt, as the exported file says, an artifact those of the last. With `--in-ort` there
are ours as files that ONNX Runtime runs with our kernels, every other operator being its own.

Every model is in a process of its own, which loads it, runs it once and then waits; these take turns, a round
each. Of runs shorter than 0.1 s a round is the second of two, as cores are slow behind a wait. Figures are
medians of all rounds, behind them best deciles, and the medians of the time on processors, all threads
together, which on a shared machine is the fairest figure of one thread; `repeats` is by how much the medians
of the repeats differ. `load` and `first` are seconds from the call that opens the file, read before, to the
model, and to its first result (a run of 1 x 16, a token); imports are not in them. `memory` is by how much
the process's peak (VmHWM) grew from before the load to the end, mapped files included, and of a decoder `of
file` that by the file and its cache.

llama.cpp is run by its llama-bench on the GGUF files given, a repeat each: between the others' turns, not
beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from kernels import PAUSE_S, names, numbers, recipes
from llama_shapes import SHAPES, LlamaShape, export
from machine import Neighbours, description
from matmul_engines import recipe_options

import qgraph
from qgraph.schemes import SCHEMES

ENCODER_RUNS = ((1, 16), (32, 128))
PEERS = {"ort-f32": "ONNX Runtime float32", "ort-int4": "ONNX Runtime int4, int8 x"}
MODELS = ("minilm", *SHAPES)
WORKER = Path(__file__).with_name("model_worker.py")


@dataclass
class Measured:
    """A model file: what its process said. `repeats` holds, by task, the seconds of every repeat, `cpu` those
    that all its threads had on processors."""

    name: str
    threads: int
    nbytes: int  # of the file, external data included
    cache: int = 0  # bytes of keys and values
    load: float = float("nan")
    first: float = float("nan")
    memory: int = 0
    repeats: dict[str, list[list[float]]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)

    def all(self, task: str) -> np.ndarray:
        return np.concatenate(self.repeats[task])

    def deviation(self, task: str) -> float:
        medians = [float(np.median(times)) for times in self.repeats[task]]
        return max(medians) / min(medians) - 1


class Worker:
    """A process with a model in it (benchmarks/model_worker.py)."""

    def __init__(self, path: Path, threads: int, **settings: Any) -> None:
        command = [
            sys.executable,
            str(WORKER),
            json.dumps({"path": str(path), "threads": threads, **settings}),
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.start = self._answer()
        except RuntimeError:
            self.close()
            raise

    def ask(self, *order: object) -> Any:
        assert self._process.stdin
        self._process.stdin.write(" ".join(map(str, order)) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of a model ended with {self._process.wait()}: see above")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def prepare(
    name: str,
    schemes: Sequence[str],
    peers: Sequence[str],
    work: Path,
    minilm: Path | None = None,
    in_ort: bool = False,
) -> dict[str, Path]:
    """The files of a model, by the contender's name; those in `work` already are taken as they are. `in_ort`
    is for those that run inside ONNX Runtime, too."""
    source = minilm if name == "minilm" and minilm else work / name / f"{name}.onnx"
    (work / name).mkdir(parents=True, exist_ok=True)
    if not source.is_file():
        say(f"exporting {name}")
        if name == "minilm":
            from qgraph.models import get_model

            get_model(name).export(source)
        else:
            export(SHAPES[name], source)
    found = {}
    for scheme in schemes:
        stem = work / name / scheme.replace("/", "-")
        of, how = recipe_options(scheme)
        contenders = {f"qgraph {scheme}": stem.with_suffix(".qg")}
        if in_ort:
            contenders[f"qgraph {scheme} in ONNX Runtime"] = stem.with_suffix(".ort.onnx")
        if not all(path.is_file() for path in contenders.values()):
            say(f"compiling {name} to {scheme}")
            made = {"solver": "rtn", "embeddings": "nvfp4"} if SCHEMES[of].solvers else {}
            made |= {"verify": False, "onnx": False, **how}
            made |= {"export": ("ort",)} if in_ort else {}
            qgraph.compile(source, scheme=of, output=stem, **made)
        found |= contenders
    for peer in peers:
        found[PEERS[peer]] = source if peer == "ort-f32" else ort_int4(source, work / name / "ort-int4.onnx")
    return found


def ort_int4(source: Path, path: Path) -> Path:
    """What ONNX Runtime's quantizer makes of a float model, as its users call it for the CPU."""
    if path.is_file():
        return path
    import logging

    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)

    say(f"quantizing {source.stem} by ONNX Runtime")
    quantizer = MatMulNBitsQuantizer(str(source), bits=4, block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=True)
    return path


def file_bytes(path: Path) -> int:
    """Of a model, and of the data that lie beside an ONNX file."""
    return sum(f.stat().st_size for f in (path, path.with_name(f"{path.name}.data")) if f.is_file())


def measure(
    name: str, threads: int, files: Mapping[str, Path], options: argparse.Namespace
) -> list[Measured]:
    """All files of a model on so many threads, in turns."""
    shape = SHAPES.get(name)
    found, workers = [], []
    try:
        for label, path in files.items():
            cache = shape.kv_bytes(options.prefill + options.decode) if shape else 0
            measured = Measured(label, threads, file_bytes(path), cache)
            warm(path)
            kind = (
                {"kind": "decoder", "room": options.prefill + options.decode}
                if shape
                else {"kind": "encoder"}
            )
            workers.append(Worker(path, threads, **kind))
            measured.load, measured.first = workers[-1].start["load"], workers[-1].start["first"]
            found.append(measured)
        for _ in range(options.repeats):
            take_turns(found, workers, tasks(shape, options), options.rounds)
        for measured, worker in zip(found, workers, strict=True):
            memory = worker.ask("memory")
            measured.memory = memory["peak"] - memory["before"]
    finally:
        for worker in workers:
            worker.close()
    return found


def warm(path: Path) -> None:
    """Reads a file, so that it is in the system's cache."""
    for part in (path, path.with_name(f"{path.name}.data")):
        if part.is_file():
            with part.open("rb") as file:
                while file.read(1 << 24):
                    pass


def tasks(shape: LlamaShape | None, options: argparse.Namespace) -> dict[str, tuple[object, ...]]:
    """What is timed, in order, and the order that a worker gets."""
    if shape is None:
        return {f"{batch} x {length}": ("run", batch, length) for batch, length in ENCODER_RUNS}
    return {
        f"prefill {options.prefill}": ("prefill", options.prefill),
        f"decode {options.decode}": ("decode", options.decode),
    }


def take_turns(
    found: Sequence[Measured],
    workers: Sequence[Worker],
    orders: Mapping[str, tuple[object, ...]],
    rounds: int,
) -> None:
    """One repeat: a first round that is not counted, then `rounds`."""
    times = [{task: [] for task in orders} for _ in found]
    for turn in range(rounds + 1):
        for own, worker in zip(times, workers, strict=True):
            for task, order in orders.items():
                time.sleep(PAUSE_S)  # else threads of the one before still spin
                answered = worker.ask(*order)
                if turn:
                    own[task] += answered
    for measured, own in zip(found, times, strict=True):
        for task, values in own.items():
            measured.repeats.setdefault(task, []).append([wall for wall, _ in values])
            measured.cpu.setdefault(task, []).extend(cpu for _, cpu in values)


def llama_bench(options: argparse.Namespace, threads: int) -> Iterator[Measured]:
    """llama.cpp on every GGUF file."""
    for path in options.gguf:
        measured = Measured(f"llama.cpp {path.stem}", threads, path.stat().st_size)
        for _ in range(options.repeats):
            lengths = ("-p", str(options.prefill), "-n", str(options.decode))
            command = [str(options.llama_bench), "-m", str(path), "-t", str(threads), *lengths]
            command += ["-r", str(options.rounds), "-o", "json"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            for entry in json.loads(done.stdout):
                tokens = entry["n_prompt"] or entry["n_gen"]
                # It gives one time for all tokens of a round; ours is a time for each that is decoded.
                task, each = (f"prefill {tokens}", 1) if entry["n_prompt"] else (f"decode {tokens}", tokens)
                times = [1e-9 * ns / each for ns in entry["samples_ns"]]
                measured.repeats.setdefault(task, []).append(times)
        yield measured


def print_table(name: str, found: Sequence[Measured]) -> None:
    """A model's table: a row for every file and number of threads."""
    orders = list(found[0].repeats)
    columns = ["threads", "", "MB"]
    for task in orders:
        columns += [f"{task}, {unit(task)}", "best", "cpu", "repeats"]
    columns += ["load s", "first s", "memory MB", "of file"]
    print(f"\n### {name}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for one in found:
        cells = [str(one.threads), one.name, f"{one.nbytes / 1e6:.1f}"]
        for task in orders:
            times = one.all(task)
            cells += [rate(task, float(np.median(times))), rate(task, float(np.quantile(times, 0.1)))]
            cells.append(rate(task, float(np.median(one.cpu[task]))) if task in one.cpu else "")
            cells.append(f"{one.deviation(task):.0%}")
        if one.memory:
            share = f"{one.memory / (one.nbytes + one.cache):.2f}" if one.cache else ""
            cells += [f"{one.load:.3f}", f"{one.first:.3f}", f"{one.memory / 1e6:.1f}", share]
        else:
            cells += [""] * 4
        print(f"| {' | '.join(cells)} |")
    print_ratios(found, orders)


def unit(task: str) -> str:
    return "ms" if " x " in task else "tokens/s"


def rate(task: str, seconds: float) -> str:
    if unit(task) == "ms":
        return f"{1e3 * seconds:.2f}"
    kind, tokens = task.split()
    return f"{(int(tokens) if kind == 'prefill' else 1) / seconds:.1f}"


def print_ratios(found: Sequence[Measured], orders: Sequence[str]) -> None:
    """How many times as fast as each peer ours are, by medians: of one thread those of processor time, if the
    peer has one, else of the wall's."""
    peers = list(dict.fromkeys(one.name for one in found if not is_ours(one)))
    if not peers:
        return
    columns = ["threads", "times as fast as", *(f"{peer}, {task}" for peer in peers for task in orders)]
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    by_name = {(one.name, one.threads): one for one in found}
    for one in filter(is_ours, found):
        others = (by_name[peer, one.threads] for peer in peers)
        cells = [f"{ratio(one, other, task):.2f}" for other in others for task in orders]
        print(f"| {one.threads} | {one.name} | {' | '.join(cells)} |")


def ratio(ours: Measured, peer: Measured, task: str) -> float:
    if ours.threads == 1 and task in peer.cpu:
        return float(np.median(peer.cpu[task]) / np.median(ours.cpu[task]))
    return float(np.median(peer.all(task)) / np.median(ours.all(task)))


def is_ours(one: Measured) -> bool:
    return one.name.startswith("qgraph ")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; default: all")
    parser.add_argument("--schemes", type=names(recipes()), default="nvfp4,nvfp4-w4a8,ternary")
    parser.add_argument("--peers", type=names(PEERS), default=",".join(PEERS))
    parser.add_argument(
        "--in-ort", action="store_true", help="ours as custom operators of ONNX Runtime (--export ort), too"
    )
    parser.add_argument("--threads", type=numbers, default="1,2")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--decode", type=int, default=64, help="tokens behind it (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of a repeat (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="of the whole (default: %(default)s)")
    parser.add_argument("--minilm", type=Path, help="an exported MiniLM, to save the export")
    parser.add_argument("--llama-bench", type=Path, metavar="PATH", help="llama.cpp's program of that name")
    parser.add_argument("--gguf", type=Path, nargs="+", default=[], metavar="FILE", help="models for it")
    parser.add_argument(
        "--work", type=Path, help="keeps what is exported and compiled, and takes it from there"
    )
    parser.add_argument("--json", type=Path)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for every model."""
    parser = arguments()
    options = parser.parse_args(argv)
    if unknown := [name for name in options.models if name not in MODELS]:
        parser.error(f"unknown model {', '.join(unknown)}; known: {', '.join(MODELS)}")
    if not (options.llama_bench and options.gguf):
        print("without llama.cpp: give --llama-bench and --gguf")
    about = description()
    print(f"{about['processor']}, {about['cores']} cores")
    start, neighbours = time.perf_counter(), Neighbours()
    results: dict[str, list[Measured]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        for name in options.models or MODELS:
            files = prepare(name, options.schemes, options.peers, work, options.minilm, options.in_ort)
            found = results.setdefault(name, [])
            for threads in options.threads:
                found += measure(name, threads, files, options)
                if name in SHAPES and options.llama_bench:
                    found += llama_bench(options, threads)
            print_table(name, found)
    shares = neighbours.shares(time.perf_counter() - start)
    print("\nOf the cores' time meanwhile: " + ", ".join(f"{name} {v:.0%}" for name, v in shares.items()))
    if options.json:
        document = {
            "machine": about,
            "neighbours": shares,
            "options": {name: str(value) for name, value in vars(options).items()},
            "models": {name: [asdict(one) for one in found] for name, found in results.items()},
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {options.json}")


if __name__ == "__main__":
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    main()
