"""Stock ONNX Runtime on CPUs: linear layers are MatMulNBits, lookups in NVFP4 tables GatherBlockQuantized.

Its kernels for float activations are those of 4 bits (the others dequantize the whole weight in every run),
so there all formats are sums of 4-bit planes; docs/exports.md has the figures. Where the scheme rounds
activations to int8, `accuracy_level` 4 does in place of `DynamicQDQInt8`: ONNX Runtime rounds, too, by the
blocks of the weight instead of by tokens, and multiplies integers; planes then have the bits of the levels.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from qgraph.export import Context
from qgraph.export.matmul_nbits import DOMAIN, EXACT, INT8, NBits, fp4_rows
from qgraph.export.rewrite import finish, input_of
from qgraph.export.round_activations import round_nvfp4
from qgraph.formats import FORMATS
from qgraph.passes.lowbit_functions import ROUNDINGS, lowbit_nodes
from qgraph.passes.lowbit_weights import COLUMNS, LINEARS, LOOKUPS

if TYPE_CHECKING:
    from qgraph.evaluate.runners import Runner


def export(model: ir.Model, context: Context) -> ir.Model:
    """See `qgraph.export`. With `context.exact` products are of floats, and activations are rounded by the
    scheme: the same weights, without what ONNX Runtime rounds."""
    nbits, nodes = NBits(), lowbit_nodes(model)
    for node in nodes:
        if node.op_type in LINEARS:
            x = input_of(node, 0)
            source = x.producer()
            rounds = source is not None and source.op_type == ROUNDINGS["int8"]
            if source is not None and rounds and not context.exact:
                _note_rounding(node, context)
                nbits.linear(node, input_of(source, 0), accuracy=INT8, wide=False)
            else:
                nbits.linear(node, x, accuracy=EXACT, wide=not rounds)
            context.keep(node)
    for node in nodes:
        if node.op_type in COLUMNS:
            nbits.columns(node, wide=True)
            context.keep(node)
        elif node.op_type in LOOKUPS:
            fp4_rows(node)
            context.keep(node)
        elif node.op_type == ROUNDINGS["nvfp4"]:
            round_nvfp4(node)
    return finish(model, {DOMAIN: 1})


def _note_rounding(node: ir.Node, context: Context) -> None:
    """How ONNX Runtime rounds the input of a layer; means are multiplied by what is not rounded."""
    spec, name = FORMATS[LINEARS[node.op_type].format], str(input_of(node, 0).name)
    block = None if spec.offset == "mean" else spec.block
    context.rounds[name] = block if context.rounds.get(name, block) == block else None


def open_runner(path: Path, threads: int) -> Runner:
    """The file in ONNX Runtime."""
    from qgraph.evaluate.runners import OnnxRuntimeRunner

    return OnnxRuntimeRunner(path, threads=threads)
