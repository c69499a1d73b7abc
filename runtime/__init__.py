"""Runs compiled artifacts (`.qg`): the Python face of the C++ runtime.

    model = qgraph.runtime.load("model.qg")
    outputs = model.run({"input_ids": ids, "attention_mask": mask})

Importing this package loads nothing; `load` builds the library on first use (`build.py`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qgraph.runtime.model import Device, Dim, Model, Profile, Session, Step, TensorInfo, Variant

__all__ = [
    "Device",
    "Dim",
    "Model",
    "Profile",
    "Session",
    "Step",
    "TensorInfo",
    "Variant",
    "device_problem",
    "devices",
    "load",
]


def load(
    path: str | os.PathLike[str],
    *,
    threads: int = 0,
    isa: str | None = None,
    device: str | None = None,
    memory_limit: int = 0,
    public_key: bytes | None = None,
) -> Model:
    """Load an artifact: verify every byte of it, choose the code for the device, map or upload the weights.

    An artifact carries native code. Its hashes detect damage, not malice: loading equals running a program.
    With `public_key` it is one that the owner of that key has signed.

    Args:
        path: the `.qg` file. It must not change in place while the model lives.
        threads: of `Model.run`; 0 is one for every core this process may use. Results do not depend on it.
        isa: use this code variant instead of the best one that the device supports.
        device: "cpu", "cuda" (the first GPU) or "cuda:1"; None is the CPU if the file has code for it, else
            the first GPU. See `devices`.
        memory_limit: bytes for temporaries and state of a session, on its device; 0 is no limit.
        public_key: of Ed25519, 32 bytes (`qgraph.signing.read_public_key`); what its owner has not signed is
            refused before any of its code is loaded. None takes every artifact.

    Raises:
        InputError: no such file, damaged, or not an artifact.
        SignatureError: unsigned, signed by another key, or changed after it was signed.
        UnsupportedError: an artifact of another format version, or without code for this device; or a device
            that is not there.
        ResourceError: no memory, or none that may be executed; a GPU that fails; or no compiler to build the
            library.
    """
    from qgraph.runtime.model import Model

    return Model(
        path, threads=threads, isa=isa, device=device, memory_limit=memory_limit, public_key=public_key
    )


def devices() -> tuple[Device, ...]:
    """What models can be loaded on: the CPU, then the GPUs that the NVIDIA driver shows.

    Looks for the driver, after which a fork()ed child of this process cannot use GPUs.

    Raises:
        ResourceError: no compiler to build the library.
    """
    from qgraph.runtime import _native
    from qgraph.runtime.model import Device

    return tuple(Device(name, description) for name, description in _native.devices())


def device_problem() -> str:
    """Why `devices` has no GPU, in one line; empty if it has one. Errors as `devices`."""
    from qgraph.runtime import _native

    return _native.device_problem()


def __getattr__(name: str) -> Any:
    if name in __all__:
        import importlib

        return getattr(importlib.import_module("qgraph.runtime.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
