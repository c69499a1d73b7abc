"""Relative output error E|xW - xW'|^2 / E|xW|^2 of NVFP4 weights on inputs that calibration did not see.

    python benchmarks/nvfp4_output_error.py [minilm stories260K tinystories-llama-4m] [--samples 512]
    python benchmarks/nvfp4_output_error.py --speed [--size 4096] [--threads 2]

Layer by layer, in the float model: x is what the layer sees there. Solvers without calibration first, then
GPTQ with one thing more in each row; the last but one is the solver `gptq` as it is, `+ Hadamard 16` what a
rotation of the inputs in blocks of 16 would add to that. In percent.

* MiniLM: calibrated on sentences of the STS benchmark's train set, measured on its dev set. Columns: the four
  linear layers of encoder layer 2, then the mean of all layers.
* The decoders: windows of 256 tokens from the two ends of a file of TinyStories; the mean of all layers.

Padding tokens do not count. `--captions` shows how much the figures hang on the data: MiniLM calibrated and
measured on short captions alone (alternate sentences of the first 1000 of the dev set). Such inputs are much
alike, and what second-order methods leave is two to four times less than on mixed text. `--padding` takes the
same sentences in batches of 32 and counts the padding.

`--speed` times a square layer, each solver in a process of its own; `memory` is what it needed at its peak
beyond W and H. Downloads nothing; see end_to_end.py for the models.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qgraph.calibration import Batch, Data, collect, model_inputs, open_data
from qgraph.evaluate.sts import SentenceTokenizer
from qgraph.models import get_model, open_model
from qgraph.passes import load_model, prepare_model
from qgraph.passes.select_layers import DECISIONS, SelectLayers
from qgraph.schemes import SCHEMES
from qgraph.solvers import SOLVERS, gptq, hessian

DATA = Path(__file__).parents[2] / "shared" / "data"
STORIES = "text/tinystories_v2_gpt4_train_first10k_lines.txt"
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


def variants(tokens: int) -> dict[str, Quantize]:
    """Row of the table -> how to quantize, after so many tokens of calibration."""

    def solver(name: str, W: Array, H: Matrix) -> Array:
        return SOLVERS[name](W, H=H, tokens=tokens).dequantize()

    def gptq_with(W: Array, H: Matrix, **options) -> Array:
        return gptq.solve(W, H=H, tokens=tokens, **options).dequantize()

    def rotated(W: Array, H: Matrix) -> Array:
        if len(W) % 16:
            return gptq_with(W, H)
        return hessian.rotate(gptq_with(hessian.rotate(W, 16), hessian.rotate_moment(H, 16)), 16)

    plain = {"order": False, "beams": 1, "rounds": 0}
    rows: dict[str, Quantize] = {name: partial(solver, name) for name in SCHEMES["nvfp4"].solvers[:0:-1]}
    rows |= {f"gptq, {s} scales": partial(gptq_with, scales=s, **plain) for s in gptq.SCALES}
    rows["+ order by power"] = partial(gptq_with, beams=1, rounds=0)
    rows["+ 8 paths"] = partial(gptq_with, rounds=0)
    rows |= {f"+ refinement, {n} of 4 rounds": partial(gptq_with, rounds=n) for n in (1, 2)}
    rows["gptq"] = gptq_with
    rows["+ Hadamard 16"] = rotated
    return rows


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


def table(found: list[Layer]) -> None:
    """Print the rows of a model as they are measured."""
    columns = {layer.name: SHOWN[layer.name] for layer in found if layer.name in SHOWN}
    print(f"\n| % | {' | '.join([*columns.values(), 'mean of all', 's'])} |\n|{'---|' * (len(columns) + 3)}")
    for row, quantize in variants(found[0].tokens).items():
        start = time.perf_counter()
        results = [quantize(layer.W, layer.H) for layer in found]
        seconds = time.perf_counter() - start
        errors = {
            layer.name: hessian.output_error(layer.W - result, layer.held_out)
            / hessian.output_error(layer.W, layer.held_out)
            for layer, result in zip(found, results, strict=True)
        }
        figures = [errors[name] for name in columns] + [float(np.mean(list(errors.values())))]
        print(f"| {row} | {' | '.join(f'{100 * e:.4f}' for e in figures)} | {seconds:.1f} |", flush=True)


def padded(text: Path, tokenizer: Path, size: int = 32) -> Data:
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
        alike = list(texts["dev"])[:1000]
        texts = {"train": dict.fromkeys(alike[::2]), "dev": dict.fromkeys(alike[1::2])}
    for part, lines in texts.items():
        (work / f"{part}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = model or example.export(work / "minilm.onnx")
    return Subject(path, example.tokenizer_path(), work / "train.txt", work / "dev.txt", None, padding)


def decoder(model: Path, tokenizer: Path, data: Path, work: Path) -> Subject:
    """The first 60 % of the stories, and the last 20 %."""
    text = (data / STORIES).read_text(encoding="utf-8").replace("<|endoftext|>", "")
    for name, part in (("calibration", text[: len(text) * 3 // 5]), ("held-out", text[len(text) * 4 // 5 :])):
        (work / f"{name}.txt").write_text(part, encoding="utf-8")
    return Subject(model, tokenizer, work / "calibration.txt", work / "held-out.txt", WINDOW)


def stories260k(data: Path, work: Path) -> Subject:
    """See the module."""
    folder = data / "stories260K"
    return decoder(folder / "stories260K.onnx", folder / "hf" / "tokenizer.json", data, work)


def llama4m(data: Path, work: Path) -> Subject:
    """See the module."""
    model = open_model(str(data / "tinystories-llama-4m"))
    return decoder(model.export(work / "llama.onnx"), model.tokenizer_path(), data, work)


def speed(size: int, threads: int) -> Iterator[tuple[str, float, float]]:
    """(solver, seconds, peak MiB beyond W and H) for a layer [size, size]. Linux only."""
    context = multiprocessing.get_context("spawn")
    for name in SCHEMES["nvfp4"].solvers[::-1]:
        with context.Pool(1) as pool:
            yield name, *pool.apply(_timed, (name, size, threads))


def _timed(name: str, size: int, threads: int) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    W = rng.standard_normal((size, size), np.float32)
    # A moment without sums over tokens, which would need more memory than any solver.
    power = np.exp(rng.standard_normal(size))
    distance = np.abs(np.subtract.outer(np.arange(size, dtype=np.int32), np.arange(size, dtype=np.int32)))
    H = 0.9 ** np.minimum(distance, 100)
    del distance
    H *= power[:, None]
    H *= power
    SOLVERS[name](W[:32, :32].copy(), H=H[:32, :32].copy(), threads=1)  # import it outside the clock
    with open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123
        file.write("5")  # resets the peak
    before = _status("VmRSS")
    start = time.perf_counter()
    SOLVERS[name](W, H=H, threads=threads)
    return time.perf_counter() - start, (_status("VmHWM") - before) / 1024


def _status(field: str) -> float:
    """A field of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field + ":")).split()[1])


def main() -> None:
    """Print a table for every model, or of speed."""
    known: dict[str, Callable[[argparse.Namespace, Path], Subject]] = {
        "minilm": lambda o, work: minilm(o.data, work, o.minilm, o.captions, o.padding),
        "stories260K": lambda o, work: stories260k(o.data, work),
        "tinystories-llama-4m": lambda o, work: llama4m(o.data, work),
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--samples", type=int, default=512, help="sentences or windows, of each text")
    parser.add_argument("--captions", action="store_true", help="MiniLM only")
    parser.add_argument("--padding", action="store_true", help="MiniLM only")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--minilm", type=Path, help="an exported MiniLM, to save the export")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--size", type=int, default=4096, help="of the layer of --speed")
    parser.add_argument("--threads", type=int, default=2, help="of --speed")
    options = parser.parse_args()
    unknown = [name for name in options.models if name not in known]
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)}; known: {', '.join(known)}")
    if (options.captions or options.padding) and options.models != ["minilm"]:
        parser.error("--captions and --padding are for minilm alone")
    if options.speed:
        print("| solver | s | Mweights/s | memory, MiB |\n|---|---|---|---|")
        for name, seconds, memory in speed(options.size, options.threads):
            print(
                f"| {name} | {seconds:.2f} | {options.size**2 / seconds / 1e6:.1f} | {memory:.0f} |",
                flush=True,
            )
        return
    for name in options.models or known:
        with tempfile.TemporaryDirectory() as work:
            print(f"\n### {name}: ", end="")
            found = layers(known[name](options, Path(work)), options.samples)
        table(found)


if __name__ == "__main__":
    main()
