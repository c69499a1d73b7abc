"""The back end from top to bottom: lower, plan, compile for every ISA level, package."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qgraph.codegen import package
from qgraph.codegen.compile import compile_image, images_of
from qgraph.codegen.cuda.compile import compile_cuda
from qgraph.codegen.digits import FEW_ROWS, uses_digits
from qgraph.codegen.dims import size
from qgraph.codegen.isa import Isa
from qgraph.codegen.lowering import Lowering, lower
from qgraph.codegen.plan import Plan, make_plan
from qgraph.codegen.spec import KernelSpec
from qgraph.codegen.targets import Target, parse_target
from qgraph.codegen.tiles import has_tiles, symbol
from qgraph.errors import QGraphError, UsageError

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

_FP4_ON_GPU = (
    f"; on a GPU, more than {FEW_ROWS} rows as W4A4: FP4 products where it has them (sm_120), else exactly "
    "in float16"
)
_ON_GPU = "; on a GPU, more than {rows} rows as {what} on tensor cores"


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
        skipped: code variants that the compiler at hand cannot make, for GPUs it does not know.
        plan: the plan, as written: that of the CPU where there is one.
    """

    tensors: list[package.Tensor]
    metadata: dict[str, str]
    layers: list[LayerKernel]
    isas: list[str]
    code_bytes: dict[str, int]
    skipped: list[str]
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


def _layers(low: Lowering, target: Target, compute: str) -> list[LayerKernel]:
    return [
        LayerKernel(
            node.name or "",
            node.op_type,
            step.spec.op,
            _compute(node, step.spec, target, compute),
            sum(buffer.data.nbytes for buffer in step.weights),
        )
        for node, step in low.layers
    ]


def _compute(node: ir.Node, spec: KernelSpec, target: Target, compute: str) -> str:
    kernel = spec.op
    if kernel.startswith("attention") and ("cache", "i8") in spec.params:
        return "float32 of keys and values stored as int8"
    source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    rounded = _COMPUTE_ROUNDED.get((kernel, source.op_type)) if source is not None else None
    digits, parts = (dict(spec.params).get(name, 0) for name in ("digits", "parts"))
    more = ""
    if digits or parts:
        uses = [
            isa.name for isa in target.isas if (uses_digits(isa, digits) if digits else has_tiles(spec, isa))
        ]
        others = ", ".join(isa.name for isa in target.isas if isa.name not in uses)
        what = f"activations of {8 * digits} bits" if digits else "bfloat16 activations"
        more = f"; of more than {FEW_ROWS} rows {what}" + (f" ({others}: float32)" if others else "")
    if (
        target.cuda
        and kernel == "matmul_nvfp4"
        and source is not None
        and source.op_type == "DynamicQDQNVFP4"
    ):
        more += _FP4_ON_GPU
    elif target.cuda and kernel in _WEIGHTS:
        what = "bfloat16" if compute == "bf16" and not rounded else "sums of two bfloat16 numbers"
        more += _ON_GPU.format(rows=FEW_ROWS, what=what)
    if target.cuda and kernel.endswith("_a8"):
        more += "; emulated on a GPU: float32 products"
    return (rounded or _COMPUTE.get(kernel, "float32")) + more


@dataclass
class _Code:
    """The code of one device: what it brings to the container, and to the report."""

    plan: Plan
    low: Lowering
    variants: list[dict[str, Any]]
    images: dict[str, bytes]  # by the name of their first variant
    skipped: list[str] = field(default_factory=list)

    def tensors(self, name: str) -> list[package.Tensor]:
        """The plan, under that name, and the code."""
        document = json.dumps({**self.plan.document, "variants": self.variants}, separators=(",", ":"))
        return [
            package.raw_tensor(name, document.encode()),
            *(package.raw_tensor(f"qgraph.code.{isa}", code) for isa, code in self.images.items()),
        ]


OnKernel = Callable[[int, int, str], None]


def _cpu_code(low: Lowering, plan: Plan, isas: Sequence[Isa], on_kernel: OnKernel | None) -> _Code:
    images = images_of(isas)
    total = sum(
        len({symbol(spec, isa) for isa in image for spec in plan.kernels}) for image in images.values()
    )
    done, code, found = 0, {}, {}

    def report(name: str) -> None:
        nonlocal done
        if on_kernel is not None:
            on_kernel(done, total, name)
        done += 1

    for first, image in images.items():
        linked = compile_image(plan.kernels, image, report)
        code[first] = linked.code
        for isa in image:
            found[isa.name] = (first, [linked.entries[symbol(spec, isa)] for spec in plan.kernels])
    variants = [
        {
            "isa": isa.name,
            "arch": isa.arch,
            "features": list(isa.features),
            "code": f"qgraph.code.{found[isa.name][0]}",
            "entries": found[isa.name][1],
        }
        for isa in isas
    ]
    return _Code(plan, low, variants, code)


def _cuda_code(low: Lowering, plan: Plan, on_kernel: OnKernel | None) -> _Code:
    report = None
    if on_kernel is not None:
        call = on_kernel

        def report(done: int, what: str) -> None:
            call(done, len(plan.kernels) + 1, what)

    made = compile_cuda(plan.kernels, report)
    variants = [
        {
            "isa": image.arch.name,
            "arch": "cuda",
            "features": [image.arch.feature],
            "code": f"qgraph.code.{image.arch.name}",
            "functions": made.functions,
        }
        for image in made.images
    ]
    return _Code(plan, low, variants, {image.arch.name: image.code for image in made.images}, made.skipped)


def _lower_for_cpu(graph: ir.Graph, packing: str, compute: str, target: Target, part: bool) -> Lowering:
    """With `compute`, which may be for the GPU alone where there is code for that, too."""
    try:
        return lower(graph, packing, compute, part=part)
    except UsageError:
        if not (target.cuda and compute == "bf16"):
            raise
        return lower(graph, packing, part=part)


def _weights(codes: Sequence[_Code]) -> list[package.Tensor]:
    """The weights of all plans; what several have under a name is one tensor."""
    tensors: dict[str, package.Tensor] = {}
    for code in codes:
        for buffer in code.plan.weights:
            tensor = tensors.setdefault(buffer.name, package.Tensor(buffer.name, buffer.dtype, buffer.data))
            if tensor.data is not buffer.data and bytes(tensor.raw) != bytes(
                package.Tensor(buffer.name, buffer.dtype, buffer.data).raw
            ):
                raise QGraphError(f"two devices have another '{buffer.name}' each")
    return list(tensors.values())


def build_artifact(
    model: ir.Model,
    *,
    target: str = "x86_64-linux",
    packing: str = "fast",
    compute: str = "f32",
    part: bool = False,
    metadata: Mapping[str, str] | None = None,
    on_kernel: OnKernel | None = None,
) -> Artifact:
    """Compile a prepared graph, float or low-bit.

    Args:
        model: what phase `prepare` (and `quantize`) left.
        target: what `qgraph.codegen.targets.parse_target` takes: a CPU, `cuda`, or both with a comma.
        packing: `fast` | `small`, as of `lower`; compute: `f32` | `bf16` | `int16` | `int8`, likewise.
        part: of `lower`.
        metadata: provenance, added to the container's `__metadata__`.
        on_kernel: called with (done, total, symbol) before each kernel is compiled.

    Raises:
        UnsupportedError: an operator, data type or shape that has no kernel, named with its node.
        UsageError: an unknown target, packing or compute.
        ResourceError: for CUDA, no compiler.
    """
    wanted = parse_target(target)
    checks = [(size(a), size(b), str(message)) for a, b, message in model.graph.meta.get("qgraph.checks", [])]
    codes: dict[str, _Code] = {}
    if wanted.isas:
        low = _lower_for_cpu(model.graph, packing, compute, wanted, part)
        codes["qgraph.plan"] = _cpu_code(low, make_plan(low, checks), wanted.isas, on_kernel)
    if wanted.cuda:
        low = lower(model.graph, packing, compute, "cuda", part)
        codes["qgraph.plan.cuda"] = _cuda_code(low, make_plan(low, checks), on_kernel)
    first = next(iter(codes.values()))
    every = list(codes.values())
    tensors = [tensor for name, code in codes.items() for tensor in code.tensors(name)]
    full = {
        "qgraph.target": wanted.name,
        "qgraph.packing": packing,
        "qgraph.compute": compute,
        **(metadata or {}),
    }
    if first.low.cache:
        pairs = [[pair.past.name, pair.present.name] for pair in first.low.cache.pairs]
        full["qgraph.cache"] = json.dumps(pairs)
    return Artifact(
        [*tensors, *_weights(every)],
        full,
        _layers(first.low, wanted, compute),
        [variant["isa"] for code in every for variant in code.variants],
        {
            variant["isa"]: len(code.images[variant["code"].removeprefix("qgraph.code.")])
            for code in every
            for variant in code.variants
        },
        [name for code in every for name in code.skipped],
        first.plan,
    )
