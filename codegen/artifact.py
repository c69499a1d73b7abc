"""The back end from top to bottom: lower, plan, compile for every ISA level, package."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from qgraph.codegen import package
from qgraph.codegen.compile import compile_image, images_of
from qgraph.codegen.digits import FEW_ROWS, uses_digits
from qgraph.codegen.dims import size
from qgraph.codegen.isa import Isa, get_target
from qgraph.codegen.lowering import Lowering, lower
from qgraph.codegen.plan import Plan, make_plan
from qgraph.codegen.spec import KernelSpec
from qgraph.codegen.tiles import has_tiles, symbol

# Kernels of quantized weights -> (bits, what the weights are).
_WEIGHTS = {
    "matmul_nvfp4": (4, "NVFP4 weights"),
    "matmul_ternary": (2, "ternary weights"),
    "matmul_int2": (2, "int2 weights with means"),
    "matmul_int3": (3, "int3 weights with means"),
    "matmul_int4": (4, "int4 weights with zero points"),
    "matmul_int4sym": (4, "symmetric int4 weights"),
    "matmul_int8": (8, "int8 weights"),
}
# How kernels compute, in the terms of the report.
_COMPUTE = {
    **{op: f"W{bits}A16: {what}, float32 activations and sums" for op, (bits, what) in _WEIGHTS.items()},
    "gather_nvfp4": "NVFP4 table, float32 rows",
    "dynamic_nvfp4": "rounds to NVFP4 and back in float32",
    "dynamic_int8": "rounds to int8 and back in float32",
    **{
        f"{op}_a8": f"W{bits}A8: {what}, int8 activations, integer products"
        for op, (bits, what) in _WEIGHTS.items()
    },
    "quantize_int8": "rounds to int8 codes with a scale",
    "store_int8": "rounds to int8 codes with a scale",
}
# The same of products whose left operand was rounded by an operator: the rounding is real, the product is not
# done in the format.
_COMPUTE_ROUNDED = {
    **{
        (op, rounding): f"W{bits}A{to} emulated: {what}, {activations} activations, float32 products"
        for op, (bits, what) in _WEIGHTS.items()
        for rounding, to, activations in (("DynamicQDQNVFP4", 4, "NVFP4"), ("DynamicQDQInt8", 8, "int8"))
    },
    ("matmul_nvfp4", "DynamicQDQNVFP4"): "W4A4 emulated: NVFP4 weights and activations, float32 products",
    ("matmul_f32", "DynamicQDQNVFP4"): "float32 of activations rounded to NVFP4",
    ("matmul_f32", "DynamicQDQInt8"): "float32 of activations rounded to int8",
}


@dataclass(frozen=True)
class LayerKernel:
    """What a node of the graph became: the kernel that runs it, how that computes, and the bytes that the
    layer's matrix takes in the artifact: codes, scales, offsets and padding, without its bias."""

    node_name: str
    op: str
    kernel: str
    compute: str
    nbytes: int = 0


@dataclass
class Artifact:
    """A compiled model, ready to be written.

    Attributes:
        tensors: of the container, in file order.
        metadata: of the container.
        layers: the realised kernel of every matrix product, attention, norm and lookup.
        isas: names of the code variants, best first.
        code_bytes: size of each variant's code image, which variants may share.
        plan: the plan, as written.
    """

    tensors: list[package.Tensor]
    metadata: dict[str, str]
    layers: list[LayerKernel]
    isas: list[str]
    code_bytes: dict[str, int]
    plan: Plan = field(repr=False)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight tensors."""
        return sum(t.data.nbytes for t in self.tensors if t.name.startswith("w/"))

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return sum(len(piece) for piece in package.serialize(self.tensors, self.metadata))

    def to_bytes(self) -> bytes:
        """The file's content."""
        return b"".join(package.serialize(self.tensors, self.metadata))

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all. Raises ResourceError when the disk refuses."""
        package.write_path(path, self.tensors, self.metadata)


def _layers(low: Lowering, isas: Sequence[Isa]) -> list[LayerKernel]:
    return [
        LayerKernel(
            node.name or "",
            node.op_type,
            step.spec.op,
            _compute(node, step.spec, isas),
            sum(buffer.data.nbytes for buffer in step.weights),
        )
        for node, step in low.layers
    ]


def _compute(node: ir.Node, spec: KernelSpec, isas: Sequence[Isa]) -> str:
    kernel = spec.op
    if kernel.startswith("attention") and ("cache", "i8") in spec.params:
        return "float32 of keys and values stored as int8"
    source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    rounded = _COMPUTE_ROUNDED.get((kernel, source.op_type)) if source is not None else None
    digits, parts = (dict(spec.params).get(name, 0) for name in ("digits", "parts"))
    more = ""
    if digits or parts:
        uses = [isa.name for isa in isas if (uses_digits(isa, digits) if digits else has_tiles(spec, isa))]
        others = ", ".join(isa.name for isa in isas if isa.name not in uses)
        what = f"activations of {8 * digits} bits" if digits else "bfloat16 activations"
        more = f"; of more than {FEW_ROWS} rows {what}" + (f" ({others}: float32)" if others else "")
    return (rounded or _COMPUTE.get(kernel, "float32")) + more


def build_artifact(
    model: ir.Model,
    *,
    target: str = "x86_64-linux",
    packing: str = "fast",
    compute: str = "f32",
    metadata: Mapping[str, str] | None = None,
    on_kernel: Callable[[int, int, str], None] | None = None,
) -> Artifact:
    """Compile a prepared graph, float or low-bit.

    Args:
        model: what phase `prepare` (and `quantize`) left.
        target: a key of `qgraph.codegen.isa.TARGETS`.
        packing: `fast` | `small`, as of `lower`; compute: `f32` | `bf16` | `int16` | `int8`, likewise.
        metadata: provenance, added to the container's `__metadata__`.
        on_kernel: called with (done, total, symbol) before each kernel is compiled.

    Raises:
        UnsupportedError: an operator, data type or shape that has no kernel, named with its node.
        UsageError: an unknown target, packing or compute.
    """
    isas = get_target(target)
    low = lower(model.graph, packing, compute)
    checks = [(size(a), size(b), str(message)) for a, b, message in model.graph.meta.get("qgraph.checks", [])]
    plan = make_plan(low, checks)
    images = images_of(isas)
    total = sum(
        len({symbol(spec, isa) for isa in image for spec in plan.kernels}) for image in images.values()
    )
    done, code, entries = 0, {}, {}

    def report(name: str) -> None:
        nonlocal done
        if on_kernel is not None:
            on_kernel(done, total, name)
        done += 1

    for first, image in images.items():
        linked = compile_image(plan.kernels, image, report)
        for isa in image:
            code[isa.name] = package.raw_tensor(f"qgraph.code.{first}", linked.code)
            entries[isa.name] = [linked.entries[symbol(spec, isa)] for spec in plan.kernels]
    variants = [
        {
            "isa": isa.name,
            "arch": isa.arch,
            "features": list(isa.features),
            "code": code[isa.name].name,
            "entries": entries[isa.name],
        }
        for isa in isas
    ]
    document = json.dumps({**plan.document, "variants": variants}, separators=(",", ":")).encode()
    weights = [package.Tensor(b.name, b.dtype, b.data) for b in plan.weights]
    tensors = [package.raw_tensor("qgraph.plan", document), *(code[name] for name in images), *weights]
    full = {"qgraph.target": target, "qgraph.packing": packing, "qgraph.compute": compute, **(metadata or {})}
    if low.cache:
        full["qgraph.cache"] = json.dumps([[pair.past.name, pair.present.name] for pair in low.cache.pairs])
    return Artifact(
        tensors,
        full,
        _layers(low, isas),
        [isa.name for isa in isas],
        {name: tensor.data.nbytes for name, tensor in code.items()},
        plan,
    )
