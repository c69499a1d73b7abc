"""qgraph: the low-bit ONNX compiler.

Importing this package is cheap: numpy, TVM, torch and ONNX Runtime are loaded by the functions that use them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout `passes/`, `codegen/`, `runtime/` and `models/` lie beside this folder, in an installed wheel
# inside it. This lets an uninstalled checkout import them under their one name, `qgraph.passes` and so on.
_here = Path(__file__).parent
if not (_here / "passes").is_dir():
    __path__.append(str(_here.parent))

if TYPE_CHECKING:
    from qgraph.config import CompileConfig
    from qgraph.errors import QGraphError
    from qgraph.generation import generate, open_generator
    from qgraph.pipeline import build, compile, quantize
    from qgraph.runtime import load

__all__ = [
    "CompileConfig",
    "QGraphError",
    "__version__",
    "build",
    "compile",
    "generate",
    "load",
    "open_generator",
    "quantize",
]

_LAZY = {
    "CompileConfig": "qgraph.config",
    "QGraphError": "qgraph.errors",
    "build": "qgraph.pipeline",
    "compile": "qgraph.pipeline",
    "generate": "qgraph.generation",
    "load": "qgraph.runtime",
    "open_generator": "qgraph.generation",
    "quantize": "qgraph.pipeline",
}
_MODULES = ("errors", "generation", "runtime", "signing")  # public: `import qgraph` alone reaches them


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_MODULES})


def __getattr__(name: str) -> Any:
    import importlib

    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"qgraph.{name}")
    raise AttributeError(f"module 'qgraph' has no attribute {name!r}")
