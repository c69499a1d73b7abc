"""Options and output that `compile`, `quantize` and `build` share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from qgraph.cli.console import print_json, table
from qgraph.cli.options import json_option, quiet_option, refuse_overwrite, standard_options
from qgraph.config import CompileConfig, dump_toml, load_toml
from qgraph.errors import InputError, UsageError
from qgraph.evaluate.files import existing_file
from qgraph.export import EXPORTS
from qgraph.report.document import CompileReport
from qgraph.report.text import summary

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_PATH = click.Path(path_type=Path)
_PATTERN = "layers whose node, weight, operator or module matches (wildcards, or re:REGEX). Repeatable."

# Options that are fields of CompileConfig. Their default here is "not given", so that a config file can hold
# them.
_QUANTIZE = (
    click.option("--scheme", help="How weights are stored: see `qgraph schemes`.  [default: nvfp4]"),
    click.option(
        "--solver",
        help="How codes and scales are chosen: see `qgraph schemes`.  [default: the scheme's best]",
    ),
    click.option(
        "--calibration",
        metavar="FILE",
        help="Data to calibrate on: .npz, .txt or .jsonl. With data the default solver is a calibrated one.",
    ),
    click.option("--tokenizer", metavar="FILE", help="tokenizer.json for a calibration text."),
    click.option(
        "--samples",
        type=int,
        metavar="N",
        help="At most so many samples of the data.  [default: 0, 128 windows of a text, else 512]",
    ),
    click.option(
        "--length",
        type=int,
        metavar="N",
        help="Cut the calibration text into windows of N tokens.  [default: 0, lines as they are]",
    ),
    click.option(
        "--calibrate-on",
        metavar="MODEL",
        help="In what a layer's inputs are measured: float, quantized (earlier layers are), or corrected "
        "(for what these did).  [default: corrected; float with a solver that knows weights alone]",
    ),
    click.option(
        "--smooth",
        type=float,
        metavar="ALPHA",
        help="Migrate scales from activations to weights, with strength 0 to 1.  [default: 0]",
    ),
    click.option(
        "--rotate",
        type=int,
        metavar="SIZE",
        help="Rotate inputs and weights by Hadamard matrices of 16, 32, 64 or 128.  [default: 0, no]",
    ),
    click.option(
        "--reorder",
        metavar="HOW",
        help="Order inputs so that those which suit each other share a block: fold, where the layers around "
        "take the order on; gather, also by an operator; off.  [default: the scheme's]",
    ),
    click.option(
        "--dual-scale",
        metavar="MODE",
        help="on: even out rows of weights by scales that the layers before absorb; off.  "
        "[default: the scheme's]",
    ),
    click.option(
        "--mean-shift",
        metavar="WHERE",
        help="Put right the mean that quantization moves, in norms behind an attention, or in all; off.  "
        "[default: the scheme's, with calibration]",
    ),
    click.option(
        "--embeddings",
        metavar="FORMAT",
        help="How lookup tables are stored: float; tied, one that is a layer's weight, too, once, in int8; "
        "or nvfp4, that one in the scheme and all others in NVFP4.  [default: tied]",
    ),
    click.option(
        "--kv-cache",
        metavar="FORMAT",
        help="How a decoder's cache of keys and values is stored: float or int8.  [default: float]",
    ),
    click.option("--include", multiple=True, metavar="PATTERN", help=f"Quantize only {_PATTERN}"),
    click.option("--exclude", multiple=True, metavar="PATTERN", help=f"Leave in float {_PATTERN}"),
    click.option(
        "--layer",
        "layers",
        multiple=True,
        metavar="PATTERN=SCHEME",
        help="Another scheme, or SCHEME:SOLVER, for layers that match; the last match counts. Repeatable.",
    ),
    click.option(
        "--onnx-style",
        metavar="STYLE",
        help="function: one node a layer, with a standard body; qdq: the body in place.  [default: function]",
    ),
)
_THREADS = (click.option("--threads", type=int, metavar="N", help="Threads; 0 is one a core.  [default: 0]"),)
_CODE = (
    click.option(
        "--target",
        help="The machines that the artifact, and the file of --export ort, is for: x86_64-linux, "
        "aarch64-linux, armv7-linux, riscv64-linux, cpu (this one's), cuda, or one of the former and cuda "
        "with a comma between; or wasm32, as a static-lib.  [default: x86_64-linux]",
    ),
    click.option(
        "--packing",
        metavar="HOW",
        help="Ternary weights in the artifact: fast, 2 bits each, or small, 1.625.  [default: fast]",
    ),
    click.option(
        "--compute",
        metavar="HOW",
        help="What products of more than 8 rows round float activations to: f32 (not at all), or bf16, int16 "
        "or int8, which are faster.  [default: f32]",
    ),
)
_BUILD = (
    click.option(
        "--format",
        metavar="WHAT",
        help="What the artifact becomes: qg, a file; or static-lib, a library and a header.  [default: qg]",
    ),
)
_EXPORT = (
    click.option(
        "--export",
        multiple=True,
        metavar="ENGINE",
        help=f"Write the low-bit model for another engine, too: {', '.join(EXPORTS)}. Repeatable.",
    ),
    click.option(
        "--verify/--no-verify",
        default=None,
        help="Compare with ONNX's reference evaluator.  [default: verify]",
    ),
    click.option(
        "--strict",
        is_flag=True,
        default=None,
        help="Fail when a quantized layer gets no low-bit kernel, or none in an export.",
    ),
    click.option("--seed", type=int, help="Seed of the comparison's inputs.  [default: 0]"),
)
_ONNX = (
    click.option("--onnx/--no-onnx", default=None, help="Write the low-bit ONNX file.  [default: onnx]"),
)
_COMMON = (
    click.option(
        "-o",
        "--output",
        metavar="PREFIX",
        help="What the names of the files begin with; a folder takes MODEL's name.  [default: MODEL.SCHEME]",
    ),
    click.option("--config", "config_file", type=_PATH, help="Read options from a TOML file."),
    click.option("--save-config", type=_PATH, help="Write the options in effect to a TOML file."),
    click.option(
        "--dry-run", is_flag=True, help="Say what would be done and how large it is; write nothing."
    ),
    click.option("-v", "--verbose", is_flag=True, help="List every layer."),
)
_PASSES = (
    click.option("--dump", type=_PATH, metavar="DIR", help="Write the graph after every phase."),
    click.option("--explain", is_flag=True, help="Say what passes left alone or assumed, and why."),
)
_FIELDS = tuple(field.name for field in fields(CompileConfig))


def compile_options(artifact: bool) -> Decorator:
    """The options of `compile`, or without `artifact` those of `quantize`."""
    built = (*_ONNX, *_BUILD) if artifact else ()
    return _decorate([*_QUANTIZE, *built, *_CODE, *_EXPORT, *_THREADS, *_COMMON, *_PASSES])


def build_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `build`."""
    return _decorate([*_BUILD, *_CODE, *_EXPORT, *_THREADS, *_COMMON])(function)


def _decorate(options: list[Decorator]) -> Decorator:
    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed([*options, json_option, quiet_option, standard_options]):
            function = option(function)
        return function

    return apply


def make_config(options: dict[str, Any]) -> CompileConfig:
    """The config of a config file, if any, with the options of the command line over it."""
    config = CompileConfig()
    source = options["config_file"]
    if source is not None:
        try:
            config = config.with_options(load_toml(existing_file(source).read_text("utf-8"), str(source)))
        except UnicodeDecodeError as error:
            raise InputError(f"{source}: not a TOML file: {error}") from error
    return config.with_options({k: options[k] for k in _FIELDS if options.get(k) not in (None, ())})


@contextlib.contextmanager
def saved_config(config: CompileConfig, model: Path, options: dict[str, Any]) -> Iterator[None]:
    """Writes the config that `--save-config` asks for when the block, which compiles `model`, has
    succeeded.

    Raises UsageError, before the block, for a dry run and where the file would replace the model or an
    output.
    """
    target = options["save_config"]
    if target is None:
        yield
        return
    from qgraph.atomic import atomic_write
    from qgraph.pipeline import output_files

    if options["dry_run"]:
        raise UsageError("--save-config writes a file and --dry-run writes none: give one of them")
    outputs = [file for name in (config.scheme, "") for file in output_files(model, name, options["output"])]
    refuse_overwrite("--save-config", target, [model, *config.files(), *outputs])
    with atomic_write(target) as temporary:
        temporary.write_text(dump_toml(config), "utf-8")
        yield


def show(report: CompileReport, options: dict[str, Any]) -> None:
    """Print the report as JSON or as a table, and where the files are."""
    if options["as_json"]:
        print_json(report.to_json())
        return
    if options["verbose"]:
        print(
            table(
                _layer_rows(report),
                ("layer", "rows", "columns", "scheme", "bits", "SQNR dB", "output %", "kernel", "kept"),
                (1, 2, 4, 5, 6),
            )
        )
        print()
    if options.get("explain"):
        print("\n".join(table([(line,)]) for line in report.decisions) or "no pass left anything alone")
        print()
    print(table(summary(report)))
    if options["dry_run"]:
        print("nothing written: --dry-run")
    else:
        print(table([("wrote", path) for path in report.files.values()]))


def _layer_rows(report: CompileReport) -> list[tuple[object, ...]]:
    return [
        (
            layer.name, *layer.shape, layer.scheme or "float32", f"{layer.bits_per_weight:.3f}",
            "" if layer.sqnr_db is None else f"{layer.sqnr_db:.2f}",
            "" if layer.output_error is None else f"{100 * layer.output_error:.2g}", layer.kernel, layer.kept,
        )
        for layer in report.layers
    ]  # fmt: skip
