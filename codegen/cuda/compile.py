"""KernelSpecs -> the code variants of a CUDA plan, with a cache of what was compiled before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qgraph.codegen.compile import generator_hash, sealed
from qgraph.codegen.cuda.arch import ARCHS, CudaArch
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import UnsupportedError


@dataclass(frozen=True)
class CudaImage:
    """All kernels for one architecture.

    Attributes:
        code: a cubin, or PTX text that ends in a NUL.
    """

    arch: CudaArch
    code: bytes


@dataclass(frozen=True)
class CudaCode:
    """The variants of a plan.

    Attributes:
        images: best first.
        functions: of each kernel, the threads of a block and its bytes of dynamic shared memory.
        skipped: architectures that the compiler does not know.
        compiler: its name and version.
    """

    images: list[CudaImage]
    functions: list[dict[str, int]]
    skipped: list[str]
    compiler: str


@cache
def _generator_hash() -> str:
    digest = hashlib.sha256(generator_hash().encode())
    for path in sorted(Path(__file__).parent.rglob("*.*")):
        if path.suffix in (".py", ".cuh"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _generate(specs: Sequence[KernelSpec], on_kernel: Callable[[int, str], None] | None) -> bytes:
    """CUDA C++ of all kernels, and how each is launched, as JSON."""
    # TVM takes seconds to import; a build whose kernels were all generated before does without.
    from qgraph.codegen.cuda.kernels import build_kernel
    from qgraph.codegen.cuda.text import cuda_text

    functions, built = [], {}
    for i, spec in enumerate(specs):
        if on_kernel is not None:
            on_kernel(i, spec.symbol)
        kernel = build_kernel(spec)
        built[spec.symbol] = kernel.function
        functions.append({"threads": kernel.threads, "shared": kernel.shared})
    return json.dumps({"text": cuda_text(built), "functions": functions}).encode()


def compile_cuda(
    specs: Sequence[KernelSpec], on_kernel: Callable[[int, str], None] | None = None
) -> CudaCode:
    """Compile `specs` for every architecture that the compiler at hand knows.

    Args:
        on_kernel: called with (done, what) before each kernel is generated, then before the machine code is
            made.

    Raises:
        ResourceError: there is no compiler of CUDA C++, or it does not work.
        UnsupportedError: it knows none of the architectures.
    """
    from qgraph.codegen.cuda.toolkit import find_compiler

    compiler = find_compiler()
    known = [arch for arch in ARCHS if compiler.supports(arch)]
    if not known:
        raise UnsupportedError(f"{compiler.name} knows none of {', '.join(arch.name for arch in ARCHS)}")
    symbols = [spec.symbol for spec in specs]
    key = repr((symbols, _generator_hash()))
    made = json.loads(sealed(key, "cu.json", lambda: _generate(specs, on_kernel)))
    text: str = made["text"]

    def image(arch: CudaArch) -> CudaImage:
        key = repr((text, arch, compiler.name, _generator_hash()))
        return CudaImage(arch, sealed(key, "cuda", lambda: compiler.compile(text, arch)))

    if on_kernel is not None:
        on_kernel(len(specs), compiler.name)
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(image, known))
    return CudaCode(images, made["functions"], [a.name for a in ARCHS if a not in known], compiler.name)
