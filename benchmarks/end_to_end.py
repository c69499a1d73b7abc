"""What quantization costs a whole model, by scheme and solver, through compiled artifacts.

    python benchmarks/end_to_end.py [minilm stories260K tinystories-llama-4m tinystories]
        [--scheme nvfp4 ...] [--solver rtn sweep gptq ...] [--calibrate-on float ...]
        [--samples N] [--smooth A] [--rotate N] [--embeddings tied] [--kv-cache int8]
        [--layer PATTERN=SCHEME ...]

A solver is measured against rounding to nearest in the same scheme: `recovered` is the share of what `rtn`
loses against the float model that the solver wins back. Nothing is measured on what it was calibrated on:

* MiniLM: sentences of the STS benchmark's train set; Spearman's correlation on its dev set, and the mean
  cosine between float and quantized embeddings of all dev sentences. Sentences of both are left out.
* stories260K: stories 101 to 1550 of the TinyStories file; perplexity of the first 100, each cut at 512
  tokens: 36,664 predicted tokens, of which published figures are float 3.688 and `rtn` 4.148.
* tinystories-llama-4m and tinystories, the model that travels with qgraph: stories 1 to 1550, of those they
  were trained on; perplexity of those behind number 1555, which they were not.

Downloads nothing: `--data` is a folder of models and texts (docs/nvfp4.md says which), MiniLM comes from an
installed package or `--minilm`.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_options import STORIES, arguments, chosen

import qgraph
from qgraph.config import CompileConfig
from qgraph.evaluate.decoders import open_text_runner
from qgraph.evaluate.perplexity import PerplexityResult, Window, compare, perplexity, split_windows
from qgraph.evaluate.runners import open_runner
from qgraph.evaluate.similarity import cosine
from qgraph.evaluate.sts import Pair, SentenceTokenizer, StsResult, evaluate_sts, read_pairs
from qgraph.evaluate.tokenizer import leading_tokens, load_tokenizer, read_documents
from qgraph.models import get_model
from qgraph.models.causal_lm import CausalLM
from qgraph.schemes import SCHEMES
from qgraph.solvers import SOLVERS

BASELINE = "rtn"
SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Variant:
    """One way to quantize. `calibrate_on` is empty where no data are used."""

    scheme: str
    solver: str
    calibrate_on: str = ""

    def __str__(self) -> str:
        return self.solver if self.calibrate_on in ("", "float") else f"{self.solver}, {self.calibrate_on}"


class Subject:
    """A model with its calibration data and its metric. `loss` of a metric is 0 for the float model."""

    title: str
    columns: tuple[str, ...]
    model: Path
    tokenizer: Path
    calibration: Path
    held_out: Path  # what it is measured on, as a text to calibrate on

    def measure(self, path: Path) -> Mapping[str, float]:
        """The columns of a model file."""
        raise NotImplementedError

    def loss(self, row: Mapping[str, float]) -> float:
        """What quantization costs, in the metric that `recovered` is a share of."""
        raise NotImplementedError


class Encoder(Subject):
    """MiniLM on semantic textual similarity."""

    title = "MiniLM, STS-B dev"
    columns = ("Spearman", "mean cosine")

    def __init__(self, data: Path, work: Path, minilm: Path | None) -> None:
        example = get_model("minilm")
        self.model = minilm or example.export(work / "minilm.onnx")
        self.tokenizer = example.tokenizer_path()
        self._tokenize = SentenceTokenizer(self.tokenizer)
        self._pairs = read_pairs(data / "sts" / "stsb-en-dev.csv")
        self.calibration = work / "sts-train.txt"
        self.calibration.write_text("\n".join(_train_sentences(data, self._pairs)) + "\n", encoding="utf-8")
        self.held_out = work / "sts-dev.txt"
        measured = dict.fromkeys(sentence for pair in self._pairs for sentence in pair[:2])
        self.held_out.write_text("\n".join(measured) + "\n", encoding="utf-8")
        self._float = self._score(self.model)

    def _score(self, path: Path) -> StsResult:
        return evaluate_sts(open_runner(path), self._tokenize, self._pairs)

    def measure(self, path: Path) -> Mapping[str, float]:
        found = self._float if path == self.model else self._score(path)
        same = cosine(found.embeddings, self._float.embeddings).mean()
        return {"Spearman": found.spearman, "mean cosine": float(same)}

    def loss(self, row: Mapping[str, float]) -> float:
        return 1 - row["mean cosine"]


def _train_sentences(data: Path, dev: Sequence[Pair]) -> list[str]:
    """The distinct sentences of the train set, without those of the dev set."""
    seen = {sentence for pair in dev for sentence in pair[:2]}
    with (data / "sts" / "stsb-en-train.csv").open(newline="", encoding="utf-8") as file:
        sentences = dict.fromkeys(sentence for row in csv.reader(file) for sentence in row[:2])
    return [" ".join(s.split()) for s in sentences if s not in seen]


class Decoder(Subject):
    """A causal language model on stories."""

    columns = ("perplexity", "KL", "top-1")

    def __init__(
        self, title: str, model: Path, tokenizer: Path, data: Path, work: Path, measured: slice, used: slice
    ) -> None:
        self.title, self.model, self.tokenizer = title, model, tokenizer
        self.calibration = work / f"{model.stem}.jsonl"
        texts = [s.strip() for s in (data / STORIES).read_text(encoding="utf-8").split(SEPARATOR)]
        texts = [s for s in texts if s]
        self.held_out = work / f"{model.stem}.held-out.jsonl"
        for file, part in ((self.calibration, used), (self.held_out, measured)):
            lines = (json.dumps({"text": story}) for story in texts[part])
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        tokenizer_ = load_tokenizer(tokenizer)
        stories = read_documents(data / STORIES, tokenizer_, separator=SEPARATOR)
        assert len(stories) == len(texts), "a story of no tokens"
        prefix = leading_tokens(tokenizer_)
        cut = [story[: 512 - len(prefix)] for story in stories[measured]]
        self.windows: list[Window] = split_windows(cut, length=512, stride=256, prefix=prefix)
        self.float: PerplexityResult = perplexity(open_text_runner(model), self.windows)
        self.title += f", {self.float.tokens} tokens"

    def measure(self, path: Path) -> Mapping[str, float]:
        if path == self.model:
            return {"perplexity": self.float.perplexity, "KL": 0.0, "top-1": 1.0}
        found = compare(open_text_runner(path), open_text_runner(self.model), self.windows)
        return {
            "perplexity": found.model.perplexity,
            "KL": found.kl_divergence,
            "top-1": found.top1_agreement,
        }

    def loss(self, row: Mapping[str, float]) -> float:
        return row["perplexity"] - self.float.perplexity


def stories260k(data: Path, work: Path) -> Decoder:
    folder = data / "stories260K"
    return Decoder(
        "stories260K",
        folder / "stories260K.onnx",
        folder / "hf" / "tokenizer.json",
        data,
        work,
        measured=slice(0, 100),
        used=slice(100, 1550),
    )


def llama4m(data: Path, work: Path) -> Decoder:
    model = CausalLM(data / "tinystories-llama-4m")
    return Decoder(
        "tinystories-llama-4m",
        model.export(work / "tinystories-llama-4m.onnx", cache=False),
        model.tokenizer_path(),
        data,
        work,
        measured=slice(1555, None),
        used=slice(0, 1550),
    )


def shipped(data: Path, work: Path) -> Decoder:
    model = get_model("tinystories")
    return Decoder(
        "tinystories",
        model.export(work / "tinystories.onnx"),
        model.tokenizer_path(),
        data,
        work,
        measured=slice(1555, None),
        used=slice(0, 1550),
    )


SUBJECTS: dict[str, Callable[[argparse.Namespace, Path], Subject]] = {
    "minilm": lambda o, work: Encoder(o.data, work, o.minilm),
    "stories260K": lambda o, work: stories260k(o.data, work),
    "tinystories-llama-4m": lambda o, work: llama4m(o.data, work),
    "tinystories": lambda o, work: shipped(o.data, work),
}


def variants(schemes: Sequence[str], solvers: Sequence[str], measured_on: Sequence[str]) -> list[Variant]:
    """What to run, rounding to nearest first in every scheme. Solvers that a scheme does not take are left
    out."""
    found: dict[Variant, None] = {}
    for scheme in schemes:
        for solver in (BASELINE, *solvers):
            if solver not in SCHEMES[scheme].solvers:
                continue
            needs = SOLVERS[solver].calibrated
            on = measured_on if needs else ["float" if SCHEMES[scheme].needs_calibration else ""]
            found.update(dict.fromkeys(Variant(scheme, solver, name) for name in on))
    return list(found)


@dataclass(frozen=True)
class Options:
    """Fields of CompileConfig: of all runs, and of those with data."""

    all: Mapping[str, Any]
    calibrated: Mapping[str, Any]


def build(subject: Subject, variant: Variant, work: Path, options: Options) -> tuple[Path, float, float]:
    """(artifact, its bits per quantized weight, seconds to compile)."""
    config: dict[str, Any] = dict(options.all)
    if variant.calibrate_on:
        config |= {
            **options.calibrated,
            "calibration": str(subject.calibration),
            "tokenizer": str(subject.tokenizer),
            "calibrate_on": variant.calibrate_on,
        }
    name = "-".join(filter(None, (subject.model.stem, variant.scheme, variant.solver, variant.calibrate_on)))
    start = time.perf_counter()
    result = qgraph.compile(
        subject.model,
        scheme=variant.scheme,
        solver=variant.solver,
        output=work / name,
        verify=False,
        onnx=False,
        **config,
    )
    bits = result.report.bits_per_weight
    return work / f"{name}.qg", float("nan") if bits is None else bits, time.perf_counter() - start


def table(subject: Subject, runs: Sequence[Variant], work: Path, options: Options) -> None:
    """Prints the markdown table of a subject, a row as soon as it is measured."""
    header = ("scheme", "solver", "bits", "MB", *subject.columns, "recovered", "s")
    print(f"\n### {subject.title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    exact = subject.measure(subject.model)
    size = f"{subject.model.stat().st_size / 1e6:.2f}"
    print(_row(["float", "", "32", size, *(_number(exact[c]) for c in subject.columns), "", ""]), flush=True)
    lost: dict[str, float] = {}
    for run in runs:
        path, bits, seconds = build(subject, run, work, options)
        found = subject.measure(path)
        loss = subject.loss(found)
        lost.setdefault(run.scheme, loss)  # the first of a scheme is rounding to nearest
        share = "" if run.solver == BASELINE else f"{1 - loss / lost[run.scheme]:.1%}"
        figures = [
            f"{bits:.2f}",
            f"{path.stat().st_size / 1e6:.2f}",
            *(_number(found[c]) for c in subject.columns),
        ]
        print(_row([run.scheme, str(run), *figures, share, f"{seconds:.0f}"]), flush=True)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:.4f}"


def main() -> None:
    """Print a table for every model."""
    parser = arguments(__doc__, SUBJECTS)
    parser.add_argument("--scheme", nargs="+", default=["nvfp4"], choices=[s for s in SCHEMES if s != "none"])
    parser.add_argument("--solver", nargs="+", default=["sweep", "gptq"], choices=list(SOLVERS))
    parser.add_argument(
        "--calibrate-on",
        nargs="+",
        default=["float", "corrected"],
        choices=["float", "quantized", "corrected"],
    )
    parser.add_argument("--samples", type=int, default=CompileConfig.samples)
    parser.add_argument("--smooth", type=float, default=0.0, help="of all calibrated runs")
    parser.add_argument("--rotate", type=int, default=0, help="of all calibrated runs")
    parser.add_argument("--embeddings", default="float", help="of all runs")
    parser.add_argument("--kv-cache", default=CompileConfig.kv_cache, help="of all runs")
    parser.add_argument("--layer", nargs="+", default=[], metavar="PATTERN=SCHEME", help="of all runs")
    parser.add_argument("--work", type=Path, help="where files go; default: a temporary folder")
    options = parser.parse_args()
    names = chosen(parser, options, SUBJECTS)
    given = Options(
        all={"embeddings": options.embeddings, "kv_cache": options.kv_cache, "layers": tuple(options.layer)},
        calibrated={name: getattr(options, name) for name in ("samples", "smooth", "rotate")},
    )
    runs = variants(options.scheme, options.solver, options.calibrate_on)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for name in names:
            table(SUBJECTS[name](options, work), runs, work, given)


if __name__ == "__main__":
    main()
