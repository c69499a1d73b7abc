"""The pipelines, as literal lists of passes, and the loop that runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from qgraph.errors import QGraphError, ResourceError
from qgraph.passes.base import GraphPass, Refusal
from qgraph.passes.bound_positions import BoundPositions
from qgraph.passes.broadcast_rotary import BroadcastRotary
from qgraph.passes.check_prepared import CheckPrepared
from qgraph.passes.eliminate_identity import EliminateIdentity
from qgraph.passes.expand_contrib import ExpandContrib
from qgraph.passes.fold_constants import FoldConstants
from qgraph.passes.fold_index_functions import FoldIndexFunctions
from qgraph.passes.fuse_attention import FuseAttention
from qgraph.passes.fuse_gelu import FuseGelu
from qgraph.passes.fuse_layer_norm import FuseLayerNorm
from qgraph.passes.fuse_rms_norm import FuseRMSNorm
from qgraph.passes.fuse_rotary import FuseRotary
from qgraph.passes.hold_outputs import DeclareOutputs, HoldOutputs
from qgraph.passes.infer_shapes import InferShapes
from qgraph.passes.inline_functions import InlineFunctions
from qgraph.passes.lift_constants import LiftConstants
from qgraph.passes.lower_gemm import LowerGemm
from qgraph.passes.name_weights import NameWeights
from qgraph.passes.order_bias import OrderBias
from qgraph.passes.orient_weights import OrientWeights
from qgraph.passes.raise_opset import RaiseOpset
from qgraph.passes.recognize_lowbit import RecognizeLowbit
from qgraph.passes.remove_unused import RemoveUnused
from qgraph.passes.simplify_mask import SimplifyMask
from qgraph.passes.simplify_reshape import SimplifyReshape
from qgraph.passes.tie_initializers import TieInitializers
from qgraph.passes.unflatten_linear import UnflattenLinear
from qgraph.passes.unify_cache import UnifyCache

Pass = ir.passes.InPlacePass


@dataclass
class PrepareOptions:
    """How to run: `dump` is a directory for a file after every phase, `on_pass` hears of each pass before it
    runs."""

    dump: Path | None = None
    on_pass: Callable[[str], None] | None = None
    refusals: list[Refusal] = field(default_factory=list)


def prepare(options: PrepareOptions) -> list[Pass]:
    """Phase "prepare": any exporter's graph to the prepared graph of docs/architecture.md."""
    return [
        # 0. One graph, one opset, constants as initializers
        DeclareOutputs(),
        RaiseOpset(),
        InlineFunctions(),
        LiftConstants(),
        UnifyCache(),
        RecognizeLowbit(),
        ExpandContrib(),
        RemoveUnused(),
        NameFixPass(),
        Dump("00-import", options),
        # 1. What is known at compile time is computed, what does nothing goes
        UntilStable(
            options,
            InferShapes(),
            HoldOutputs(),
            FoldConstants(),
            FoldIndexFunctions(),
            SimplifyReshape(),
            EliminateIdentity(),
            RemoveUnused(),
        ),
        TieInitializers(),
        Dump("10-simple", options),
        # 2. One spelling of each layer
        LowerGemm(),
        InferShapes(),
        OrientWeights(),
        InferShapes(),
        UnflattenLinear(),
        FuseAttention(),
        InferShapes(),
        SimplifyMask(),
        FuseRotary(),
        OrderBias(),
        InferShapes(),
        BroadcastRotary(),
        FuseLayerNorm(),
        FuseRMSNorm(),
        FuseGelu(),
        Dump("20-layers", options),
        # 3. Clean and complete
        RemoveUnused(),
        TieInitializers(),
        NameWeights(),
        NameFixPass(),
        InferShapes(),
        HoldOutputs(),
        BoundPositions(),
        CheckPrepared(),
        Dump("30-prepared", options),
    ]


def prepare_model(
    model: ir.Model,
    *,
    on_pass: Callable[[str], None] | None = None,
    dump: Path | str | None = None,
    refusals: list[Refusal] | None = None,
) -> ir.Model:
    """Prepares `model` in place and returns it.

    Args:
        model: from `load_model`, or any IR model.
        on_pass: called with the name of each pass before it runs.
        dump: directory for `00-import.onnx`, `10-simple.onnx`, ... (made if missing).
        refusals: collects what passes left alone, and why.

    Raises:
        InputError, UnsupportedError: the model; see the passes.
        ResourceError: a dump cannot be written.
    """
    options = PrepareOptions(
        None if dump is None else Path(dump), on_pass, [] if refusals is None else refusals
    )
    run_passes(model, prepare(options), options)
    return model


def run_passes(model: ir.Model, passes: Iterable[Pass], options: PrepareOptions) -> bool:
    """Runs passes in order. Returns whether any changed the model. Errors of qgraph come out as
    themselves."""
    modified = False
    for step in passes:
        if options.on_pass is not None and not isinstance(step, Dump | UntilStable):
            options.on_pass(type(step).__name__)
        try:
            modified |= step(model).modified
        except ir.passes.InvariantError as error:
            if isinstance(error.__cause__, QGraphError):
                raise error.__cause__ from None
            raise QGraphError(f"{type(step).__name__} broke its contract: {error}") from error
        finally:
            if isinstance(step, GraphPass):
                options.refusals.extend(r for r in step.refusals if r not in options.refusals)
    return modified


class UntilStable(GraphPass):
    """Runs passes in turn until a whole round changes nothing."""

    MAX_ROUNDS = 20

    def __init__(self, options: PrepareOptions, *passes: Pass) -> None:
        super().__init__()
        self.on_pass = options.on_pass
        self.passes = passes

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        options = PrepareOptions(on_pass=self.on_pass, refusals=self.refusals)
        modified = False
        for _ in range(self.MAX_ROUNDS):
            if not run_passes(model, self.passes, options):
                break
            modified = True
        return ir.passes.PassResult(model, modified)


class Dump(GraphPass):
    """Writes the model as it is now to `<options.dump>/<name>.onnx`, where a directory is given."""

    def __init__(self, name: str, options: PrepareOptions) -> None:
        super().__init__()
        self.name = name
        self.options = options

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        folder = self.options.dump
        if folder is not None:
            external = f"{self.name}.data" if _needs_external_data(model) else None
            try:
                folder.mkdir(parents=True, exist_ok=True)
                ir.save(model, folder / f"{self.name}.onnx", external_data=external)
            except OSError as error:
                raise ResourceError(
                    f"cannot write the dump '{folder / self.name}.onnx': {error.strerror}"
                ) from error
        return ir.passes.PassResult(model, False)


def _needs_external_data(model: ir.Model) -> bool:
    """Whether weights already lie outside the model's file, or are too many for one protobuf."""
    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    return any(isinstance(t, ir.ExternalTensor) for t in tensors) or sum(t.nbytes for t in tensors) > 1 << 30
