"""`compile()`, read top to bottom: the only place that wires the stages.

    load, prepare, quantize -> low-bit ONNX -> load, prepare, kernels -> artifact -> verify -> report

The artifact is always built from the low-bit file as written, so that `build()` of that file gives the same
bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from qgraph import __version__
from qgraph.config import FROM_PYTHON, CompileConfig
from qgraph.errors import BudgetError, InputError, UnsupportedError, UsageError
from qgraph.export import EXPORTS, require_cpu
from qgraph.progress import Progress
from qgraph.report import CompileReport, ExportReport, layers_of

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from qgraph.calibration import Data
    from qgraph.codegen.targets import Target
    from qgraph.evaluate.verify import Verification
    from qgraph.export import Context
    from qgraph.formats.activations import Rounding
    from qgraph.passes import Refusal
    from qgraph.passes.base import GraphPass
    from qgraph.passes.linear_groups import Calibrator
    from qgraph.runtime import Model

Calibration: TypeAlias = "str | os.PathLike[str] | Iterable[Mapping[str, np.ndarray]] | None"

# Of layers whose weight is an embedding, too, by what activations are rounded to; docs/decoders.md has the
# figures.
TIED_SCHEMES = {None: "int8", "int8": "int8-w8a8"}


@dataclass(frozen=True)
class CompileResult:
    """What was done, and the files that were written (None for those that were not); `exports` by engine."""

    report: CompileReport
    onnx: Path | None = None
    artifact: Path | None = None
    library: Path | None = None
    header: Path | None = None
    exports: Mapping[str, Path] = field(default_factory=dict)

    def load(self, threads: int = 0) -> Model:
        """The artifact, loaded. Raises UsageError when none was written."""
        from qgraph.runtime import load

        if self.artifact is None:
            raise UsageError("no artifact was written")
        return load(self.artifact, threads=threads)


def compile(
    model: str | os.PathLike[str],
    config: CompileConfig | None = None,
    *,
    calibration: Calibration = None,
    output: str | os.PathLike[str] | None = None,
    dump: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> CompileResult:
    """Compile the ONNX file `model` to a low-bit ONNX file, an artifact and a report.

    Args:
        model: path of the float model.
        config: how; `options` are fields of CompileConfig that replace its own.
        calibration: data to calibrate on: a file (as the config's field), or an iterable of feeds, each a
            mapping of input names to arrays.
        output: what is written is `<output>.onnx`, `.qg` and `.report.json`; with `format` `static-lib`, in
            place of `.qg`, `lib<output>.a` and `<output>.h` (characters that C has no use for are `_`). A
            folder takes the model's name; the default is beside the model: `model.nvfp4.*`.
        dump: a folder for the graph after every phase of `prepare`.
        dry_run: decide, quantize and plan, but compile no kernel and write nothing.
        progress: hears of every phase.

    Raises:
        UsageError, InputError, UnsupportedError, ResourceError: see the stages.
        BudgetError: the artifact disagrees with the low-bit model, or (`strict`) a layer got no low-bit
            kernel.

    On any error, what an earlier run wrote is as it was.
    """
    config, source = _config(config, options, calibration), _path("model", model)
    with _Run(source, config, output, dry_run, progress, (".onnx", *_BUILT[config.format])) as run:
        _check_tools(run)
        lowbit = _quantize(run, calibration, dump)
        _build(run, run.staged(".onnx"))
        if config.onnx_style != "function":
            _restyle(run, lowbit)
        _verify(run, run.staged(".onnx"))
        _export(run, run.staged(".onnx"))
        _make_library(run)
        if not config.onnx:
            run.drop(".onnx")
        return run.finish()


def quantize(
    model: str | os.PathLike[str],
    config: CompileConfig | None = None,
    *,
    calibration: Calibration = None,
    output: str | os.PathLike[str] | None = None,
    dump: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> CompileResult:
    """The first half of `compile`: `<output>.onnx` and `<output>.report.json`. Arguments and errors as
    there."""
    config, source = _config(config, options, calibration), _path("model", model)
    with _Run(source, config, output, dry_run, progress, suffixes=(".onnx",)) as run:
        lowbit = _quantize(run, calibration, dump)
        if config.onnx_style != "function":
            _restyle(run, lowbit)
        _export(run, run.staged(".onnx"))
        return run.finish()


def build(
    lowbit: str | os.PathLike[str],
    config: CompileConfig | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> CompileResult:
    """The second half of `compile`: a low-bit or float ONNX file to an artifact and `<output>.report.json`.

    Arguments and errors as there; of the config only what says how to build an artifact matters.
    """
    config, source = _config(config, options), _path("lowbit", lowbit)
    with _Run(source, config, output, dry_run, progress, suffixes=_BUILT[config.format]) as run:
        run.report.recall(_build(run, source))
        _verify(run, source)
        _export(run, source)
        _make_library(run)
        return run.finish()


# ---- stages ------------------------------------------------------------------------------------------------


def _check_tools(run: _Run) -> None:
    """What code generation will need, before hours of calibration."""
    from qgraph.codegen.cuda import toolkit
    from qgraph.codegen.targets import parse_target

    if parse_target(run.config.target).cuda and not run.dry_run:
        toolkit.find_compiler()


def _quantize(run: _Run, calibration: Calibration, dump: str | os.PathLike[str] | None) -> ir.Model:
    """Load, prepare and quantize the source; write the low-bit file to the staging folder. Returns the
    model."""
    from qgraph.export import require_form
    from qgraph.passes import load_model, prepare_model, run_passes
    from qgraph.passes.fuse_mean_shift import FuseMeanShift
    from qgraph.passes.lowbit_functions import AddLowbitFunctions
    from qgraph.passes.pipeline import PrepareOptions
    from qgraph.passes.quantize_cache import QuantizeCache
    from qgraph.passes.quantize_weights import QUANTIZED, QuantizeWeights, check_weights
    from qgraph.passes.select_layers import Override, SelectLayers
    from qgraph.schemes import get_scheme, require_use_of_packing

    config, report = run.config, run.report
    formats = [
        get_scheme(name).weight_format for name in (config.scheme, *(s for _, s, _ in config.overrides()))
    ]
    require_use_of_packing(config.packing, formats)
    for name in run.exports:
        require_form(name, list(dict.fromkeys(filter(None, formats))))
    with run.phase("load"):
        model = load_model(run.source)
        report.sizes["original"] = sum(file.stat().st_size for file in _files(run.source, model))
        report.model["sha256"] = _hash(_files(run.source, model))
    with run.phase("prepare"):
        refusals: list[Refusal] = []
        prepare_model(
            model, dump=None if dump is None else _path("dump", dump), refusals=refusals, on_pass=run.heard
        )
        already = [layer.name for layer in layers_of(model) if layer.scheme]
        if already:
            raise UsageError(f"{run.source}: node '{already[0]}' is quantized already: use `qgraph build`")
    data = _calibration_data(run, calibration, model)
    options = PrepareOptions(refusals=refusals)
    with run.phase("select"):
        scheme = get_scheme(config.scheme)
        overrides = [Override(*entry) for entry in config.overrides()]
        if scheme.weight_format is None:
            tied = scheme.name
        else:
            tied = TIED_SCHEMES.get(scheme.activation_format, "") if config.embeddings == "tied" else ""
        select = SelectLayers(config.include, config.exclude, config.embeddings, overrides, tied)
        run_passes(model, [select], options)
        if data is not None:
            check_weights(model)
    if transforms := _transforms(run, model, data):
        with run.phase("transform"):
            run_passes(model, transforms, options)
    with run.phase("quantize"):
        recipe = _recipe(config, data)
        quantize = QuantizeWeights(
            config.scheme,
            config.solver,
            calibrator=None if data is None else _calibrator(run, data, recipe),
            threads=config.threads or None,
            on_layer=run.stepped,
        )
        # Caches last: no layer's inputs are measured behind the rounding, which costs next to nothing.
        caches = [QuantizeCache()] if config.kv_cache == "int8" else []
        run_passes(model, [quantize, FuseMeanShift(), *caches, AddLowbitFunctions()], options)
        if data is not None:
            report.calibration = {
                "source": Path(data.name).name,
                "sha256": data.fingerprint(),
                "samples": data.samples,
                "tokens": max((weight.tokens for weight in model.meta[QUANTIZED]), default=0),
            }
        report.decisions += [str(refusal) for refusal in refusals]
        model.metadata_props.update(
            {
                "qgraph.version": __version__,
                "qgraph.scheme": config.scheme,
                "qgraph.config": json.dumps(recipe, sort_keys=True),
                "qgraph.model_sha256": report.model["sha256"],
            }
        )
    with run.phase("write"):
        report.sizes["lowbit_onnx"] = _save(model, run.staged(".onnx"))
    report.set_layers(layers_of(model))
    return model


def _calibration_data(run: _Run, calibration: Calibration, model: ir.Model) -> Data | None:
    """The data to calibrate on, None where there are none."""
    config = run.config
    if not config.calibration:
        return None
    from qgraph.calibration import model_inputs, open_data
    from qgraph.calibration.data import require_indices
    from qgraph.evaluate.samples import table_sizes

    source = calibration if config.calibration == FROM_PYTHON else config.calibration
    if source is None:
        raise UsageError(f"calibration '{FROM_PYTHON}': pass the data to `qgraph.compile` or `quantize`")
    with run.phase("data"):
        data = open_data(
            source,
            model_inputs(model),
            tokenizer=config.tokenizer or None,
            samples=config.samples or None,
            length=config.length or None,
        )
        require_indices(data, table_sizes(model))
    return data


def _transforms(run: _Run, model: ir.Model, data: Data | None) -> list[GraphPass]:
    """The passes that make the float model easier to quantize: the same function in other numbers."""
    from qgraph.passes.dual_scale import AbsorbDualScales
    from qgraph.passes.insert_mean_shift import InsertMeanShift
    from qgraph.passes.migrate_scales import MigrateScales
    from qgraph.passes.reorder_inputs import ReorderInputs
    from qgraph.passes.rotate_inputs import RotateInputs

    config, resolved = run.config, run.config.resolved()
    threads = config.threads or None
    passes: list[GraphPass] = []
    if config.smooth and data is not None:
        from qgraph.calibration import channel_amax

        passes.append(MigrateScales(channel_amax(model, data, threads=threads), config.smooth, insert=True))
    # Orders go first: a rotation makes parts of its own size of what could be ordered as a whole.
    if resolved["reorder"] != "off":
        passes.append(ReorderInputs(config.scheme, insert=resolved["reorder"] == "gather", threads=threads))
    if resolved["dual_scale"] == "on":
        passes.append(AbsorbDualScales(config.scheme, threads=threads))
    if config.rotate:
        passes.append(RotateInputs(config.rotate))
    if resolved["mean_shift"] != "off":
        passes.append(InsertMeanShift(resolved["mean_shift"]))
    return passes


def _calibrator(run: _Run, data: Data, recipe: dict[str, Any]) -> Calibrator:
    """Leads from layer to layer, and keeps a journal so that a run that was killed can go on."""
    from qgraph.calibration import Journal, StreamingCalibrator

    config = run.config
    journal = Journal({"model": run.report.model["sha256"], "recipe": recipe})
    calibrate_on = config.resolved()["calibrate_on"]
    return StreamingCalibrator(
        data,
        sequential=calibrate_on != "float",
        corrected=calibrate_on == "corrected",
        rounding=_rounding(config.scheme),
        journal=journal,
        threads=config.threads or None,
        on_records=lambda done, n: run.progress.note(
            f"{done} of {n} groups of layers were quantized by an earlier run ({journal.folder})"
        ),
    )


def _rounding(scheme: str) -> Callable[[np.ndarray, float], np.ndarray] | None:
    """What the inputs of quantized layers go through at run time: (x, largest |x| of all) -> x rounded."""
    from qgraph.formats.activations import dynamic_qdq
    from qgraph.formats.nvfp4 import global_scale
    from qgraph.schemes import get_scheme

    activations = get_scheme(scheme).activation_format
    if activations is None:
        return None
    return lambda x, amax: dynamic_qdq(x, activations, global_scale(amax))


def _recipe(config: CompileConfig, data: Data | None) -> dict[str, Any]:
    """All that decides the low-bit model besides the original: what an artifact records of how it was
    made."""
    return config.recipe() | ({} if data is None else {"calibration_sha256": data.fingerprint()})


def _restyle(run: _Run, model: ir.Model) -> None:
    """Write the low-bit file anew with the bodies of its functions in place. Changes `model`."""
    from qgraph.passes.lowbit_functions import InlineLowbitFunctions

    with run.phase("restyle"):
        InlineLowbitFunctions()(model)
        run.report.sizes["lowbit_onnx"] = _save(model, run.staged(".onnx"))


def _build(run: _Run, lowbit: Path) -> Mapping[str, str]:
    """Build the artifact of the low-bit file and write it to the staging folder. Returns its metadata."""
    from qgraph.codegen import build_artifact
    from qgraph.evaluate.samples import METADATA_KEY, input_ranges
    from qgraph.passes import load_model, prepare_model
    from qgraph.passes.lowbit_functions import rounding_nodes

    config, report = run.config, run.report
    with run.phase("import"):
        model = load_model(lowbit)
        inputs = _files(lowbit, model)
        report.sizes.setdefault("original", sum(file.stat().st_size for file in inputs))
        report.model.setdefault("sha256", _hash(inputs))
        refusals: list[Refusal] = []
        prepare_model(model, on_pass=run.heard, refusals=refusals)
        _require_recognized(lowbit, refusals)
        run.rounds_activations = bool(rounding_nodes(model))
        ranges = input_ranges(model)
        metadata = {
            "qgraph.version": __version__,
            "qgraph.scheme": "none",
            "qgraph.model_sha256": report.model["sha256"],
        }
        metadata |= {key: value for key, value in model.metadata_props.items() if key in _PROVENANCE}
        metadata[METADATA_KEY] = json.dumps(ranges, sort_keys=True)
    with run.phase("kernels"):
        if run.dry_run:
            report.sizes["artifact_weights"] = _plan_only(model, config)
            report.set_layers(layers_of(model))
            return metadata
        artifact = build_artifact(
            model,
            target=config.target,
            packing=config.packing,
            compute=config.compute,
            metadata=metadata,
            on_kernel=run.stepped,
        )
        realised = {x.node_name: (x.kernel, x.compute, x.nbytes) for x in artifact.layers}
        report.set_layers(layers_of(model, realised))
        report.isas = list(artifact.isas)
        _require_realised(run)
    with run.phase("package"):
        artifact.write(run.staged(".qg"))
        report.sizes["artifact"] = run.staged(".qg").stat().st_size
    return metadata


def _verify(run: _Run, lowbit: Path) -> None:
    """Run artifact and low-bit file on the same inputs and compare."""
    from qgraph.codegen.digits import FEW_ROWS
    from qgraph.codegen.targets import parse_target
    from qgraph.evaluate.verify import Verification, verify
    from qgraph.runtime.build import library

    config = run.config
    if run.dry_run:
        return
    if not config.verify:
        run.report.verification = Verification("skipped", "--no-verify")
        return
    wanted = parse_target(config.target)
    if wanted.cuda or wanted.runs_on(platform.machine()):
        with run.phase("runtime"):
            library()  # built by the first use on a machine
    devices, missing = _devices_here(wanted)
    if not devices:
        run.report.verification = Verification("skipped", missing)
        return
    for device in devices:
        with run.phase("verify"), tempfile.TemporaryDirectory(prefix="qgraph-") as folder:
            exposed: Path | None = None
            roundings: list[Rounding] = []
            if run.rounds_activations:
                exposed, roundings = build_exposed(
                    lowbit, config.target, Path(folder), config.packing, config.compute
                )
            try:
                found = verify(
                    run.staged(".qg"),
                    lowbit,
                    device=device,
                    exposed=exposed,
                    roundings=roundings,
                    compute=config.compute,
                    exact_rows=FEW_ROWS,
                    threads=config.threads,
                    seed=config.seed,
                    on_case=run.stepped,
                )
            except BudgetError as error:
                raise BudgetError(f"{device}: {error}; nothing was written") from error
        before = run.report.verification.comparisons if run.report.verification else ()
        run.report.verification = replace(
            found, reason=missing, devices=devices, comparisons=[*before, *found.comparisons]
        )


def _devices_here(wanted: Target) -> tuple[list[str], str]:
    """What of a target this machine has, and why the rest is missing."""
    from qgraph.runtime import device_problem

    found, missing = [], []
    if wanted.runs_on(platform.machine()):
        found.append("cpu")
    elif wanted.isas:
        missing.append(f"this machine does not run {wanted.cpu}")
    if wanted.cuda:
        problem = device_problem()
        if problem:
            missing.append(problem)
        else:
            found.append("cuda:0")
    return found, "; ".join(missing)


def _export(run: _Run, lowbit: Path) -> None:
    """Write the low-bit file for other engines to the staging folder."""
    from qgraph.export import Context, export_model

    config = run.config
    for name in run.exports:
        with run.phase(f"export {name}"):
            context = Context(config.target, config.packing, config.compute, on_node=run.stepped)
            model = export_model(name, lowbit, context)
            if run.config.strict and context.notes:
                raise BudgetError(f"export '{name}' leaves a layer in float: {context.notes[0]} (--strict)")
            written = run.staged(EXPORTS[name].suffix)
            nbytes = _save(model, written)
        found = _verify_export(run, name, written, lowbit, context)
        notes = [(note.node, note.reason) for note in context.notes]
        run.report.exports.append(ExportReport(name, nbytes, len(context.done), notes, found))


def _verify_export(
    run: _Run, name: str, written: Path, lowbit: Path, context: Context
) -> Verification | None:
    """Run what was exported beside the low-bit file, where this machine can."""
    from qgraph.codegen.targets import parse_target
    from qgraph.evaluate.verify import Verification
    from qgraph.export.verify import verify_export

    if run.dry_run or not EXPORTS[name].runs:
        return None
    if not run.config.verify:
        return Verification("skipped", "--no-verify")
    wanted = parse_target(context.target)
    if EXPORTS[name].compiled and not wanted.runs_on(platform.machine()):
        return Verification("skipped", f"this machine does not run {wanted.cpu}")
    with run.phase(f"verify {name}"):
        return verify_export(
            name,
            written,
            lowbit,
            context,
            threads=run.config.threads,
            seed=run.config.seed,
            on_case=run.stepped,
        )


def _make_library(run: _Run) -> None:
    """Format `static-lib`: a library in place of the artifact, once that is verified."""
    if run.config.format != "static-lib" or run.dry_run:
        return
    from qgraph.codegen.static_library import write_library

    with run.phase("library"):
        artifact, library, header = (run.staged(suffix) for suffix in (".qg", ".a", ".h"))
        write_library(artifact, run.library_name, library, header)
        artifact.unlink()
        del run.report.sizes["artifact"]
        run.report.sizes["library"] = library.stat().st_size


def build_exposed(
    lowbit: Path, target: str, folder: Path, packing: str = "fast", compute: str = "f32"
) -> tuple[Path | None, list[Rounding]]:
    """An artifact of the low-bit file that shows its roundings of activations, in `folder`, and these; None
    without any. For `evaluate.verify`."""
    from qgraph.codegen import build_artifact
    from qgraph.passes import load_model, prepare_model
    from qgraph.passes.expose_roundings import expose_roundings

    model = prepare_model(load_model(lowbit))
    roundings = expose_roundings(model)
    if not roundings:
        return None, []
    path = folder / "exposed.qg"
    build_artifact(model, target=target, packing=packing, compute=compute, metadata={}).write(path)
    return path, roundings


# ---- what the stages share ---------------------------------------------------------------------------------

# What is written besides the low-bit file and the report, by the config's `format`; what counts comes last.
_BUILT = {"qg": (".qg",), "static-lib": (".h", ".a")}
_KINDS = {".onnx": "onnx", ".qg": "artifact", ".a": "library", ".h": "header", ".report.json": "report"}
_PROVENANCE = ("qgraph.version", "qgraph.scheme", "qgraph.config", "qgraph.model_sha256")


class _Run:
    """One call: its report, its timing, and a staging folder whose files appear under their names all at
    once.

    `suffixes`: what is written besides the report; the last is what counts and is renamed last.
    """

    def __init__(
        self,
        source: Path,
        config: CompileConfig,
        output: str | os.PathLike[str] | None,
        dry_run: bool,
        progress: Progress | None,
        suffixes: tuple[str, ...],
    ) -> None:
        if not source.exists():
            raise InputError(f"{source}: no such file")
        if ".a" in suffixes:
            from qgraph.codegen.static_library import require_target

            require_target(config.target)
        elif ".qg" in suffixes:
            from qgraph.codegen.targets import require_loadable

            require_loadable(config.target)
        self.exports = tuple(dict.fromkeys(config.export))
        for name in self.exports:
            require_cpu(name, config.target)
        self.source, self.config, self.dry_run = source, config, dry_run
        self.suffixes = (*(EXPORTS[name].suffix for name in self.exports), *suffixes)
        self.prefix = _prefix(source, config.scheme if ".onnx" in suffixes else "", output)
        inputs = {file.resolve() for file in (source, *config.files())}
        for suffix in (*self.suffixes, ".report.json"):
            if self.final(suffix).resolve() in inputs:
                raise UsageError(f"the output {self.final(suffix)} is an input: give another -o")
        self.progress = progress or Progress()
        self.report = CompileReport(__version__, {"name": source.name}, config.resolved())
        self._stack = contextlib.ExitStack()
        self._folder = Path()
        self._heard = 0
        self.rounds_activations = False  # whether the low-bit file does: known once it is imported

    def __enter__(self) -> _Run:
        from qgraph.atomic import atomic_directory

        if self.dry_run:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="qgraph-")))
        else:
            self._folder = self._stack.enter_context(atomic_directory(self.final(self.suffixes[-1])))
        self._stack.enter_context(self.progress)
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    @property
    def library_name(self) -> str:
        """Of the static library."""
        from qgraph.codegen.static_library import library_name

        return library_name(self.prefix.name)

    def final(self, suffix: str) -> Path:
        """Where the file with this ending goes."""
        if suffix in (".a", ".h"):
            start = "lib" if suffix == ".a" else ""
            return self.prefix.with_name(f"{start}{self.library_name}{suffix}")
        return self.prefix.with_name(self.prefix.name + suffix)

    def staged(self, suffix: str) -> Path:
        """Where it is until then."""
        return self._folder / self.final(suffix).name

    def drop(self, suffix: str) -> None:
        """Do not write this file after all."""
        for name in (suffix, f"{suffix}.data"):
            self.staged(name).unlink(missing_ok=True)
        self.suffixes = tuple(kept for kept in self.suffixes if kept != suffix)
        self.report.sizes.pop("lowbit_onnx", None)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announces and times a phase."""
        self.progress.phase(name)
        self._heard, start = 0, time.monotonic()
        yield
        seconds = self.report.seconds
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start

    def heard(self, what: str) -> None:
        """A step of a phase that cannot say how many there are."""
        self._heard += 1
        self.progress.step(self._heard, 0, what)

    def stepped(self, done: int, total: int, what: str) -> None:
        """`done` of `total` steps of the phase are over."""
        self.progress.step(done, total, what)

    def finish(self) -> CompileResult:
        """Write the report to the staging folder, and say what there will be."""
        if self.dry_run:
            return CompileResult(self.report)
        built = [suffix for suffix in self.suffixes if suffix in _KINDS]
        exports = {name: self.final(EXPORTS[name].suffix) for name in self.exports}
        self.report.files = {_KINDS[s]: str(self.final(s)) for s in (*built, ".report.json")}
        self.report.files |= {name: str(path) for name, path in exports.items()}
        self.staged(".report.json").write_text(json.dumps(self.report.to_json(), indent=1) + "\n")
        return CompileResult(self.report, exports=exports, **{_KINDS[s]: self.final(s) for s in built})


def _config(
    config: CompileConfig | None, options: dict[str, Any], calibration: Calibration = None
) -> CompileConfig:
    if not isinstance(config, CompileConfig | None):
        raise UsageError(f"config: expected a CompileConfig, got a {type(config).__name__}")
    if isinstance(calibration, str | os.PathLike):
        options = {**options, "calibration": os.fspath(calibration)}
    elif calibration is not None:
        options = {**options, "calibration": FROM_PYTHON}
    return (config or CompileConfig()).with_options(options)


def _path(name: str, value: Any) -> Path:
    """UsageError for a value that cannot be a path."""
    try:
        path = Path(value)
    except TypeError:
        raise UsageError(f"{name}: expected a path, got a {type(value).__name__}") from None
    if "\0" in str(path):
        raise UsageError(f"{name}: a path cannot hold the character NUL: {str(path)!r}")
    return path


def output_files(source: Path, scheme: str, output: str | os.PathLike[str] | None) -> list[Path]:
    """All that a run may write; `scheme` is part of the default name, and empty for `build`."""
    from qgraph.codegen.static_library import library_name

    prefix = _prefix(source, scheme, output)
    name = library_name(prefix.name)
    models = (".onnx", *(export.suffix for export in EXPORTS.values()))
    endings = (*models, *(f"{model}.data" for model in models), ".qg", ".report.json")
    names = [*(prefix.name + end for end in endings), f"lib{name}.a", f"{name}.h"]
    return [prefix.with_name(name) for name in names]


def _prefix(source: Path, scheme: str, output: str | os.PathLike[str] | None) -> Path:
    """What the names of all outputs begin with."""
    name = source.name.removesuffix(".onnx") + (f".{scheme}" if scheme else "")
    if output is None:
        return source.with_name(name)
    _path("output", output)
    text = os.fspath(output)
    if text.endswith(os.sep) or Path(text).is_dir():
        return Path(text) / name
    for suffix in (".qg", ".onnx"):
        text = text.removesuffix(suffix)
    return Path(text)


def _save(model: ir.Model, path: Path) -> int:
    """Write an ONNX file, with external data when it is large. Returns the bytes written."""
    from qgraph.passes.save import save_lowbit

    return sum(file.stat().st_size for file in save_lowbit(model, path))


def _files(path: Path, model: ir.Model) -> list[Path]:
    """The file of a loaded model and those of its external data, in the order of their names."""
    import onnx_ir as ir

    tensors = [value.const_value for value in model.graph.initializers.values()]
    return [path, *sorted({Path(t.path) for t in tensors if isinstance(t, ir.ExternalTensor)})]


def _hash(files: list[Path]) -> str:
    """SHA-256 of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _require_recognized(path: Path, refusals: list[Refusal]) -> None:
    """UnsupportedError for a 4-bit weight that would be computed in float32 because no kernel reads it as it
    is."""
    for refusal in refusals:
        if refusal.pass_name == "RecognizeLowbit":
            raise UnsupportedError(f"{path}: {refusal.node} would run in float32: {refusal.reason}")


def _require_realised(run: _Run) -> None:
    """`strict`: BudgetError for a layer that is stored in a low-bit format and not computed from it."""
    if not run.config.strict:
        return
    for layer in run.report.quantized:
        if not layer.realised:
            found = f"kernel {layer.kernel}" if layer.kernel else "no kernel of its own"
            raise BudgetError(
                f"layer '{layer.name}' was quantized to {layer.scheme} but got {found} (--strict)"
            )


def _plan_only(model: ir.Model, config: CompileConfig) -> int:
    """Bytes of the weights that an artifact of `model` would hold. Raises UnsupportedError as
    `build_artifact` does."""
    from qgraph.codegen.lowering import lower
    from qgraph.codegen.plan import make_plan

    return sum(
        weight.data.nbytes
        for weight in make_plan(lower(model.graph, config.packing, config.compute), []).weights
    )
