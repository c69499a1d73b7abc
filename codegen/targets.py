"""What `--target` names: the machines that one artifact holds code for."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from qgraph.codegen.isa import TARGETS, Isa, get_target
from qgraph.errors import UsageError

CUDA = "cuda"
WASM = "wasm32"
CPU = "cpu"  # that of the machine which compiles
# The names that `--target` takes, alone or with commas between them.
NAMES = (*TARGETS, CPU, CUDA)


@dataclass(frozen=True)
class Target:
    """A parsed target.

    Attributes:
        name: its parts in a fixed order, as stored in an artifact.
        isas: the CPU levels to compile for, best first; none for an artifact that runs on GPUs alone.
        cuda: whether there is code for NVIDIA GPUs.
    """

    name: str
    isas: tuple[Isa, ...]
    cuda: bool

    @property
    def cpu(self) -> str:
        """The CPU's part of the name, such as `x86_64-linux`; empty for GPUs alone."""
        return self.name.split(",")[0] if self.isas else ""

    @property
    def loads_code(self) -> bool:
        """Whether programs there can load code of ours, from a `.qg` file for instance."""
        return all(isa.arch != WASM for isa in self.isas)

    def runs_on(self, machine: str) -> bool:
        """Whether the CPU code runs on a machine (as `platform.machine` says it)."""
        return any(isa.arch == machine for isa in self.isas)

    @property
    def computes(self) -> set[str]:
        """What can round the activations of many rows here, of `qgraph.schemes.COMPUTES`."""
        return {compute for isa in self.isas for compute in isa.computes} | ({"bf16"} if self.cuda else set())


def parse_target(name: str) -> Target:
    """`x86_64-linux`, `cuda`, `cuda,x86_64-linux` and so on. Raises UsageError for another name."""
    parts = list(dict.fromkeys(part.strip() for part in name.split(",")))
    for part in parts:
        if part not in NAMES:
            raise UsageError(f"unknown target '{part}': choose from {', '.join(NAMES)}")
    if CPU in parts:
        own = next((cpu for cpu in TARGETS if get_target(cpu)[0].arch == platform.machine()), None)
        if own is None:
            raise UsageError(
                f"target '{CPU}': there is no code for {platform.machine()}; name another target"
            )
        parts = list(dict.fromkeys(own if part == CPU else part for part in parts))
    cpus = [part for part in parts if part != CUDA]
    if len(cpus) > 1:
        raise UsageError(
            f"target '{name}': an artifact has code for one kind of CPU, not for {', '.join(cpus)}"
        )
    if WASM in parts and CUDA in parts:
        raise UsageError(f"target '{name}': a WebAssembly program has no GPU: give --target {WASM}")
    isas = get_target(cpus[0]) if cpus else ()
    return Target(",".join([*cpus, *([CUDA] if CUDA in parts else [])]), isas, CUDA in parts)


def require_loadable(name: str) -> None:
    """Raises UsageError for a target whose programs cannot load code, from a `.qg` file for instance."""
    if not parse_target(name).loads_code:
        raise UsageError(
            f"a WebAssembly program cannot load code from a file: --target {WASM} needs --format static-lib"
        )
