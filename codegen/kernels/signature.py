"""Signatures that depend on the spec: TVMScript fixes a function's parameters, so some are dropped again."""

from __future__ import annotations

from collections.abc import Collection

from tvm.tirx import PrimFunc


def drop_parameters(func: PrimFunc, names: Collection[str]) -> PrimFunc:
    """`func` without the parameters in `names`, which its body must not use."""
    params = [p for p in func.params if p.name not in names]
    return PrimFunc(params, func.body, func.ret_type, func.attrs)
