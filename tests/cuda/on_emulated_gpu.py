"""A pytest plugin for processes with the fake driver: the artifacts that tests build are for the emulated
GPU, and those they load run on it, whatever variant they ask for."""

from __future__ import annotations

from typing import Any

import emulated_artifact

import qgraph.codegen
import qgraph.codegen.artifact
import qgraph.runtime

qgraph.codegen.artifact.compile_cuda = emulated_artifact.compile_emulated
_build, _load = qgraph.codegen.artifact.build_artifact, qgraph.runtime.load


def _build_for_gpu(model: Any, **options: Any) -> Any:
    return _build(model, **{"target": "cuda", **options})


def _load_on_gpu(path: Any, *, isa: str | None = None, **options: Any) -> Any:
    return _load(path, **options)


qgraph.codegen.build_artifact = qgraph.codegen.artifact.build_artifact = _build_for_gpu
qgraph.runtime.load = _load_on_gpu
