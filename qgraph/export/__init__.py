"""The low-bit model for other engines: `--export`, one module an engine.

A module has `export(model, context) -> model`: it gets a prepared low-bit model of its own
(passes/pipeline.py), which it may change, and returns one that the engine takes. What the engine cannot
compute from low-bit weights it leaves in float, and says so (`Context.leave`). Where `Export.runs`, the
module also has `open_runner(path, threads)`, which opens what was written as a `Runner`
(qgraph/evaluate/runners.py) on this machine's CPU, or raises UnsupportedError.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgraph.errors import UsageError

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Export:
    """One engine. Its module is imported at the first use: listing loads nothing.

    Attributes:
        name: what the user types.
        description: one line for `--help` and the docs.
        runs: whether what is written can be run on a CPU by what qgraph has installed, and is verified so.
        compiled: whether it has code of ours, and runs on the config's target alone.
        formats: of weights, that it has a low-bit form of; empty is all.
    """

    name: str
    description: str
    runs: bool = False
    compiled: bool = False
    formats: tuple[str, ...] = ()

    @property
    def suffix(self) -> str:
        """What the name of the file ends with."""
        return f".{self.name}.onnx"

    @property
    def module(self) -> Any:
        """Its module, loaded."""
        return import_module(f"qgraph.export.{self.name.replace('-', '_')}")


EXPORTS = {
    export.name: export
    for export in (
        Export("ort", "ONNX Runtime on CPUs with our kernels: libqgraph_ort.so", runs=True, compiled=True),
        Export("ort-cpu", "stock ONNX Runtime on CPUs: MatMulNBits", runs=True),
        Export("ort-cuda", "stock ONNX Runtime on NVIDIA GPUs: its NVFP4 MatMul, or MatMulNBits"),
        Export(
            "tensorrt",
            "TensorRT: DequantizeLinear as NVIDIA's Model Optimizer writes it; NVFP4 alone",
            formats=("nvfp4",),
        ),
    )
}


@dataclass(frozen=True)
class Note:
    """A layer or lookup that the engine computes in float, and why."""

    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}"


@dataclass
class Context:
    """How to export, and what an export says of its work.

    Attributes:
        target, packing, compute: of the config, for an export that has code of ours.
        exact: for verification: the same weights, but every rounding of activations as the low-bit file has
            it, and none of the engine's own.
        on_node: called with (done, total, name) before a node that takes long.
        done: names of the layers and lookups that the engine computes from low-bit weights.
        notes: on those that it does not.
        rounds: names of values rounded to int8 by tokens, in place of which the engine rounds by blocks of so
            many of their last axis; None where that is not all that it does.
    """

    target: str = "x86_64-linux"
    packing: str = "fast"
    compute: str = "f32"
    exact: bool = False
    on_node: Callable[[int, int, str], None] = lambda done, total, name: None
    done: list[str] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    rounds: dict[str, int | None] = field(default_factory=dict)

    def keep(self, node: ir.Node) -> None:
        """The engine computes this layer or lookup from low-bit weights."""
        self.done.append(str(node.name))

    def leave(self, node: ir.Node, reason: str) -> None:
        """It is left in float."""
        self.notes.append(Note(str(node.name), reason))


def require_form(name: str, formats: Collection[str]) -> None:
    """UsageError where an engine has no low-bit form of weights in any of these formats."""
    known = EXPORTS[name].formats
    if not formats:
        raise UsageError(f"export '{name}': nothing is quantized, there is nothing low-bit to write")
    if known and not set(known) & set(formats):
        raise UsageError(
            f"export '{name}' has low-bit forms of {', '.join(known)} alone, not of {', '.join(formats)}"
        )


def require_cpu(name: str, target: str) -> None:
    """UsageError where an engine runs code of ours, and a program on `target` loads none."""
    from qgraph.codegen.targets import parse_target

    wanted = parse_target(target)
    if EXPORTS[name].compiled and not wanted.isas:
        raise UsageError(f"export '{name}' runs on CPUs: give --target cpu,{target}")
    if EXPORTS[name].compiled and not wanted.loads_code:
        raise UsageError(f"export '{name}' has code to be loaded, and a program on {target} loads none")


def export_model(name: str, lowbit: Path, context: Context) -> ir.Model:
    """The low-bit file as an engine takes it; what there is to say of that is in `context` then.

    Raises UsageError where the file has no low-bit layer, or none that the engine can compute as such.
    """
    from qgraph.passes import load_model, prepare_model

    model = EXPORTS[name].module.export(prepare_model(load_model(lowbit)), context)
    if not context.done:
        reasons = "; ".join(dict.fromkeys(note.reason for note in context.notes)) or "it has none"
        raise UsageError(f"export '{name}' has no low-bit form of any layer: {reasons}")
    return model
