"""Signatures that depend on the spec: TVMScript fixes a function's parameters, so optional ones are dropped."""

from __future__ import annotations

from collections.abc import Collection

from tvm.tirx import PrimFunc


def keep_parameters(func: PrimFunc, names: Collection[str]) -> PrimFunc:
    """`func` with those of its parameters that are in `names`; its body must not use the others."""
    return PrimFunc([p for p in func.params if p.name in names], func.body, func.ret_type, func.attrs)


def drop_parameters(func: PrimFunc, names: Collection[str]) -> PrimFunc:
    """`func` without the parameters in `names`, which its body must not use."""
    return keep_parameters(func, [p.name for p in func.params if p.name not in names])
