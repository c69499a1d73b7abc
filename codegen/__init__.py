"""Low-bit graph -> artifact: lowering, plan, kernels through TVM, package."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qgraph.codegen.artifact import Artifact, LayerKernel, build_artifact

__all__ = ["Artifact", "LayerKernel", "build_artifact"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from qgraph.codegen import artifact

        return getattr(artifact, name)
    raise AttributeError(f"module 'qgraph.codegen' has no attribute {name!r}")
