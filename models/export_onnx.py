"""The torch exporter, made quiet and reproducible."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qgraph.errors import ResourceError

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 23
KEPT_METADATA = "pkg.torch.onnx.name_scopes"  # the module path of each node: names of layers come from it

_INSTALL = "pip install 'qgraph[demo]'"


def require(*modules: str) -> None:
    """Raises ResourceError, with the command to run, unless all `modules` can be imported."""
    import importlib.util

    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        raise ResourceError(f"exporting needs {', '.join(missing)}, not installed here; run: {_INSTALL}")


def export_module(
    module: Any,
    example: Sequence[Any],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic: Sequence[Mapping[int, Any] | tuple[Mapping[int, Any], ...]],
    opset: int = OPSET,
    verbose: bool = False,
) -> ir.Model:
    """Exports a torch module by the dynamo exporter.

    Metadata that holds file paths or depends on the machine (stack traces and the like) is removed; each node
    keeps its module path (`KEPT_METADATA`).

    Args:
        module: in eval mode; called with `example` as positional arguments.
        dynamic: for each parameter of `module.forward`, axis -> `torch.export.Dim`; for `*parameters` a tuple
            of these.
    """
    import torch

    with contextlib.nullcontext() if verbose else quiet():
        program = torch.onnx.export(
            module,
            tuple(example),
            dynamo=True,
            opset_version=opset,
            input_names=list(input_names),
            output_names=list(output_names),
            dynamic_shapes=tuple(dynamic),
            verbose=verbose,
        )
    if program is None:
        raise ResourceError("torch.onnx.export returned nothing; this version of torch is not supported")
    model = program.model
    _strip(model)
    return model


def _strip(model: ir.Model) -> None:
    """Removes everything that does not belong to the model: traces, paths, the exporter's own bookkeeping."""
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
        for node in graph:
            kept = node.metadata_props.get(KEPT_METADATA)
            node.metadata_props.clear()
            if kept is not None:
                node.metadata_props[KEPT_METADATA] = kept
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences warnings, logging and prints, as of the exporter. Errors still come out as exceptions."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    progress = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if progress is None:
            del os.environ["HF_HUB_DISABLE_PROGRESS_BARS"]
        else:
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = progress
