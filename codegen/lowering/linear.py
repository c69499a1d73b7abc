"""Matrix products: quantized weights, float weights, and products of two activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy

from qgraph.codegen import packing
from qgraph.codegen.digits import digit_rows
from qgraph.codegen.dims import Dim, ceildiv, product
from qgraph.codegen.lowering.context import Linear, Lowering, broadcast, lowers, unsupported
from qgraph.codegen.memory import Buffer, View, collapse
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import InputError
from qgraph.formats import BlockFormat
from qgraph.formats.nvfp4 import NVFP4

Packer = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def nvfp4_weight(
    low: Lowering, node: ir.Node, layout: str, pack: Packer
) -> tuple[tuple[int, int], tuple[Buffer, Buffer, Buffer]]:
    """The NVFP4 weight of a low-bit node, packed for its kernel.

    Args:
        node: its inputs 1, 2 and 3 are codes, block scales and the global scale.
        layout: its name, in those of the artifact's tensors.
        pack: (codes u8, block scale bits u8) -> the two arrays that the kernel reads.

    Returns:
        The shape of the codes, and the buffers of codes, block scales and global scale.
    """
    codes, block_scale, global_scale = node.inputs[1:4]
    q, s, g = (low.constant(v) for v in (codes, block_scale, global_scale))
    if codes is None or block_scale is None or q is None or s is None or g is None:
        raise unsupported(node, "codes and scales must be initializers")
    if (s.view(np.uint8) & 0x7F == 0x7F).any():
        raise InputError(f"{node.op_type} node '{node.name}': a block scale of '{block_scale.name}' is NaN")
    packed: list[np.ndarray] = []

    def part(index: int) -> np.ndarray:
        if not packed:
            packed.extend(pack(q.view(np.uint8) & 0xF, s.view(np.uint8)))
        return packed[index]

    return (q.shape[0], q.shape[1]), (
        low.weight(codes, layout, "u32", lambda: part(0)),
        low.weight(codes, f"{layout}/block_scale", "u8", lambda: part(1)),
        low.weight(codes, "global_scale", "f32", lambda: g.reshape(1).astype(np.float32)),
    )


@lowers("QLinearNVFP4", domain="ai.qgraph", data=(0,))
def qlinear_nvfp4(low: Lowering, node: ir.Node) -> None:
    """`QLinearNVFP4(x, codes, block_scale, global_scale)`: the weight stays packed, as `nvfp4_n16k8`."""
    x = node.inputs[0]
    if x is None:
        raise unsupported(node, "an input is missing")
    (k, n), weights = nvfp4_weight(low, node, "n16k8", packing.pack_nvfp4_n16k8)
    op, operand, params = left_operand(low, x, k, NVFP4)
    shape = low.shape(node.outputs[0])
    low.bind(node, Linear(node, op, operand, k, n, weights, shape, params=tuple(params.items())))


def left_operand(
    low: Lowering, x: ir.Value, k: int, weight: BlockFormat, packing: str = ""
) -> tuple[str, tuple[View, ...], dict[str, Any]]:
    """Which kernel multiplies x [.., k] by a weight of the format, its arguments for x, and what its spec
    says of these: where x is rounded to int8, codes for a product in integers; else x, and its digits if the
    kernel takes those."""
    digits = digit_rows(weight.name, packing, k)
    if digits is None or not low.device.integers:
        return weight.kernel, (low.operand(x),), {}
    codes = low.int8(x, k, digits.input)
    if codes is not None:
        return f"{weight.kernel}_a8", codes, {}
    # What a model rounds to NVFP4 is not rounded once more.
    source = x.producer()
    exact = source is not None and source.op_type == "DynamicQDQNVFP4"
    fewer = {} if exact or ("parts" in low.fewer_digits and weight != NVFP4) else low.fewer_digits
    return weight.kernel, (low.dense(x), low.digits(x, digits, fewer)), fewer


def f32_weight(low: Lowering, value: ir.Value, array: np.ndarray) -> Buffer:
    """A float32 weight [K, N], packed for its kernels."""
    return low.weight(value, "f32_n16", "f32", lambda: packing.pack_f32_n16(array))


@lowers("MatMul")
def matmul(low: Lowering, node: ir.Node) -> None:
    """MatMul: by a constant matrix through packed weights, else the general product of two tensors."""
    a, b = node.inputs
    if a is None or b is None:
        raise unsupported(node, "an input is missing")
    w = low.constant(b)
    if w is not None and w.ndim == 2 and w.size and len(low.shape(a)) >= 2 and low.dtype(a) == "f32":
        k, n = w.shape
        weights = (f32_weight(low, b, w),)
        low.bind(
            node, Linear(node, "matmul_f32", (low.operand(a),), k, n, weights, low.shape(node.outputs[0]))
        )
        return
    if low.dtype(a) != "f32":
        raise unsupported(node, f"operands of type {low.dtype(a)}; supported is f32")
    _general(low, node, low.view(a), low.view(b))


def _general(low: Lowering, node: ir.Node, a: View, b: View) -> None:
    one = sympy.Integer(1)
    # NumPy's rule for vectors: a row on the left, a column on the right; the added dim is not in the output.
    if a.rank == 1:
        a = replace(a, shape=(one, *a.shape), strides=(sympy.Integer(0), *a.strides))
    if b.rank == 1:
        b = replace(b, shape=(*b.shape, one), strides=(*b.strides, sympy.Integer(0)))
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    batch = broadcast([a.shape[:-2], b.shape[:-2]], f"MatMul '{node.name}'")
    out = low.allocate(node.outputs[0])
    y = out.reshape((*batch, m, n))
    if y is None:
        raise unsupported(node, "output is not dense")

    def outer(view: View) -> tuple[Dim, ...]:
        return View(view.buffer, view.shape[:-2], view.strides[:-2]).expand(batch).strides

    dims, strides = collapse(batch, [outer(a), outer(b), y.strides[:-2]])
    if len(dims) > 2:
        a, b = (low.copy(v.expand((*batch, *v.shape[-2:])), f"{node.name}/copy") for v in (a, b))
        dims, strides = collapse(batch, [outer(a), outer(b), y.strides[:-2]])
    pad = 2 - len(dims)
    (b0, b1) = (*(one,) * pad, *(d for d, _ in dims))
    zero = sympy.Integer(0)
    sa, sb, sy = ((*(zero,) * pad, *s) for s in strides)
    m_block, n_block = low.device.tile
    spec = KernelSpec.make("matmul_dynamic", m_block=m_block, n_block=n_block)
    args = [y, a, b, m, k, n, b1, *sa, *a.strides[-2:], *sb, *b.strides[-2:], *sy, y.strides[-2]]
    blocks = product((b0, b1)) * ceildiv(m, m_block) * ceildiv(n, n_block)
    step = low.emit(node.name or "MatMul", spec, args, blocks)
    low.layers.append((node, step))
    low.bind(node, out)
