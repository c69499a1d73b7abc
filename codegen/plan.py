"""Steps over buffers -> the plan of runtime/FORMAT.md: value numbers, shared memory, JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from qgraph.codegen.dims import Dim, estimate, plan_expr, product, size
from qgraph.codegen.last_positions import LOGITS
from qgraph.codegen.lowering import Lowering
from qgraph.codegen.lowering.state import CAPACITY
from qgraph.codegen.memory import Buffer
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import QGraphError, UnsupportedError
from qgraph.passes.cache import Cache

# Sizes are int64 and checked at run time; this bound only catches nonsense early.
MAX_DIM = 1 << 24
MAX_BYTES = 1 << 47
CACHE_CAPACITY = 2048  # tokens that a session has room for, unless it is asked for another number


@dataclass
class Plan:
    """What the runtime executes, but for the code of its kernels.

    Attributes:
        document: the JSON object of FORMAT.md without `variants`.
        kernels: the specs behind `document["kernels"]`, in order.
        weights: the weight tensors, in order of first use.
    """

    document: dict[str, Any]
    kernels: list[KernelSpec]
    weights: list[Buffer]


def _shape(dims: tuple[Dim, ...]) -> list[Any]:
    return [plan_expr(d) for d in dims]


def _assign_slots(steps: list[list[Buffer]], temps: list[Buffer]) -> tuple[dict[Buffer, int], int]:
    """Give temporaries whose lifetimes do not overlap the same slot: at its first use a temporary takes the
    free slot nearest to it in size. Sizes are symbolic, so nearness is judged at an example of the dims."""
    first: dict[Buffer, int] = {}
    last: dict[Buffer, int] = {}
    for at, buffers in enumerate(steps):
        for buffer in buffers:
            first.setdefault(buffer, at)
            last[buffer] = at
    slot: dict[Buffer, int] = {}
    capacity: list[int] = []
    free: set[int] = set()
    for at, buffers in enumerate(steps):
        for buffer in dict.fromkeys(buffers):
            if buffer.kind != "temp" or first[buffer] != at:
                continue
            need = estimate(buffer.nbytes)
            if free:
                # Prefer the smallest slot that is large enough, else the largest one there is.
                index = min(free, key=lambda s: (capacity[s] < need, abs(capacity[s] - need), s))
                free.remove(index)
                capacity[index] = max(capacity[index], need)
            else:
                index = len(capacity)
                capacity.append(need)
            slot[buffer] = index
        free.update(slot[b] for b in dict.fromkeys(buffers) if b.kind == "temp" and last[b] == at)
    unplaced = [b for b in temps if b not in slot]
    if unplaced:
        raise QGraphError("a temporary is never used")
    return slot, len(capacity)


def _dims(
    inputs: list[Buffer], checks: list[tuple[Dim, Dim, str]], cache: Cache | None = None
) -> list[dict[str, Any]]:
    """The symbolic dims with their bounds, as far as a check bounds one of them by a number. What the inputs
    do not bind of them is the session's: the tokens that its state holds, and has room for."""
    names = dict.fromkeys(str(d.name) for buffer in inputs for d in buffer.shape if d.is_Symbol)
    names |= dict.fromkeys([cache.total, str(CAPACITY)] if cache else [])
    used = {str(s.name) for buffer in inputs for d in buffer.shape for s in d.free_symbols}
    free = used - set(names)
    if free:
        raise QGraphError(f"size '{sorted(free)[0]}' is the whole dimension of no input")
    low, high = dict.fromkeys(names, 1), dict.fromkeys(names, MAX_DIM)
    for a, b, _ in checks:
        if b.is_Symbol and a.is_Integer and b.name in high:
            high[b.name] = min(high[b.name], int(a))
        if a.is_Symbol and b.is_Integer and a.name in low:
            low[a.name] = max(low[a.name], int(b))
    if cache:  # what no run can fill needs no room
        high[str(CAPACITY)] = high[cache.total]
    for name in names:
        if low[name] > high[name]:
            raise UnsupportedError(
                f"no size of '{name}' is right: at least {low[name]}, at most {high[name]}"
            )
    return [{"name": name, "min": low[name], "max": high[name]} for name in names]


def make_plan(low: Lowering, checks: list[tuple[Dim, Dim, str]]) -> Plan:
    """Number the buffers, share memory among temporaries, and write the plan.

    Args:
        low: the lowered graph.
        checks: (a, b, message): a >= b must hold at run time.
    """
    per_step = [[arg[1] for arg in step.args if arg[0] == "v"] for step in low.steps]
    outputs = list(low.outputs.values())
    order = dict.fromkeys([*low.inputs, *outputs, *(b for buffers in per_step for b in buffers)])
    temps = [b for b in order if b.kind == "temp"]
    slot, slots = _assign_slots(per_step, temps)
    values = []
    for index, buffer in enumerate(order):
        buffer.index = index
        smallest = estimate(buffer.nbytes, 1)
        if smallest > MAX_BYTES:
            raise UnsupportedError(f"a tensor of {smallest} bytes at least cannot be held by any machine")
        if buffer.kind == "weight":
            values.append({"kind": "weight", "tensor": buffer.name})
            continue
        # Of a temporary only the size matters, and the runtime bounds ranks.
        shape = (product(buffer.shape),) if buffer.kind == "temp" else buffer.shape
        value: dict[str, Any] = {"kind": buffer.kind, "dtype": buffer.dtype, "shape": _shape(shape)}
        if buffer.kind == "temp":
            value["slot"] = slot[buffer]
        values.append(value)

    # By symbol, not by ==: 0.0 equals -0.0, and NaN does not equal itself.
    kernels = list({step.spec.symbol: step.spec for step in low.steps}.values())
    number = {spec.symbol: i for i, spec in enumerate(kernels)}
    steps = [
        {
            "name": step.name.replace("\0", "\\0"),  # only for people to read
            "kernel": number[step.spec.symbol],
            "args": [_arg(arg) for arg in step.args],
            "blocks": plan_expr(step.blocks),
            "grain": step.grain,
        }
        for step in low.steps
    ]
    dims = _dims(low.inputs, checks, low.cache)
    if low.positions is not None:
        most = next(dim["max"] for dim in dims if dim["name"] == str(low.positions))
        dims.append({"name": str(LOGITS), "min": 1, "max": most, "default": plan_expr(low.positions)})
        message = f"logits of more positions are asked for than the {low.positions} of this run"
        checks = [*checks, (low.positions, LOGITS, message)]
    document = {
        "version": 1,
        "dims": dims,
        "checks": [{"ge": [plan_expr(a), plan_expr(b)], "message": message} for a, b, message in checks],
        **({"state": _state(low.cache, dims)} if low.cache else {}),
        "inputs": [{"name": b.name, "value": b.index} for b in low.inputs],
        "outputs": [{"name": b.name, "value": b.index} for b in outputs],
        "values": values,
        "slots": slots,
        "kernels": [spec.symbol for spec in kernels],
        "steps": steps,
    }
    return Plan(document, kernels, [b for b in order if b.kind == "weight"])


def _state(cache: Cache, dims: list[dict[str, Any]]) -> dict[str, Any]:
    longest = next(dim["max"] for dim in dims if dim["name"] == str(CAPACITY))
    return {
        "total": cache.total,
        "new": plan_expr(size(cache.sequence)),
        "capacity": str(CAPACITY),
        "default": min(CACHE_CAPACITY, longest),
    }


def _arg(arg: tuple[Any, ...]) -> list[Any]:
    match arg[0]:
        case "v":
            return (
                ["v", arg[1].index] if sympy.sympify(arg[2]) == 0 else ["v", arg[1].index, plan_expr(arg[2])]
            )
        case "i":
            return ["i", plan_expr(arg[1])]
        case _:
            return list(arg)
