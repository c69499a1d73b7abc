"""Artifacts whose CUDA code is that of the emulation: the runtime runs them on the fake driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

from emulator import emulated_module

from qgraph.codegen.cuda.arch import CudaArch
from qgraph.codegen.cuda.compile import CudaCode, CudaImage
from qgraph.codegen.cuda.kernels import build_kernel
from qgraph.codegen.cuda.text import cuda_text
from qgraph.codegen.spec import KernelSpec

EMULATED = CudaArch("cuda-emulated", "sm_10", "sm_10")  # the compute capability of the fake driver's device


def compile_emulated(
    specs: Sequence[KernelSpec], on_kernel: Callable[[int, str], None] | None = None
) -> CudaCode:
    built = {spec.symbol: build_kernel(spec) for spec in specs}
    text = cuda_text({symbol: kernel.function for symbol, kernel in built.items()})
    functions = [{"threads": kernel.threads, "shared": kernel.shared} for kernel in built.values()]
    return CudaCode([CudaImage(EMULATED, emulated_module(text, list(built)))], functions, [], "g++")


@contextmanager
def emulated() -> Iterator[None]:
    """Within it, target cuda has one variant: the emulation."""
    with (
        mock.patch("qgraph.codegen.artifact.compile_cuda", compile_emulated),
        mock.patch("qgraph.codegen.cuda.toolkit.find_compiler"),
    ):
        yield
