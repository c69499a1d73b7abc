"""Stock ONNX Runtime on NVIDIA GPUs: NVFP4 linear layers are `MatMulBlockQuantizedFp4Weight`, which takes the
codes and the E4M3 scales as they are, those of other formats MatMulNBits, tables GatherBlockQuantized.

The NVFP4 operator multiplies float16: its input and output are cast. Roundings of activations are standard
operators on float32, so that they are those of the scheme.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.export import Context
from qgraph.export.matmul_nbits import DOMAIN, EXACT, NBits, fp4_rows
from qgraph.export.rewrite import Replacement, constant_shape, finish, input_of, to_float, weight_name
from qgraph.export.round_activations import round_nvfp4
from qgraph.formats import nvfp4
from qgraph.formats.packing import pack_bits
from qgraph.passes.lowbit_functions import ROUNDINGS, lowbit_nodes
from qgraph.passes.lowbit_weights import COLUMNS, FORMS, LOOKUPS, from_node

LINEAR_FP4, COLUMNS_FP4 = FORMS["nvfp4"].linear, FORMS["nvfp4"].columns


def export(model: ir.Model, context: Context) -> ir.Model:
    """See `qgraph.export`."""
    nbits = NBits()
    held: dict[ir.Value, tuple[ir.Value, ...]] = {}
    tables: dict[ir.Value, ir.Value] = {}
    for node in lowbit_nodes(model):
        if node.op_type in ROUNDINGS.values():
            if node.op_type == ROUNDINGS["nvfp4"]:
                round_nvfp4(node)
            continue
        if node.op_type in LOOKUPS or node.op_type == COLUMNS_FP4:
            fp4_rows(node)
        elif node.op_type in COLUMNS:
            nbits.columns(node, wide=False)
        elif node.op_type != LINEAR_FP4:
            nbits.linear(node, input_of(node, 0), accuracy=EXACT, wide=False)
        elif (K := constant_shape(input_of(node, 1))[0]) % 2:
            context.leave(node, f"ONNX Runtime's NVFP4 MatMul takes an even number of inputs, not {K}")
            to_float(node, tables)
            continue
        else:
            _fp4(node, held)
        context.keep(node)
    return finish(model, {DOMAIN: 1})


def _fp4(node: ir.Node, held: dict[ir.Value, tuple[ir.Value, ...]]) -> None:
    """A linear layer in float16, `held` the weights that are there already."""
    new, codes = Replacement(node), input_of(node, 1)
    if codes not in held:
        q, name = from_node(node), weight_name(node)
        K, N = q.shape
        held[codes] = (
            new.tensor(f"{name}.fp4", pack_bits(q.codes.T, 4).reshape(N, K // 2)),
            new.tensor(f"{name}.fp4_scale", np.ascontiguousarray(q.block_scale.T).view(np.uint8)),
            input_of(node, 3),
        )
    x = new.add("x_f16", "Cast", input_of(node, 0), to=int(ir.DataType.FLOAT16))
    y = new.add(
        "y_f16", "MatMulBlockQuantizedFp4Weight", x, *held[codes], domain=DOMAIN, block_size=nvfp4.BLOCK
    )
    new.add("y", "Cast", y, to=int(ir.DataType.FLOAT))
    new.finish()
