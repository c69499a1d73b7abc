"""Compiles what benchmarks/gpu.py measures, into a folder to carry to a machine with a GPU.

    python benchmarks/gpu_prepare.py FOLDER [--minilm minilm.onnx] [--layers 4] [--only models,layers,llama]
        [--shapes 4096x4096,..] [--schemes nvfp4,..] [--isas cuda-sm_90a,.. | --isas all] [--limit 48]
        [--work FOLDER]

That machine needs neither the compiler nor a network: python3 with numpy and ml_dtypes, a C++ compiler (the
runtime is built on first use), and this repository's files. Three kinds of artifacts are made, all gzipped:

* models: small ones with their weights, for CPU and GPU, to compare the two. The decoder that ships, and with
  `--minilm` (`python -m qgraph.models export minilm minilm.onnx`) the encoder.
* layers: a linear layer of each shape and scheme; the other machine makes as many of them as it takes for
  weights to be cold (gpu_skeleton.side_by_side).
* llama: some layers of a Llama of 7B shape, with embedding and head. Its float32 weights (0.8 GB a layer, and
  1 GB) are made, exported and quantized here.

Of the last two the weights are left out, and made up where they are measured. `manifest.json` says what each
file is; a folder can be prepared in several runs. Fails where it holds more than `--limit` MiB.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu_skeleton import strip
from llama_shapes import LlamaShape, export
from matmul_chain import one_layer

import qgraph
from qgraph.errors import QGraphError, UsageError
from qgraph.models import get_model
from qgraph.schemes import COMPUTES, SCHEMES

ISAS = ("x86-64-v4", "x86-64-v3", "cuda-sm_90a", "cuda-ptx_80")
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
LAYER_SCHEMES = ("nvfp4", "ternary", "int4", "int8")
LLAMA_SCHEMES = ("nvfp4", "ternary")
# Of the decoder: (scheme, cache). A float artifact is as large as four of the others, so there is but one.
DECODERS = (
    ("none", "float"),
    ("nvfp4", "float"),
    ("nvfp4", "int8"),
    ("ternary", "float"),
    ("ternary", "int8"),
    ("int4", "float"),
    ("int4", "int8"),
)
KINDS = ("models", "layers", "llama")
TENSOR_CORES = "bf16"  # of `--compute`: one bfloat16 number an activation, not two


def llama_shape(layers: int) -> LlamaShape:
    """Of a Llama 2 7B, with fewer layers."""
    return LlamaShape(layers=layers, width=4096, inner=11008, heads=32, kv_heads=32)


def recipes(schemes: list[str]) -> Iterator[tuple[str, str]]:
    """(scheme, compute): each as it is by default, and where there is one with the faster products."""
    for scheme in schemes:
        yield scheme, COMPUTES[0]
        if SCHEMES[scheme].solvers:
            yield scheme, TENSOR_CORES


class Folder:
    """What is prepared: files, and what each of them is."""

    def __init__(self, path: Path, work: Path, isas: tuple[str, ...]) -> None:
        self.path, self._work, self._isas = path, work, isas
        self.entries: list[dict[str, Any]] = []
        path.mkdir(parents=True, exist_ok=True)

    def add(self, kind: str, name: str, source: Path, target: str, weights: bool, **about: Any) -> None:
        """Compile `source` by the options among `about`: scheme, compute and those of the compiler."""
        start = time.perf_counter()
        options = {"verify": False, "target": target, **about.pop("options", {})}
        scheme, compute = about["scheme"], about.get("compute", COMPUTES[0])
        if SCHEMES[scheme].solvers and not weights:
            options["solver"] = "rtn"  # nothing is read off these weights
        built = qgraph.compile(
            source, scheme=scheme, compute=compute, output=self._work / name, onnx=False, **options
        )
        assert built.artifact is not None
        skeleton = strip(built.artifact, self.path / f"{name}.gz", isas=self._isas, weights=weights)
        built.artifact.unlink()
        self.entries.append({"kind": kind, "file": skeleton.name, **about})
        seconds = time.perf_counter() - start
        print(f"{name}: {skeleton.stat().st_size / 2**20:.2f} MiB, {seconds:.0f} s", flush=True)

    def close(self, limit: float) -> None:
        """Write the manifest, with what earlier runs prepared. Raises UsageError where files are more than
        `limit` MiB."""
        manifest = self.path / "manifest.json"
        earlier = json.loads(manifest.read_text()) if manifest.is_file() else []
        made = {entry["file"] for entry in self.entries}
        self.entries += [entry for entry in earlier if entry["file"] not in made]
        manifest.write_text(json.dumps(self.entries, indent=1) + "\n")
        size = sum(path.stat().st_size for path in self.path.iterdir()) / 2**20
        print(f"{self.path}: {size:.1f} MiB in {len(self.entries)} artifacts")
        if size > limit:
            raise UsageError(f"{self.path}: {size:.1f} MiB is more than {limit} MiB: prepare less (--only)")


def prepare_models(folder: Folder, work: Path, options: argparse.Namespace) -> None:
    decoder = get_model("tinystories").export(work / "tinystories.onnx")
    for scheme, cache in DECODERS:
        name = f"tinystories-{scheme}" + ("-kv8" if cache == "int8" else "")
        folder.add(
            "decoder",
            name,
            decoder,
            "cuda,cpu",
            True,
            scheme=scheme,
            cache=cache,
            options={"kv_cache": cache},
        )
    if options.minilm:
        compress = {"embeddings": "nvfp4"}
        folder.add(
            "encoder", "minilm-nvfp4", options.minilm, "cuda,cpu", True, scheme="nvfp4", options=compress
        )


def prepare_layers(folder: Folder, work: Path, options: argparse.Namespace) -> None:
    for K, N in options.shapes:
        source = one_layer(K, N, work / f"{K}x{N}.onnx")
        for scheme, compute in recipes(options.schemes):
            name = f"layer-{K}x{N}-{scheme}" + (f"-{compute}" if compute != COMPUTES[0] else "")
            folder.add("layer", name, source, "cuda", False, scheme=scheme, compute=compute, K=K, N=N)
        source.unlink()


def prepare_llama(folder: Folder, work: Path, options: argparse.Namespace) -> None:
    shape = llama_shape(options.layers)
    source = export(shape, work / "llama.onnx")
    for scheme, compute in recipes([s for s in options.schemes if s in LLAMA_SCHEMES]):
        name = f"llama-{scheme}" + (f"-{compute}" if compute != COMPUTES[0] else "")
        folder.add("llama", name, source, "cuda", False, scheme=scheme, compute=compute, shape=vars(shape))


PREPARE: dict[str, Callable[[Folder, Path, argparse.Namespace], None]] = {
    "models": prepare_models,
    "layers": prepare_layers,
    "llama": prepare_llama,
}


def arguments() -> argparse.ArgumentParser:
    summary, _, about = (__doc__ or "").partition("\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=about, formatter_class=form)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minilm", type=Path, help="its ONNX file")
    parser.add_argument("--layers", type=int, default=4, help="of the Llama")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(KINDS))
    parser.add_argument("--shapes", type=_shapes, default=list(SHAPES))
    parser.add_argument("--schemes", type=lambda text: text.split(","), default=list(LAYER_SCHEMES))
    parser.add_argument(
        "--isas", type=lambda text: () if text == "all" else tuple(text.split(",")), default=ISAS
    )
    parser.add_argument("--limit", type=float, default=48, help="MiB of the folder, at most")
    parser.add_argument(
        "--work", type=Path, help="a folder with room for the float models (default: temporary)"
    )
    return parser


def _shapes(text: str) -> list[tuple[int, int]]:
    return [(int(K), int(N)) for K, _, N in (shape.partition("x") for shape in text.split(","))]


def main(given: list[str] | None = None) -> None:
    options = arguments().parse_args(given)
    if unknown := [name for name in options.only if name not in KINDS]:
        raise UsageError(f"--only: unknown {unknown[0]}; known: {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        folder = Folder(options.folder, Path(work), options.isas)
        for kind in options.only:
            PREPARE[kind](folder, Path(work), options)
        folder.close(options.limit)


if __name__ == "__main__":
    try:
        main()
    except QGraphError as error:
        raise SystemExit(f"error: {error}") from None
