"""The instruction-set levels that kernels are compiled for, as data."""

from __future__ import annotations

from dataclasses import dataclass

from qgraph.errors import UsageError


@dataclass(frozen=True)
class Isa:
    """One code variant of an artifact.

    Attributes:
        name: as in the plan's `variants` and in `--isa`.
        arch: `x86_64` or `aarch64`, as `uname -m` says it.
        triple: LLVM target triple.
        mcpu: LLVM CPU name, the baseline of the variant.
        mattr: LLVM features on top of it.
        features: what the runtime must find in the CPU before it runs the variant (names of
        runtime/FORMAT.md).
        lanes: float32 elements of the widest register.
        decode: how a kernel looks up E2M1 codes (codegen/kernels/decode.py): `permute16` (a 16-entry permute
            of float32 lanes) or `bytes16` (a 16-entry byte lookup, then widening).
    """

    name: str
    arch: str
    triple: str
    mcpu: str
    mattr: tuple[str, ...]
    features: tuple[str, ...]
    lanes: int
    decode: str


_X86 = "x86_64-unknown-linux-gnu"

ISAS: dict[str, Isa] = {
    isa.name: isa
    for isa in (
        Isa(
            "x86-64-v4",
            "x86_64",
            _X86,
            "x86-64-v4",
            # Kernels write 16-lane vectors; without this LLVM may split them into two halves.
            ("-prefer-256-bit",),
            ("avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"),
            16,
            "permute16",
        ),
        Isa("x86-64-v3", "x86_64", _X86, "x86-64-v3", (), ("avx2", "fma", "f16c", "bmi2"), 8, "bytes16"),
        Isa(
            "aarch64",
            "aarch64",
            "aarch64-unknown-linux-gnu",
            "generic",
            ("+neon",),
            ("neon",),
            4,
            "bytes16",
        ),
    )
}

# What `--target` names: the variants one artifact holds, best first.
TARGETS: dict[str, tuple[str, ...]] = {
    "x86_64-linux": ("x86-64-v4", "x86-64-v3"),
    "aarch64-linux": ("aarch64",),
}


def get_target(name: str) -> tuple[Isa, ...]:
    """The ISA levels of target `name`, best first. Raises UsageError for an unknown name."""
    if name not in TARGETS:
        raise UsageError(f"unknown target '{name}': choose from {', '.join(TARGETS)}")
    return tuple(ISAS[isa] for isa in TARGETS[name])
