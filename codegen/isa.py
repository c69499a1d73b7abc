"""The instruction-set levels that kernels are compiled for, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qgraph.errors import UsageError


@dataclass(frozen=True)
class Isa:
    """One code variant of an artifact.

    Attributes:
        name: as in the plan's `variants` and in `--isa`.
        arch: `x86_64`, `aarch64`, `armv7l` or `riscv64`, as `uname -m` says it, or `wasm32`.
        triple: LLVM target triple.
        mcpu: LLVM CPU name, the baseline of the variant.
        mattr: LLVM features on top of it.
        features: what the runtime must find in the CPU before it runs the variant (names of
            runtime/FORMAT.md).
        lanes: float32 elements of the widest register.
        decode: how a kernel decodes 4-bit codes (codegen/kernels/decode.py): by a lookup, `permute` (of
            float32 lanes by 16 entries, of bytes by 64) or `bytes16` (of bytes by 16 entries, widened for
            floats), or by `arithmetic`, where there are no vectors.
        dot: how a kernel multiplies bytes (codegen/kernels/dot.py): `vnni` (four products a lane and their
            sum at once), `maddubs` (pairs, in 16 bits, then sums of pairs), `halves` (as 16 bits, pairs and
            their sum at once) or `widen` (one by one, in 32).
        base: the variant that this one extends by tiles (AMX), or empty. Both are one code image, in which
            they share all kernels that have no form for tiles (codegen/tiles.py).
        registers: vectors of `lanes` that its registers hold, all together where it has none but scalar ones.
        pointer_bits: of an address.
        float16: whether it has instructions that convert float16; else that would be a call a lane.
    """

    name: str
    arch: str
    triple: str
    mcpu: str
    mattr: tuple[str, ...]
    features: tuple[str, ...]
    lanes: int
    decode: str
    dot: str
    base: str = ""
    registers: int = 32
    pointer_bits: int = 64
    float16: bool = True

    @property
    def computes(self) -> tuple[str, ...]:
        """What rounds the activations of many rows, of `qgraph.schemes.COMPUTES`, and is faster here than
        float32; the others are done like `f32`."""
        digits = {"vnni": ("int16", "int8"), "maddubs": ("int8",), "halves": (), "widen": ()}[self.dot]
        return ("bf16", *digits) if self.base else digits


_X86 = "x86_64-unknown-linux-gnu"
_AVX2 = ("avx2", "fma", "f16c", "bmi2")

_V4 = Isa(
    "x86-64-v4",
    "x86_64",
    _X86,
    "x86-64-v4",
    # More than the level that it is named after: bytes are multiplied, and looked up, by instructions of Ice
    # Lake and Zen 4. An older CPU with AVX-512 runs the AVX2 variant; one more variant would make every
    # artifact's code and compile time half as large again, for those alone.
    # Kernels write 16-lane vectors; without this LLVM may split them into two halves.
    ("-prefer-256-bit", "+avx512vbmi", "+avx512vnni"),
    (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd", "avx512vbmi", "avx512vnni"),
    16,
    "permute",
    "vnni",
)
_AMX = ("amx-tile", "amx-int8", "amx-bf16")  # LLVM and FORMAT.md name them alike

ISAS: dict[str, Isa] = {
    isa.name: isa
    for isa in (
        replace(
            _V4,
            name="x86-64-v4-amx",
            mattr=(*_V4.mattr, *(f"+{feature}" for feature in _AMX)),
            features=(*_V4.features, *_AMX),
            base=_V4.name,
        ),
        _V4,
        Isa("x86-64-v3", "x86_64", _X86, "x86-64-v3", (), _AVX2, 8, "bytes16", "maddubs", registers=16),
        Isa(
            "aarch64",
            "aarch64",
            "aarch64-unknown-linux-gnu",
            "generic",
            ("+neon",),
            ("neon",),
            4,
            "bytes16",
            "widen",
        ),
        Isa(
            "armv7",
            "armv7l",
            "armv7-unknown-linux-gnueabihf",
            "cortex-a7",
            # Fused multiply-adds, which the kernels' bits rest on, came with VFPv4. Scalars are left to VFP,
            # which has subnormals; vectors have none.
            ("+neon", "+vfp4", "-neonfp"),
            ("neon", "vfpv4", "idiva"),
            4,
            "bytes16",
            "widen",
            registers=16,
            pointer_bits=32,
        ),
        Isa(
            "riscv64",
            "riscv64",
            "riscv64-unknown-linux-gnu",
            "generic-rv64",
            # rv64gc, what every distribution is built for. Without vectors: LLVM takes them apart. Nothing
            # is left to a linker that could relax it.
            ("+m", "+a", "+f", "+d", "+c", "-relax"),
            (),
            4,
            "arithmetic",
            "widen",
            registers=8,
            float16=False,
        ),
        # WebAssembly with vectors. It has no fused multiply-add: a term of a sum is rounded twice.
        Isa(
            "wasm32",
            "wasm32",
            "wasm32-unknown-unknown",
            "generic",
            ("+simd128", "+bulk-memory"),
            ("simd128",),
            4,
            "bytes16",
            "halves",
            pointer_bits=32,
            float16=False,
        ),
    )
}

# What `--target` names: the variants one artifact holds, best first.
TARGETS: dict[str, tuple[str, ...]] = {
    "x86_64-linux": ("x86-64-v4-amx", "x86-64-v4", "x86-64-v3"),
    "aarch64-linux": ("aarch64",),
    "armv7-linux": ("armv7",),
    "riscv64-linux": ("riscv64",),
    "wasm32": ("wasm32",),
}


def get_target(name: str) -> tuple[Isa, ...]:
    """The ISA levels of target `name`, best first. Raises UsageError for an unknown name."""
    if name not in TARGETS:
        raise UsageError(f"unknown target '{name}': choose from {', '.join(TARGETS)}")
    return tuple(ISAS[isa] for isa in TARGETS[name])
