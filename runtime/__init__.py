"""Runs compiled artifacts (`.qg`): the Python face of the C++ runtime.

    model = qgraph.runtime.load("model.qg")
    outputs = model.run({"input_ids": ids, "attention_mask": mask})

Importing this package loads nothing; `load` builds the library on first use (`build.py`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qgraph.runtime.model import Dim, Model, Session, Step, TensorInfo, Variant

__all__ = ["Dim", "Model", "Profile", "Session", "Step", "TensorInfo", "Variant", "load"]


def load(
    path: str | os.PathLike[str], *, threads: int = 0, isa: str | None = None, memory_limit: int = 0
) -> Model:
    """Load an artifact: verify every byte of it, choose the code for this CPU, map the weights.

    An artifact carries native code. Its hashes detect damage, not malice: loading equals running a program.

    Args:
        path: the `.qg` file. It must not change in place while the model lives.
        threads: of `Model.run`; 0 is one for every core this process may use. Results do not depend on it.
        isa: use this code variant instead of the best one that the CPU supports.
        memory_limit: bytes for temporaries and state of a session; 0 is no limit.

    Raises:
        InputError: no such file, damaged, or not an artifact.
        UnsupportedError: an artifact of another format version, or without code for this CPU.
        ResourceError: no memory, or none that may be executed; or no compiler to build the library.
    """
    from qgraph.runtime.model import Model

    return Model(path, threads=threads, isa=isa, memory_limit=memory_limit)


def __getattr__(name: str) -> Any:
    if name in __all__:
        import importlib

        return getattr(importlib.import_module("qgraph.runtime.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
