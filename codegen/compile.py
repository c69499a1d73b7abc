"""KernelSpecs -> the code images of ISA levels, with a cache of compiled kernels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import astuple
from functools import cache
from importlib.metadata import version
from pathlib import Path

from qgraph import cache as store
from qgraph.codegen.isa import Isa
from qgraph.codegen.link import CodeImage, link
from qgraph.codegen.spec import KernelSpec
from qgraph.codegen.targets import WASM
from qgraph.codegen.tiles import symbol
from qgraph.codegen.wasm_library import archive_image


@cache
def generator_hash() -> str:
    """Hash of everything that may turn a spec into code: our sources but the lowering, and TVM's version."""
    here = Path(__file__).parent
    digest = hashlib.sha256(version("apache-tvm").encode())
    for path in sorted([*here.glob("*.py"), *here.glob("kernels/*.py")]):
        digest.update(str(path.relative_to(here)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _cached(symbol: str, isa: Isa, make: Callable[[], bytes]) -> bytes:
    """The object of `symbol` for `isa`."""
    return sealed(repr((symbol, astuple(isa), generator_hash())), "o", make)


def sealed(content: str, suffix: str, make: Callable[[], bytes]) -> bytes:
    """What `make` makes of `content`, made once. Entries begin with a hash of key and content: one that is
    damaged, or another's, is made again."""
    key = hashlib.sha256(content.encode())
    name = f"kernels/{key.hexdigest()}.{suffix}"

    def seal(data: bytes) -> bytes:
        return hashlib.sha256(key.digest() + data).digest()

    entry = store.read(name)
    if entry is not None and seal(entry[32:]) == entry[:32]:
        return entry[32:]
    data = make()
    store.store(name, seal(data) + data)
    return data


def compile_kernel(spec: KernelSpec, isa: Isa) -> bytes:
    """One kernel as a relocatable object, from the cache when it was compiled before."""

    def make() -> bytes:
        # TVM takes seconds to import; a build whose kernels are all cached does without.
        from qgraph.codegen.kernels import build_kernel
        from qgraph.codegen.tvm_backend import compile_object

        return compile_object({symbol(spec, isa): build_kernel(spec, isa)}, isa)

    return _cached(symbol(spec, isa), isa, make)


def compile_support(isa: Isa) -> bytes:
    """The support routines (memset, memcpy) that kernels may call."""

    def make() -> bytes:
        from qgraph.codegen.tvm_backend import load_tvm

        load_tvm()
        from qgraph.codegen.kernels.support import support_object

        return support_object(isa)

    return _cached("support", isa, make)


def images_of(isas: Sequence[Isa]) -> dict[str, list[Isa]]:
    """The variants that are one code image, by the name of the first of them that extends no other."""
    return {
        isa.name: [isa, *(other for other in isas if other.base == isa.name)] for isa in isas if not isa.base
    }


def compile_image(
    specs: Sequence[KernelSpec], isas: Sequence[Isa], on_kernel: Callable[[str], None] | None = None
) -> CodeImage:
    """Compile and link `specs` for the variants of one image; entries are by `tiles.symbol`. Equal specs give
    equal bytes, cached or not. For WebAssembly, where a program's linker links, the objects are the image."""
    objects: dict[str, bytes] = {}
    for isa in isas:
        for spec in specs:
            if (name := symbol(spec, isa)) in objects:
                continue
            if on_kernel is not None:
                on_kernel(name)
            objects[name] = compile_kernel(spec, isa)
    if isas[0].arch == WASM:
        return archive_image(objects)
    return link(objects, list(objects), compile_support(isas[0]))
