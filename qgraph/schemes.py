"""The table of schemes: what `--scheme` takes. Data only; what depends on a scheme reads it here."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from difflib import get_close_matches

from qgraph.errors import UsageError

PACKINGS = ("fast", "small")  # how an artifact holds ternary weights: 2 bits each, or 1.625
COMPUTES = ("f32", "bf16", "int16", "int8")  # what products of many rows round float activations to


@dataclass(frozen=True)
class Scheme:
    """How a model's linear layers are stored and computed.

    Attributes:
        name: what the user types.
        summary: one line for `qgraph schemes`.
        weight_format: a key of `qgraph.formats.FORMATS`; None leaves the weights in float32.
        activation_format: what the inputs of the quantized layers are rounded to at run time: `nvfp4` (block
            scales at run time, a calibrated global one), `int8` (a scale a token), None for float32.
        bits_per_weight: nominal, all scales counted, for large layers.
        reorder, dual_scale, mean_shift: the defaults of these options of `CompileConfig`, the last if there
            are calibration data.
        solvers: names of `qgraph.solvers.SOLVERS` that can choose codes and scales, best first; empty where
            nothing is quantized. The default is the first that has what it needs.
    """

    name: str
    summary: str
    weight_format: str | None
    activation_format: str | None
    bits_per_weight: float
    solvers: tuple[str, ...] = ()
    reorder: str = "off"
    dual_scale: str = "off"
    mean_shift: str = "off"

    def __post_init__(self) -> None:
        if (self.weight_format is None) != (not self.solvers):
            raise ValueError(
                f"scheme {self.name}: solvers are for schemes that quantize weights, and only those"
            )

    @property
    def needs_calibration(self) -> bool:
        """Whether it takes calibration data, whatever the solver: for the global scale of the activations."""
        return self.activation_format == "nvfp4"


_NVFP4_SOLVERS = ("gptq", "sweep-diagonal", "sweep", "soar", "four-over-six", "rtn")
_GROUP_SOLVERS = ("gptq", "itf", "rtn")


def _integers(name: str, bits_per_weight: float, summary: str, **defaults: str) -> Scheme:
    return Scheme(name, summary, name, None, bits_per_weight, _GROUP_SOLVERS, **defaults)


def _with_int8(base: Scheme, name: str) -> Scheme:
    """The weights of a scheme behind int8 activations."""
    summary = f"the weights of {base.name}, activations rounded to int8 with a scale for every token"
    return replace(base, name=name, summary=summary, activation_format="int8")


_TERNARY = Scheme(
    name="ternary",
    summary="-1, 0 and 1 with a float16 scale and mean every 128 (PT2-LLM), float activations",
    weight_format="ternary",
    activation_format=None,
    bits_per_weight=2.25,
    solvers=("gptq", "pt2-llm", "itf", "rtn"),
    reorder="fold",
)
_INT4 = _integers("int4", 4.625, "4-bit integers with a float16 scale and a zero point every 32")
_INT8 = _integers("int8", 8.125, "8-bit integers with a float16 scale every 128, symmetric")

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            name="none",
            summary="float32 as it is: nothing is quantized",
            weight_format=None,
            activation_format=None,
            bits_per_weight=32.0,
        ),
        Scheme(
            name="nvfp4",
            summary="NVFP4 weights (4-bit E2M1, an E4M3 scale every 16, one float32), float activations",
            weight_format="nvfp4",
            activation_format=None,
            bits_per_weight=4.5,
            solvers=_NVFP4_SOLVERS,
        ),
        Scheme(
            name="nvfp4-w4a8",
            summary="NVFP4 weights, activations rounded to int8 with a scale for every token",
            weight_format="nvfp4",
            activation_format="int8",
            bits_per_weight=4.5,
            solvers=_NVFP4_SOLVERS,
        ),
        Scheme(
            name="nvfp4-w4a4",
            summary="NVFP4 weights and activations, the latter with block scales chosen at run time",
            weight_format="nvfp4",
            activation_format="nvfp4",
            bits_per_weight=4.5,
            solvers=_NVFP4_SOLVERS,
        ),
        _TERNARY,
        _with_int8(_TERNARY, "ternary-w2a8"),
        _integers(
            "int2",
            2.25,
            "2-bit integers with a float16 scale and mean every 128, float activations",
            reorder="fold",
            dual_scale="on",
        ),
        _integers(
            "int3",
            3.25,
            "3-bit integers with a float16 scale and mean every 128, float activations",
            reorder="fold",
            dual_scale="on",
        ),
        _INT4,
        _with_int8(_INT4, "int4-w4a8"),
        _integers("int4-sym", 4.5, "4-bit integers with a float16 scale every 32, symmetric"),
        _INT8,
        _with_int8(_INT8, "int8-w8a8"),
    )
}


def get_scheme(name: str) -> Scheme:
    """The scheme of that name. UsageError lists the known ones."""
    if name not in SCHEMES:
        near = get_close_matches(name, SCHEMES, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UsageError(f"unknown scheme '{name}'; known: {', '.join(SCHEMES)}{hint}")
    return SCHEMES[name]


def require_use_of_packing(packing: str, formats: Collection[str | None]) -> None:
    """UsageError for a packing that makes no difference to weights in these formats."""
    if packing != PACKINGS[0] and "ternary" not in formats:
        raise UsageError(f"packing '{packing}' is for ternary weights, and there are none")
