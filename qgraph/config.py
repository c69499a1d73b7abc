"""`CompileConfig`: what the command line, a TOML file and Python all produce, checked in one place."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qgraph.errors import InputError, UsageError
from qgraph.export import EXPORTS
from qgraph.schemes import COMPUTES, PACKINGS, SCHEMES, Scheme, get_scheme

ONNX_STYLES = ("function", "qdq")
EMBEDDINGS = ("float", "tied", "nvfp4")
KV_CACHE = ("float", "int8")
FORMATS = ("qg", "static-lib")
CALIBRATE_ON = ("float", "quantized", "corrected")
ROTATE = (0, 16, 32, 64, 128)
REORDER = ("off", "fold", "gather")
DUAL_SCALE = ("off", "on")
MEAN_SHIFT = ("off", "attention", "all")
FROM_PYTHON = "<from Python>"  # as `calibration`: the data are an argument of `compile`
MAX_THREADS = 1024


@dataclass(frozen=True)
class CompileConfig:
    """How to compile a model.

    Attributes:
        scheme: a name of `qgraph.schemes.SCHEMES`.
        solver: how the scheme's codes and scales are chosen; empty is the scheme's default.
        embeddings: how tables that rows are looked up in are stored. `float`: all, and layers tied to one, as
            they are. `tied`: such a table once, with its layer, in int8 (in `scheme`, where that rounds
            activations to NVFP4) or what `layers` says; others in float. `nvfp4`: a tied table with its layer
            in `scheme`, all others in NVFP4.
        kv_cache: how the keys and values of a decoder's cache are stored: `float` or `int8`, with a scale for
            every token and head.
        include: patterns (shell wildcards) of the layers to quantize; empty is all that suit.
        exclude: patterns of the layers to leave in float; stronger than `include`.
        layers: `PATTERN=SCHEME` or `PATTERN=SCHEME:SOLVER`, the scheme of the layers that match, in place of
            `scheme`; the last that matches counts. It rounds activations as `scheme` does, or is `none`.
        calibration: file with data to calibrate on: `.npz`, `.txt` or `.jsonl`; empty is none.
        tokenizer: `tokenizer.json` for text.
        samples: at most so many of the data are used; 0 is 128 windows of a text, else 512.
        length: tokens a sample: text is cut into windows of so many; 0 takes its lines as they are.
        calibrate_on: what a layer's inputs are measured in: the `float` model; the model whose earlier layers
            are `quantized` already; or that, with weights `corrected` for what the earlier layers did. Empty
            is `corrected` with a solver that goes by a layer's inputs; else `quantized` with `mean_shift`, or
            `float`.
        smooth: strength, 0 to 1, of the migration of scales from activations to weights; 0 is none.
        rotate: size of the blocks in which inputs and weights are rotated by Hadamard matrices; 0 is none.
        reorder: `fold` orders inputs so that those which suit each other share a block (PT2-LLM's SSR), where
            the layers around can take the order on; `gather` also elsewhere, by an operator; `off`. Empty is
            the scheme's default.
        dual_scale: `on` evens out the rows of weights by scales that the layers before absorb (D2Quant's
            DSQ); `off`. Empty is the scheme's default.
        mean_shift: where the mean that quantization has moved is put right (D2Quant's DAC): `attention`
            (behind norms after an attention), `all` norms, `off`. Empty is the scheme's default if there are
            calibration data.
        packing: how the artifact holds ternary weights: `fast` to decode, 2 bits each, or `small`, 1.625.
        compute: what products of more than 8 rows (a prompt, a batch) with low-bit weights round float
            activations to: `f32` not at all, `bf16` (NVFP4 on AMX only), `int16` or `int8` by the block of a
            weight scale.
        onnx_style: `function` writes a quantized layer as one node with a standard body, `qdq` writes the
            body in place.
        onnx: whether the low-bit ONNX file is written.
        export: other engines that the low-bit model is written for, too: names of `qgraph.export.EXPORTS`.
        target: the machines the artifact is for, as `qgraph.codegen.targets.parse_target` takes them.
        format: what the artifact is written as: `qg`, a file to load, or `static-lib`, a library and a header
            to link into a program.
        verify: whether the artifact, and what was exported, is run and compared with ONNX's reference
            evaluator on the low-bit model.
        strict: whether a layer that was chosen but did not get a low-bit kernel, or that an export leaves in
            float, is an error.
        threads: of calibration, solvers and verification, at most 1024; 0 is one a core. Results do not
            depend on it.
        seed: of the verification's inputs.

    Raises UsageError, naming the field, when a value is not one of those.
    """

    scheme: str = "nvfp4"
    solver: str = ""
    embeddings: str = "tied"
    kv_cache: str = "float"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    calibration: str = ""
    tokenizer: str = ""
    samples: int = 0
    length: int = 0
    calibrate_on: str = ""
    smooth: float = 0.0
    rotate: int = 0
    reorder: str = ""
    dual_scale: str = ""
    mean_shift: str = ""
    packing: str = "fast"
    compute: str = "f32"
    onnx_style: str = "function"
    onnx: bool = True
    export: tuple[str, ...] = ()
    target: str = "x86_64-linux"
    format: str = "qg"
    verify: bool = True
    strict: bool = False
    threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, default = getattr(self, field.name), field.default
            if isinstance(default, tuple):
                if isinstance(value, str) or not all(
                    isinstance(item, str) and item for item in _items(value)
                ):
                    raise UsageError(f"{field.name}: expected a list of patterns, got {value!r}")
                object.__setattr__(self, field.name, tuple(value))
            elif isinstance(default, float) and type(value) is int:
                object.__setattr__(self, field.name, float(value))
            elif type(value) is not type(default):
                raise UsageError(f"{field.name}: expected {type(default).__name__}, got {value!r}")
        from qgraph.codegen.targets import NAMES, parse_target

        scheme = get_scheme(self.scheme)
        if self.solver and not scheme.solvers:
            raise UsageError(f"scheme '{scheme.name}' quantizes nothing and takes no solver")
        if self.solver:
            _one_of("solver", self.solver, scheme.solvers)
        schemes = [scheme, *self._check_layers(scheme)]
        self._check_transforms(schemes)
        self._check_calibration(schemes)
        _one_of("embeddings", self.embeddings, EMBEDDINGS)
        if self.embeddings == "nvfp4" and scheme.weight_format is None:
            raise UsageError(
                f"embeddings '{self.embeddings}': scheme '{scheme.name}' quantizes nothing, not even tables"
            )
        _one_of("kv_cache", self.kv_cache, KV_CACHE)
        _one_of("onnx_style", self.onnx_style, ONNX_STYLES)
        for name in self.export:
            _one_of("export", name, EXPORTS)
        _one_of("packing", self.packing, PACKINGS)
        _one_of("compute", self.compute, COMPUTES)
        for part in self.target.split(","):
            _one_of("target", part.strip(), NAMES)
        parse_target(self.target)
        _one_of("format", self.format, FORMATS)
        self._check_compute(schemes)
        for name in ("threads", "seed", "samples", "length"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}: must not be negative, got {getattr(self, name)}")
        if self.threads > MAX_THREADS:
            raise UsageError(f"threads: must be at most {MAX_THREADS}, got {self.threads}")

    def overrides(self) -> list[tuple[str, str, str]]:
        """`layers` as (pattern, scheme, solver); the solver is empty where none is given."""
        found = []
        for entry in self.layers:
            pattern, equals, recipe = entry.rpartition("=")
            scheme, _, solver = recipe.partition(":")
            if not (equals and pattern and scheme):
                raise UsageError(f"layers: expected PATTERN=SCHEME or PATTERN=SCHEME:SOLVER, got '{entry}'")
            found.append((pattern, scheme, solver))
        return found

    def _check_layers(self, scheme: Scheme) -> list[Scheme]:
        """The schemes of `layers`, each of which `scheme` can stand beside."""
        schemes = []
        for pattern, name, solver in self.overrides():
            own = get_scheme(name)
            if solver and not own.solvers:
                raise UsageError(
                    f"layers: scheme '{name}' of '{pattern}' quantizes nothing and takes no solver"
                )
            if solver:
                _one_of("solver", solver, own.solvers)
            if own.weight_format is not None and own.activation_format != scheme.activation_format:
                raise UsageError(
                    f"layers: scheme '{name}' of '{pattern}' does not round activations as scheme "
                    f"'{scheme.name}' does"
                )
            schemes.append(own)
        return schemes

    def solvers(self) -> list[str]:
        """The solvers of all linear layers, that of `scheme` first; defaults resolved."""
        from qgraph.solvers import default_solver

        recipes = [(self.scheme, self.solver), *((scheme, solver) for _, scheme, solver in self.overrides())]
        calibrated = bool(self.calibration)
        return [
            solver or default_solver(get_scheme(scheme).solvers, calibrated) for scheme, solver in recipes
        ]

    def _check_compute(self, schemes: list[Scheme]) -> None:
        from qgraph.codegen.targets import parse_target

        if self.compute == "f32":
            return
        if schemes[0].activation_format is not None:
            raise UsageError(
                f"compute '{self.compute}' is for float activations, and scheme '{schemes[0].name}' rounds "
                "them itself"
            )
        here = {"f32"} | parse_target(self.target).computes
        if self.compute not in here:
            choices = " or ".join(compute for compute in COMPUTES if compute in here)
            raise UsageError(
                f"compute '{self.compute}': {self.target} has no kernels for it; choose {choices}"
            )

    def _check_transforms(self, schemes: list[Scheme]) -> None:
        """`smooth`, `rotate`, `reorder`, `dual_scale` and `mean_shift`; not whether they have data."""
        from qgraph.solvers import GROUP_NAMES

        if self.rotate not in ROTATE:
            raise UsageError(f"rotate: choose from {', '.join(map(str, ROTATE))}, got {self.rotate}")
        choices = {"reorder": REORDER, "dual_scale": DUAL_SCALE, "mean_shift": MEAN_SHIFT}
        for name, known in choices.items():
            if getattr(self, name):
                _one_of(name, getattr(self, name), known)
        if self.mean_shift not in ("", "off") and self.calibrate_on == "float":
            raise UsageError(
                "mean_shift is measured behind layers that are quantized already: it needs calibrate_on "
                "'quantized' or 'corrected'"
            )
        if not 0 <= self.smooth <= 1:
            raise UsageError(f"smooth: must be from 0 to 1, got {self.smooth:g}")
        if all(scheme.weight_format is None for scheme in schemes):
            for name in ("smooth", "rotate", "reorder", "dual_scale", "mean_shift"):
                if getattr(self, name) not in (0, "", "off"):
                    raise UsageError(f"scheme '{schemes[0].name}' quantizes nothing and takes no {name}")
        if self.dual_scale == "on" and not any(scheme.weight_format in GROUP_NAMES for scheme in schemes):
            suitable = [name for name, scheme in SCHEMES.items() if scheme.weight_format in GROUP_NAMES]
            names = " and ".join(sorted({f"'{scheme.name}'" for scheme in schemes}))
            raise UsageError(f"dual_scale 'on' is for the schemes {', '.join(suitable)}, not {names}")

    def _check_calibration(self, schemes: list[Scheme]) -> None:
        from qgraph.solvers import get_solver

        scheme, *_ = schemes
        needy = [name for name in self.solvers() if name and get_solver(name).calibrated]
        if self.calibrate_on:
            _one_of("calibrate_on", self.calibrate_on, CALIBRATE_ON)
        for name in ("calibration", "tokenizer"):
            if "\0" in getattr(self, name):
                raise UsageError(f"{name}: a path cannot hold the character NUL: {getattr(self, name)!r}")
        if self.calibration:
            if all(scheme.weight_format is None for scheme in schemes):
                raise UsageError(f"scheme '{scheme.name}' quantizes nothing and takes no calibration data")
            if self.calibrate_on == "corrected" and not needy:
                raise UsageError(
                    f"calibrate_on 'corrected' needs a solver that goes by the inputs of a layer, not "
                    f"'{self.solvers()[0]}'"
                )
            return
        data = "calibration data: give --calibration FILE"
        if scheme.needs_calibration:
            raise UsageError(f"scheme '{scheme.name}' needs {data}")
        if needy:
            raise UsageError(f"solver '{needy[0]}' needs {data}")
        for name in ("smooth", "mean_shift"):
            if getattr(self, name) not in (0, "", "off"):
                raise UsageError(f"{name} needs {data}")
        for name in ("tokenizer", "samples", "length", "calibrate_on"):
            if getattr(self, name):
                raise UsageError(f"{name} is for {data}")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> CompileConfig:
        """A config of these fields, the rest default. Raises UsageError for a key that is no field."""
        known = [field.name for field in fields(cls)]
        for key in options:
            if key not in known:
                raise UsageError(f"unknown option '{key}'{did_you_mean(key, known)}")
        return cls(**options)

    def with_options(self, options: Mapping[str, Any]) -> CompileConfig:
        """A copy with `options` in place of the same fields."""
        return self.from_options({**asdict(self), **options})

    def resolved(self) -> dict[str, Any]:
        """All fields, with what empty ones stand for: the scheme's first solver that has what it needs, and
        how that is calibrated best."""
        from qgraph.solvers import get_solver

        scheme, solvers = get_scheme(self.scheme), self.solvers()
        found = {**asdict(self), "solver": solvers[0]}
        found["reorder"] = self.reorder or scheme.reorder
        found["dual_scale"] = self.dual_scale or scheme.dual_scale
        if not self.mean_shift:
            measured = self.calibration and self.calibrate_on != "float"
            found["mean_shift"] = scheme.mean_shift if measured else "off"
        if self.calibration and not self.calibrate_on:
            calibrated = any(name and get_solver(name).calibrated for name in solvers)
            sequential = "quantized" if found["mean_shift"] != "off" else "float"
            found["calibrate_on"] = "corrected" if calibrated else sequential
        return found

    def files(self) -> list[Path]:
        """The files that it names, for reading."""
        named = (self.calibration if self.calibration != FROM_PYTHON else "", self.tokenizer)
        return [Path(name) for name in named if name]

    def recipe(self) -> dict[str, Any]:
        """The fields that decide the low-bit model: what an artifact records of how it was made."""
        decisive = [
            "scheme",
            "solver",
            "embeddings",
            "kv_cache",
            "include",
            "exclude",
            "layers",
            "rotate",
            "reorder",
            "dual_scale",
        ]
        if self.calibration:
            decisive += ["samples", "length", "calibrate_on", "smooth", "mean_shift"]
        resolved = self.resolved()
        return {key: resolved[key] for key in decisive}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`: did you mean 'x'?`, or the list of what is known when nothing is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f": did you mean '{near[0]}'?" if near else f": choose from {', '.join(known)}"


def _one_of(field: str, value: str, known: Iterable[str]) -> None:
    known = list(known)
    if value not in known:
        raise UsageError(f"unknown {field} '{value}'{did_you_mean(value, known)}")


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [None]


def load_toml(text: str, name: str) -> dict[str, Any]:
    """The options in TOML `text`; `name` is the file it came from. Raises InputError when it is not TOML."""
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{name}: not a TOML file: {error}") from error


def dump_toml(config: CompileConfig) -> str:
    """The config as TOML, every field written out."""

    # For the types of our fields JSON's notation is TOML's, but for DEL, which TOML wants escaped.
    def value(item: Any) -> str:
        return json.dumps(item, ensure_ascii=False).replace("\x7f", "\\u007f")

    return "".join(f"{key} = {value(item)}\n" for key, item in asdict(config).items())
