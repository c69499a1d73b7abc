"""Linear layers and embeddings in ONNX Runtime's contrib operators `MatMulNBits` and
`GatherBlockQuantized`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qgraph.export.nbits import means, planes
from qgraph.export.rewrite import Replacement, input_of, rank, weight_name
from qgraph.formats import FORMATS, nvfp4
from qgraph.formats.packing import pack_bits
from qgraph.passes.lowbit_weights import LOOKUPS, from_node

DOMAIN = "com.microsoft"
EXACT, INT8 = 0, 4  # accuracy_level: activations as they are, or rounded to int8 by the blocks of the weight


@dataclass(frozen=True)
class _Plane:
    """A plane as initializers: B, scales and, where there are some, zero points."""

    bits: int
    inputs: tuple[ir.Value, ...]


@dataclass(frozen=True)
class _Weight:
    K: int
    N: int
    block: int
    planes: tuple[_Plane, ...]
    means: ir.Value | None  # [ceil(K / block), N]


class NBits:
    """Writes the layers of one model; what they share, weights and sums of blocks, is written once."""

    def __init__(self) -> None:
        self._weights: dict[ir.Value, _Weight] = {}
        self._sums: dict[tuple[ir.Value, int], ir.Value] = {}

    def linear(self, node: ir.Node, x: ir.Value, *, accuracy: int, wide: bool) -> None:
        """x @ W in place of a linear layer, whose own input `x` may not be. The sum of a MatMulNBits for
        each plane of the weight (`nbits.planes`), and of sums of blocks of x times the means."""
        new = Replacement(node)
        W = self._weight(new, wide)
        terms = [
            new.add(
                f"plane_{i}", "MatMulNBits", x, *plane.inputs, domain=DOMAIN, K=W.K, N=W.N, bits=plane.bits,
                block_size=W.block, accuracy_level=accuracy,
            )
            for i, plane in enumerate(W.planes)
        ]  # fmt: skip
        if W.means is not None:
            terms.append(new.add("means", "MatMul", self._block_sums(node, x, W), W.means))
        _sum(new, terms)
        new.finish()

    def columns(self, node: ir.Node, *, wide: bool) -> None:
        """Columns of a linear layer's weight [K, N], [K, *ids]: rows of the same bytes, turned."""
        new = Replacement(node)
        W, ids = self._weight(new, wide), input_of(node, 0)
        terms = []
        for i, plane in enumerate(W.planes):
            rows = new.add(f"rows_{i}", "Reshape", plane.inputs[0], new.ints(f"rows_{i}_shape", W.N, -1))
            terms.append(_gather(new, f"levels_{i}", W.block, rows, ids, *plane.inputs[1:], bits=plane.bits))
        blocks = -(-W.K // W.block)
        if W.means is not None:
            picked = new.add("picked", "Gather", new.add("turned", "Transpose", W.means), ids)
            each = new.add("each", "Unsqueeze", picked, new.ints("last", -1))
            wide_means = new.add("wide", "Expand", each, new.ints("block", W.block))
            flat = new.ints("flat", *[0] * rank(ids), blocks * W.block)
            terms.append(new.add("means", "Reshape", wide_means, flat))
        value = _sum(new, terms)
        if blocks * W.block != W.K:
            value = new.add(
                "cut", "Slice", value, new.ints("from", 0), new.ints("to", W.K), new.ints("axis", -1)
            )
        _turn(new, value, ids)
        new.finish()

    def _weight(self, new: Replacement, wide: bool) -> _Weight:
        codes = input_of(new.node, 1)
        if codes not in self._weights:
            q, name = from_node(new.node), weight_name(new.node)
            scales: dict[int, ir.Value] = {}
            found = []
            for i, plane in enumerate(planes(q, wide)):
                label = f"{name}.plane_{i}"
                scale = scales.get(id(plane.scale))
                if scale is None:
                    scale = scales[id(plane.scale)] = new.tensor(
                        f"{label}.scale", np.ascontiguousarray(plane.scale.T)
                    )
                inputs = [new.tensor(label, plane.packed()), scale]
                if plane.zero_point is not None:
                    inputs.append(new.tensor(f"{label}.zero_point", plane.packed_zero_points()))
                found.append(_Plane(plane.bits, tuple(inputs)))
            M = means(q)
            held = None if M is None else new.tensor(f"{name}.means", M)
            self._weights[codes] = _Weight(*q.shape, FORMATS[q.format].block, tuple(found), held)
        return self._weights[codes]

    def _block_sums(self, node: ir.Node, x: ir.Value, W: _Weight) -> ir.Value:
        """x [.., K] summed up by blocks: [.., ceil(K / block)]; one node for all layers that read x."""
        if (x, W.block) not in self._sums:
            new = Replacement(node)
            sums = block_view(new, x, W.K, W.block, "sums")
            sums = new.add("sums", "ReduceSum", sums, new.ints("sums_axis", -1), keepdims=0)
            new.behind(x)
            self._sums[x, W.block] = sums
        return self._sums[x, W.block]


def fp4_rows(node: ir.Node) -> None:
    """A lookup in NVFP4, of rows of a table or columns of a linear layer's weight: GatherBlockQuantized
    takes E2M1 elements, and float scales."""
    new, q, name = Replacement(node), from_node(node), weight_name(node)
    scale = np.ascontiguousarray(nvfp4.scales(q.block_scale, q.global_scale).T)
    held, ids, codes = new.tensor(f"{name}.row_scale", scale), input_of(node, 0), input_of(node, 1)
    if node.op_type in LOOKUPS:
        _gather(new, "y", nvfp4.BLOCK, codes, ids, held)
    else:
        packed = ir.PackedTensor(
            pack_bits(q.codes.T, 4), ir.DataType.FLOAT4E2M1, shape=q.shape[::-1], name=f"{name}.rows"
        )
        rows = _gather(new, "rows", nvfp4.BLOCK, new.tensor(f"{name}.rows", packed), ids, held)
        _turn(new, rows, ids)
    new.finish()


def block_view(new: Replacement, x: ir.Value, K: int, block: int, part: str) -> ir.Value:
    """x [.., K] as [.., ceil(K / block), block], zeros behind its end."""
    shape = new.ints(f"{part}_shape", *[0] * (rank(x) - 1), -(-K // block), block)
    if missing := -K % block:
        pads, last = new.ints(f"{part}_pads", 0, missing), new.ints(f"{part}_last", -1)
        x = new.add(f"{part}_padded", "Pad", x, pads, None, last)
    return new.add(f"{part}_blocks", "Reshape", x, shape)


def _gather(new: Replacement, part: str, block: int, *inputs: ir.Value, **attributes: int) -> ir.Value:
    """Rows of a table, by indices, with scales for blocks of its rows."""
    axes = {"gather_axis": 0, "quantize_axis": 1}
    return new.add(
        part, "GatherBlockQuantized", *inputs, domain=DOMAIN, block_size=block, **axes, **attributes
    )


def _turn(new: Replacement, rows: ir.Value, ids: ir.Value) -> None:
    """[*ids, K] to [K, *ids], as columns are given."""
    new.add("y", "Transpose", rows, perm=[rank(ids), *range(rank(ids))])


def _sum(new: Replacement, terms: list[ir.Value]) -> ir.Value:
    total = terms[0]
    for i, term in enumerate(terms[1:]):
        total = new.add(f"sum_{i}", "Add", total, term)
    return total
