"""A sentence encoder of a few operators with MiniLM's inputs and outputs: what the SDK's programs run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

VOCABULARY, WIDTH = 50, 48

_TEXT = """<ir_version: 11, opset_import: ["" : 23]> encoder (
  int64[batch, sequence] input_ids,
  int64[batch, sequence] attention_mask,
  int64[batch, sequence] token_type_ids
) => (float[batch, sequence, 48] last_hidden_state, float[batch, 48] pooler_output)
<int64[1] last = {2}, int64 first = {0}> {
  words = Gather(words_table, input_ids)
  kinds = Gather(kinds_table, token_type_ids)
  sum = Add(words, kinds)
  mask = Cast<to = 1>(attention_mask)
  column = Unsqueeze(mask, last)
  kept = Mul(sum, column)
  [up] product = MatMul(kept, up_weight)
  biased = Add(product, up_bias)
  last_hidden_state = Gelu(biased)
  start = Gather<axis = 1>(last_hidden_state, first)
  [pool] pooled = MatMul(start, pool_weight)
  pooler_output = Tanh(pooled)
}"""


def save(path: Path) -> Path:
    """Write it."""
    model = onnx.parser.parse_model(_TEXT)
    rng = np.random.default_rng(0)
    shapes = {
        "words_table": (VOCABULARY, WIDTH),
        "kinds_table": (2, WIDTH),
        "up_weight": (WIDTH, WIDTH),
        "up_bias": (WIDTH,),
        "pool_weight": (WIDTH, WIDTH),
    }
    for name, shape in shapes.items():
        weight = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    onnx.save(model, path)
    return path
