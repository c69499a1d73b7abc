"""What benchmarks of output error share: models and texts, their layers, tables, speed."""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import model_options
import numpy as np
import numpy.typing as npt

from qgraph.calibration import Batch, Data, collect, model_inputs, open_data
from qgraph.evaluate.sts import SentenceTokenizer
from qgraph.models import get_model
from qgraph.models.causal_lm import CausalLM
from qgraph.passes import load_model, prepare_model
from qgraph.passes.select_layers import DECISIONS, SelectLayers
from qgraph.solvers import SOLVERS, hessian

WINDOW = 256
SHOWN = {
    "encoder.layer.2.attention.self.query": "query",
    "encoder.layer.2.attention.output.dense": "attn out",
    "encoder.layer.2.intermediate.dense": "up",
    "encoder.layer.2.output.dense": "down",
}

Array = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]
Quantize = Callable[[Array, Matrix], Array]  # (W, H) -> W'


@dataclass(frozen=True)
class Layer:
    """A weight with the second moments of its inputs: of calibration, and held out."""

    name: str
    W: Array
    H: Matrix
    held_out: Matrix
    tokens: int  # of calibration


@dataclass(frozen=True)
class Subject:
    """A model, and two texts: one sample a line, or cut into windows as a whole."""

    model: Path
    tokenizer: Path
    calibration: Path
    held_out: Path
    length: int | None
    padding: bool = False  # counts


class Padded(Batch):
    """A batch of which every row counts."""

    tokens = None


def layers(subject: Subject, samples: int) -> list[Layer]:
    """All layers that qgraph would quantize, in graph order."""
    model = prepare_model(load_model(subject.model))
    SelectLayers()(model)
    nodes = {node.name: node for node in model.graph}
    chosen = [d for d in model.meta[DECISIONS] if d.quantize]
    moments: list[Mapping] = []
    for text in (subject.calibration, subject.held_out):
        data = (
            padded(text, subject.tokenizer)
            if subject.padding
            else open_data(
                text,
                model_inputs(model),
                tokenizer=subject.tokenizer,
                samples=samples,
                length=subject.length,
            )
        )
        moments.append(collect(model, data))
    tokens = [next(iter(found.values())).tokens for found in moments]
    print(f"{tokens[0]} tokens of calibration, {tokens[1]} held out, {len(chosen)} layers")
    found = []
    for d in chosen:
        value = nodes[d.node_name].inputs[0].name
        W = model.graph.initializers[d.weight].const_value.numpy()
        found.append(Layer(d.module, W, *(m[value].second_moment for m in moments), tokens[0]))
    return found


def table(found: list[Layer], rows: Mapping[str, Quantize], weight_error: bool = False) -> None:
    """Print the rows of a model as they are measured; in brackets |W - W'|^2 / |W|^2."""
    columns = [layer.name for layer in found if layer.name in SHOWN]
    heads = [*(SHOWN[name] for name in columns), "mean of all", "s"]
    print(f"\n| % | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for row, quantize in rows.items():
        start = time.perf_counter()
        results = [quantize(layer.W, layer.H) for layer in found]
        seconds = time.perf_counter() - start
        errors = {
            layer.name: (
                hessian.relative_output_error(layer.W, result, layer.held_out),
                float(np.square(layer.W - result).sum() / np.square(layer.W).sum()),
            )
            for layer, result in zip(found, results, strict=True)
        }
        shown = [*(errors[name] for name in columns), np.mean(list(errors.values()), axis=0)]
        cells = [f"{100 * e:.4g}" + (f" ({100 * w:.3g})" if weight_error else "") for e, w in shown]
        print(f"| {row} | {' | '.join(cells)} | {seconds:.1f} |", flush=True)


def padded(text: Path, tokenizer: Path, size: int = 8) -> Data:
    """The sentences of a file in batches, padded to the longest of each."""
    tokenize, lines = SentenceTokenizer(tokenizer), text.read_text(encoding="utf-8").splitlines()
    parts = [lines[i : i + size] for i in range(0, len(lines), size)]
    return Data(text.name, [Padded(tokenize(part), tuple(part)) for part in parts])


def minilm(data: Path, work: Path, model: Path | None, captions: bool, padding: bool) -> Subject:
    """Sentences, one a line; none is in both texts."""
    example = get_model("minilm")

    def sentences(part: str) -> dict[str, None]:
        with (data / "sts" / f"stsb-en-{part}.csv").open(newline="", encoding="utf-8") as file:
            return dict.fromkeys(" ".join(s.split()) for row in csv.reader(file) for s in row[:2])

    texts = {part: sentences(part) for part in ("train", "dev")}
    texts["train"] = {s: None for s in texts["train"] if s not in texts["dev"]}
    if captions or padding:
        alike = list(texts["dev"])[: 512 if padding else 1000]
        texts = {"train": dict.fromkeys(alike[::2]), "dev": dict.fromkeys(alike[1::2])}
    for part, lines in texts.items():
        (work / f"{part}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = model or example.export(work / "minilm.onnx")
    return Subject(path, example.tokenizer_path(), work / "train.txt", work / "dev.txt", None, padding)


def decoder(model: Path, tokenizer: Path, data: Path, work: Path) -> Subject:
    """The first 60 % of the stories, and the last 20 %."""
    text = (data / model_options.STORIES).read_text(encoding="utf-8").replace("<|endoftext|>", "")
    for name, part in (("calibration", text[: len(text) * 3 // 5]), ("held-out", text[len(text) * 4 // 5 :])):
        (work / f"{name}.txt").write_text(part, encoding="utf-8")
    return Subject(model, tokenizer, work / "calibration.txt", work / "held-out.txt", WINDOW)


def stories260k(data: Path, work: Path) -> Subject:
    """See the module."""
    folder = data / "stories260K"
    return decoder(folder / "stories260K.onnx", folder / "hf" / "tokenizer.json", data, work)


def llama4m(data: Path, work: Path) -> Subject:
    """See the module."""
    model = CausalLM(data / "tinystories-llama-4m")
    return decoder(model.export(work / "llama.onnx", cache=False), model.tokenizer_path(), data, work)


def speed(solvers: Sequence[tuple[str, str]], size: int, threads: int) -> Iterator[tuple[str, float, float]]:
    """(solver, seconds, peak MiB beyond W and H) for a layer [size, size]. With formats; Linux only."""
    context = multiprocessing.get_context("spawn")
    for name, format in solvers:
        with context.Pool(1) as pool:
            yield name, *pool.apply(_timed, (name, format, size, threads))


def _timed(name: str, format: str, size: int, threads: int) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    W = rng.standard_normal((size, size), np.float32)
    # A moment without sums over tokens, which would need more memory than any solver.
    power = np.exp(rng.standard_normal(size))
    distance = np.abs(np.subtract.outer(np.arange(size, dtype=np.int32), np.arange(size, dtype=np.int32)))
    H = 0.9 ** np.minimum(distance, 100)
    del distance
    H *= power[:, None]
    H *= power
    SOLVERS[name](
        W[:32, :32].copy(), format=format, H=H[:32, :32].copy(), threads=1
    )  # import it outside the clock
    with open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123
        file.write("5")  # resets the peak
    before = _status("VmRSS")
    start = time.perf_counter()
    SOLVERS[name](W, format=format, H=H, threads=threads)
    return time.perf_counter() - start, (_status("VmHWM") - before) / 1024


def _status(field: str) -> float:
    """A field of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field + ":")).split()[1])


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The options that all these benchmarks have; `doc` is the module's docstring."""
    parser = model_options.arguments(doc, SUBJECTS)
    parser.add_argument("--samples", type=int, default=512, help="sentences or windows, of each text")
    parser.add_argument("--captions", action="store_true", help="MiniLM only")
    parser.add_argument("--padding", action="store_true", help="MiniLM only")
    parser.add_argument(
        "--swap", action="store_true", help="measure on what is calibrated on, and vice versa"
    )
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--size", type=int, default=4096, help="of the layer of --speed")
    parser.add_argument("--threads", type=int, default=2, help="of --speed")
    return parser


def subjects(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Iterator[list[Layer]]:
    """The layers of every model asked for, each under a heading of its own."""
    names = model_options.chosen(parser, options, SUBJECTS)
    if (options.captions or options.padding) and options.models != ["minilm"]:
        parser.error("--captions and --padding are for minilm alone")
    for name in names:
        with tempfile.TemporaryDirectory() as work:
            print(f"\n### {name}: ", end="")
            subject = SUBJECTS[name](options, Path(work))
            if options.swap:
                texts = {"calibration": subject.held_out, "held_out": subject.calibration}
                subject = replace(subject, **texts)
            found = layers(subject, options.samples)
        yield found


def print_speed(solvers: Sequence[tuple[str, str]], size: int, threads: int) -> None:
    """A table of `speed`."""
    print("| solver | s | Mweights/s | memory, MiB |\n|---|---|---|---|")
    for name, seconds, memory in speed(solvers, size, threads):
        print(f"| {name} | {seconds:.2f} | {size**2 / seconds / 1e6:.1f} | {memory:.0f} |", flush=True)


SUBJECTS: dict[str, Callable[[argparse.Namespace, Path], Subject]] = {
    "minilm": lambda o, work: minilm(o.data, work, o.minilm, o.captions, o.padding),
    "stories260K": lambda o, work: stories260k(o.data, work),
    "tinystories-llama-4m": lambda o, work: llama4m(o.data, work),
}
