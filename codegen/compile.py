"""KernelSpecs -> one code image for an ISA level."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qgraph.codegen.isa import Isa
from qgraph.codegen.link import CodeImage, link
from qgraph.codegen.spec import KernelSpec


def compile_variant(
    specs: Sequence[KernelSpec], isa: Isa, on_kernel: Callable[[int, str], None] | None = None
) -> CodeImage:
    """Build, compile and link `specs` for `isa`. Equal specs on equal versions give equal bytes."""
    # TVM takes seconds to import; nothing before this needs it.
    from qgraph.codegen.kernels import build_kernel
    from qgraph.codegen.tvm_backend import compile_object

    objects = {}
    for i, spec in enumerate(specs):
        if on_kernel is not None:
            on_kernel(i, spec.symbol)
        objects[spec.symbol] = compile_object({spec.symbol: build_kernel(spec, isa)}, isa)
    from qgraph.codegen.kernels.support import support_object

    return link(objects, [spec.symbol for spec in specs], support_object(isa))
