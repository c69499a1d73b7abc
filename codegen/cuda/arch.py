"""The GPU architectures that kernels are compiled for, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CudaArch:
    """One code variant of an artifact's CUDA plan.

    Attributes:
        name: as in the plan's `variants`, such as `cuda-sm_90a`.
        real: what machine code is made for, such as `sm_90a`; for PTX, which the driver compiles when it
            loads, the oldest that can run it, such as `compute_80`.
        feature: what the runtime must find in the device (names of runtime/FORMAT.md).
    """

    name: str
    real: str
    feature: str

    @property
    def is_ptx(self) -> bool:
        return self.real.startswith("compute_")


def _machine(number: str) -> CudaArch:
    return CudaArch(f"cuda-sm_{number}", f"sm_{number}", f"sm_{number}")


# Best first. Ampere, Ada, Hopper, Blackwell of data centres and of workstations; PTX for what comes after.
ARCHS: tuple[CudaArch, ...] = (
    _machine("120a"),
    _machine("100a"),
    _machine("90a"),
    _machine("89"),
    _machine("80"),
    CudaArch("cuda-ptx_80", "compute_80", "ptx_80"),
)
