"""KernelSpec: what the planner asks of the kernel library, as plain data. Knows nothing of TVM."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

ELEMENTWISE_BLOCK = 4096  # elements of one block of an elementwise kernel over a single dim
CUDA_ELEMENTWISE_BLOCK = 1024  # the same of a CUDA kernel, whatever the dims
CUDA_TILE = 64  # rows, and columns, that a CUDA kernel does of a product in float32
CUDA_FEW_COLUMNS = 32  # outputs that a CUDA kernel does of a product of few rows by packed weights
CUDA_MANY_ROWS, CUDA_MANY_COLUMNS = 128, 128  # the same of one on tensor cores
# What the epilogue of a product [M, N] may read, in the order that kernels take it: [N] and [M, N] to add,
# [M, N] to multiply by.
EPILOGUE_OPERANDS = ("bias", "residual", "factor")
ATTENTION_TILE = 64  # keys that `attention` decodes to its scratch at a time, at most


def attention_scratch(head_dim: int, value_dim: int) -> int:
    """Bytes of a worker's scratch memory, for `attention` over keys and values as int8 codes."""
    return ATTENTION_TILE * (head_dim + value_dim) * 4


def _freeze(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(v) for v in value)
    return value


@dataclass(frozen=True)
class KernelSpec:
    """One kernel to generate: an operation and its compile-time parameters.

    Specs with the same `symbol` are one kernel in the artifact. `params` holds only str, int, float, bool and
    nested tuples of them, so that the symbol is a stable function of the content.
    """

    op: str
    params: tuple[tuple[str, Any], ...]

    @staticmethod
    def make(op: str, /, **params: Any) -> KernelSpec:
        return KernelSpec(op, tuple(sorted((k, _freeze(v)) for k, v in params.items())))

    def __getitem__(self, name: str) -> Any:
        for key, value in self.params:
            if key == name:
                return value
        raise KeyError(name)

    @property
    def symbol(self) -> str:
        """The C symbol: `qg_<op>_<12 hex digits of the parameters' hash>`."""
        digest = hashlib.sha256(json.dumps([self.op, self.params]).encode()).hexdigest()
        return f"qg_{self.op}_{digest[:12]}"
