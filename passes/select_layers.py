"""Decides, for every linear layer and embedding, whether its weight is quantized, and says why not."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

import onnx_ir as ir

from qgraph.errors import UsageError
from qgraph.passes.base import GraphPass, attribute, is_op

DECISIONS = "qgraph.decisions"  # key of model.meta: list[LayerDecision], in graph order
DECISION = "qgraph.decision"  # key of node.meta: the node's LayerDecision
KEPT = "qgraph.kept"  # key of a node's metadata_props: why its weight stays float

# Below these a layer is too small to gain: scales and rounding cost more than the bytes saved are worth.
MIN_K, MIN_N = 32, 16

# Elements of a table. A smaller one, such as that of token types [2, H], would save less than 14 KiB, and its
# few rows are each read for a large share of all tokens: their error is a bias that nothing averages out.
MIN_TABLE = 4096

# torch.onnx writes here the modules around a node, outermost first, then the node's own name.
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class LayerDecision:
    """What becomes of one node that multiplies by, or looks up in, a weight; or could have done."""

    node_name: str
    module: str  # path of the module it came from, empty when the exporter did not say
    op_type: str
    weight: str  # the initializer; empty where both operands are activations
    shape: tuple[int, ...]  # of the weight; (K, N) where it can be quantized
    quantize: bool
    reason: str  # why it is kept in float; empty when quantized
    scheme: str = ""  # its own, instead of the run's
    solver: str = ""  # for that scheme; empty is the scheme's default


@dataclass(frozen=True)
class Override:
    """Layers that match a pattern get a scheme of their own; an empty solver is the scheme's default."""

    pattern: str
    scheme: str
    solver: str = ""


@dataclass(frozen=True)
class _Candidate:
    node: ir.Node
    weight: ir.Value | None
    obstacle: str  # why it cannot be quantized at all
    doubt: str  # why it is kept unless the user asks for it

    @property
    def names(self) -> list[str]:
        """What a pattern is matched against: node, weight, operator, and every module around the node."""
        names = [self.node.name or "", self.node.op_type, *module_scopes(self.node)]
        return names + ([self.weight.name or ""] if self.weight is not None else [])


class SelectLayers(GraphPass):
    """Stores a `LayerDecision` for every MatMul and Gemm, and every Gather from a weight, in
    `model.meta[DECISIONS]`.

    Rules, the first that holds decides:
    1. What no kernel could use is kept: products of activations, weights that are no float32 [K, N] right
       operand of a MatMul, weights that callers may override, lookups that do not pick rows of a float32
       [V, H] table. With `embeddings` "float" every table is kept, with "tied" all that are not tied.
    2. A layer that matches `exclude` is kept; with `include` given, a layer that does not match it is kept.
    3. A layer that is small (K < 32 or N < 16; a table of fewer than 4096 elements), or whose weight is read
       some other way too, is kept unless it matches `include`.
    4. The rest is quantized: by the scheme of the last of `overrides` that it matches, if any; one by `none`
       is kept.
    5. A table that is tied to linear layers (a Gather along axis 1 of their weight) goes with them, and is
       stored once; with `embeddings` "float" all of these are kept. Where no override names such a layer, its
       scheme is `tied`, if given: what is multiplied last and read first is worth more bits than the rest.

    A pattern is a shell wildcard, or after `re:` a regular expression to be found anywhere, for the name of
    the node, of its weight, of its operator, or of a module around it (`encoder.layer.0` is everything in
    that module). Nodes kept get the reason in `metadata_props["qgraph.kept"]`.

    Raises UsageError for a pattern that matches nothing, an `include` or an override that can have no effect,
    a bad regular expression.
    """

    def __init__(
        self,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        embeddings: str = "float",
        overrides: Sequence[Override] = (),
        tied: str = "",
    ) -> None:
        super().__init__()
        self.overrides = tuple(overrides)
        self.tied = Override("", tied) if tied else None
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.embeddings = embeddings

    def requires(self, model: ir.Model) -> None:
        """Nodes have names: decisions and reports refer to them."""
        unnamed = next((n for n in model.graph.all_nodes() if not n.name), None)
        if unnamed is not None:
            raise ir.passes.PreconditionError(f"a {unnamed.op_type} node has no name")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = (_candidate(node, self.embeddings) for node in model.graph.all_nodes())
        candidates = [candidate for candidate in found if candidate is not None]
        included = _matched(self.include, candidates, "include")
        excluded = _matched(self.exclude, candidates, "exclude")
        own: dict[int, Override] = {}
        for later in self.overrides:
            hits = _matched([later.pattern], candidates, "layer")
            if all(is_op(candidates[i].node, "Gather") for i in hits):
                raise UsageError(
                    f"layer pattern '{later.pattern}' matches only embeddings, whose format 'embeddings' "
                    "says: leave them in float by 'exclude'"
                )
            if all(candidates[i].doubt and i not in included for i in hits if not candidates[i].obstacle):
                example = next(candidates[i] for i in sorted(hits) if not candidates[i].obstacle)
                raise UsageError(
                    f"layer pattern '{later.pattern}' matches only layers that are kept in float, such as "
                    f"'{example.node.name}': {example.doubt}; 'include' quantizes them all the same"
                )
            own.update(dict.fromkeys(hits, later))
        decisions = []
        modified = False
        for i, candidate in enumerate(candidates):
            override = None if is_op(candidate.node, "Gather") else own.get(i)
            if override is None and _is_tied(candidate):
                override = self.tied
            reason = candidate.obstacle
            if not reason and i in excluded:
                reason = "excluded by the user"
            elif not reason and self.include and i not in included:
                reason = "not among the layers to include"
            elif not reason and i not in included:
                reason = candidate.doubt
            if not reason and override is not None and override.scheme == "none":
                reason = "scheme none"
            decisions.append(_decision(candidate, reason, override))
        decisions = _follow(candidates, decisions)
        for candidate, decision in zip(candidates, decisions, strict=True):
            candidate.node.meta[DECISION] = decision
            if decision.reason:
                modified |= candidate.node.metadata_props.get(KEPT) != decision.reason
                candidate.node.metadata_props[KEPT] = decision.reason
            else:
                modified |= candidate.node.metadata_props.pop(KEPT, None) is not None
        modified |= model.meta.get(DECISIONS) != decisions
        model.meta[DECISIONS] = decisions
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """Every decision carries a reason or is a weight [K, N]."""
        for decision in model.meta[DECISIONS]:
            if decision.quantize == bool(decision.reason) or (decision.quantize and len(decision.shape) != 2):
                raise ir.passes.PostconditionError(f"undecided: {decision}")


def module_scopes(node: ir.Node) -> list[str]:
    """The modules around a node, outermost first, without the nameless root. Empty when the exporter did not
    say.

    torch.onnx writes them as the text of a Python list. What is not such a list counts as nothing.
    """
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    if not isinstance(scopes, list):
        return []
    return [scope for scope in scopes[:-1] if isinstance(scope, str) and scope]


def _candidate(node: ir.Node, embeddings: str) -> _Candidate | None:
    if is_op(node, "Gather"):
        table = node.inputs[0]
        tensor = _weight(table)
        if table is None or tensor is None or not tensor.dtype.is_floating_point() or len(tensor.shape) < 2:
            return None  # picks from an activation or from a list of numbers
        if picks_columns(node):
            layers = ", ".join(user.name or "" for user in _products(table))
            kept = f"embedding: tied to {layers}: --embeddings tied quantizes both"
            return _Candidate(
                node, table, _obstacle(node, table) or (kept if embeddings == "float" else ""), ""
            )
        obstacle, doubt = _lookup_obstacle(node, table), _lookup_doubt(table)
        if embeddings != "nvfp4" and not obstacle:
            obstacle = doubt or "embedding: --embeddings nvfp4 quantizes it"
        return _Candidate(node, table, obstacle, doubt)
    if not is_op(node, "MatMul", "Gemm"):
        return None
    left, right = node.inputs[0], node.inputs[1]
    if right is None or _weight(right) is None:
        if _weight(left) is not None:
            return _Candidate(node, left, "the weight is the left operand", "")
        return _Candidate(node, None, "both operands are activations", "")
    return _Candidate(node, right, _obstacle(node, right), _doubt(right, embeddings))


def picks_columns(node: ir.Node) -> bool:
    """Whether `node` looks up columns of the weight of a MatMul: an embedding tied to it."""
    table = node.inputs[0] if is_op(node, "Gather") else None
    tensor = _weight(table)
    return (
        table is not None
        and tensor is not None
        and len(tensor.shape) == 2
        and attribute(node, "axis", 0) in (1, -1)
        and bool(_products(table))
    )


def _is_tied(candidate: _Candidate) -> bool:
    """Whether it is a layer whose weight is an embedding's table, too."""
    weight = candidate.weight
    return (
        is_op(candidate.node, "MatMul")
        and weight is not None
        and any(picks_columns(user) for user, _ in weight.uses())
    )


def _products(weight: ir.Value) -> list[ir.Node]:
    """The MatMuls by a weight."""
    return [user for user, index in weight.uses() if is_op(user, "MatMul") and index == 1]


def _follow(candidates: Sequence[_Candidate], decisions: list[LayerDecision]) -> list[LayerDecision]:
    """The decisions with those of tied tables brought in line with the layers': all of them, or none."""
    found = list(decisions)
    for i, candidate in enumerate(candidates):
        if not found[i].quantize or candidate.weight is None or not picks_columns(candidate.node):
            continue
        users = {user for user, _ in candidate.weight.uses()}
        others = [d for c, d in zip(candidates, decisions, strict=True) if c.node in users]
        if kept := next((d for d in others if not d.quantize), None):
            found[i] = replace(found[i], quantize=False, reason=f"tied to {kept.node_name}: {kept.reason}")
            continue
        layer = next(d for d in others if d.op_type == "MatMul")
        found[i] = replace(found[i], scheme=layer.scheme, solver=layer.solver)
    return found


def _weight(value: ir.Value | None) -> ir.TensorProtocol | None:
    return value.const_value if value is not None and value.is_initializer() else None


def _obstacle(node: ir.Node, weight: ir.Value) -> str:
    tensor = _weight(weight)
    assert tensor is not None
    if weight.is_graph_input():
        return "the weight is an input that callers may override"
    if node.op_type not in ("MatMul", "Gather"):
        return f"a {node.op_type} that was not rewritten to MatMul"
    if tensor.dtype != ir.DataType.FLOAT:
        return f"the weight is {tensor.dtype}, not float32"
    if len(tensor.shape) != 2:
        return f"the weight has {len(tensor.shape)} dims, not [K, N]"
    if tensor.size == 0:
        return "the weight is empty"
    return ""


def _lookup_obstacle(node: ir.Node, table: ir.Value) -> str:
    tensor = _weight(table)
    assert tensor is not None
    if products := [user.name or "" for user, _ in table.uses() if is_op(user, "MatMul")]:
        return f"embedding: its table is multiplied by in {', '.join(products)}"
    if table.is_graph_input():
        return "embedding: the table is an input that callers may override"
    if tensor.dtype != ir.DataType.FLOAT:
        return f"embedding: the table is {tensor.dtype}, not float32"
    if len(tensor.shape) != 2 or not _picks_rows(node, table):
        return "embedding: the lookup does not pick rows of a matrix"
    if tensor.size == 0:
        return "embedding: the table is empty"
    return ""


def _lookup_doubt(table: ir.Value) -> str:
    tensor = _weight(table)
    assert tensor is not None
    if others := _others(table, [user for user, _ in table.uses() if not _picks_rows(user, table)]):
        return f"embedding: the table is shared with {others}: quantizing would store it twice"
    if tensor.size < MIN_TABLE:
        return f"embedding: too small to gain: {list(tensor.shape.numpy())} is below {MIN_TABLE} elements"
    return ""


def _picks_rows(node: ir.Node, table: ir.Value) -> bool:
    """Whether `node` is a lookup in the matrix `table`, along its first axis."""
    return is_op(node, "Gather") and node.inputs[0] is table and attribute(node, "axis", 0) in (0, -2)


def _others(weight: ir.Value, readers: Iterable[ir.Node]) -> str:
    """What else needs the floats of `weight`: the operators of `readers`, the caller."""
    others = sorted({reader.op_type for reader in readers})
    return ", ".join(others + (["the graph's outputs"] if weight.is_graph_output() else []))


def _doubt(weight: ir.Value, embeddings: str) -> str:
    readers = [user for user, _ in weight.uses() if not is_op(user, "MatMul")]
    if embeddings != "float":
        readers = [user for user in readers if not picks_columns(user)]
    if others := _others(weight, readers):
        return f"the weight is shared with {others}: quantizing would store it twice"
    tensor = _weight(weight)
    assert tensor is not None
    K, N = (*tensor.shape.numpy(), 1, 1)[:2]
    if K < MIN_K or N < MIN_N:
        return f"too small to gain: [{K}, {N}] is below [{MIN_K}, {MIN_N}]"
    return ""


def _decision(candidate: _Candidate, reason: str, override: Override | None) -> LayerDecision:
    node, weight = candidate.node, candidate.weight
    tensor = _weight(weight)
    scopes = module_scopes(node)
    return LayerDecision(
        node_name=node.name or "",
        module=scopes[-1] if scopes else "",
        op_type=node.op_type,
        weight=(weight.name or "") if weight is not None else "",
        shape=tuple(tensor.shape.numpy()) if tensor is not None else (),
        quantize=not reason,
        reason=reason,
        scheme=override.scheme if override is not None and not reason else "",
        solver=override.solver if override is not None and not reason else "",
    )


def _matched(patterns: Iterable[str], candidates: Sequence[_Candidate], option: str) -> set[int]:
    """Indices of the candidates that some pattern matches. UsageError for a pattern that does nothing."""
    found: set[int] = set()
    for pattern in patterns:
        hits = {
            i for i, c in enumerate(candidates) if any(_matches(pattern, name, option) for name in c.names)
        }
        if not hits:
            known = sorted({name for c in candidates for name in c.names if name})
            near = get_close_matches(pattern.removeprefix("re:"), known, n=3, cutoff=0.4)
            hint = f"; near matches: {', '.join(near)}" if near else ""
            raise UsageError(f"{option} pattern '{pattern}' matches no layer{hint}")
        if option in ("include", "layer") and all(candidates[i].obstacle for i in hits):
            example = candidates[min(hits)]
            raise UsageError(
                f"{option} pattern '{pattern}' matches only layers that cannot be quantized, "
                f"such as '{example.node.name}': {example.obstacle}"
            )
        found |= hits
    return found


def _matches(pattern: str, name: str, option: str) -> bool:
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    try:
        return re.search(pattern.removeprefix("re:"), name) is not None
    except re.error as error:
        raise UsageError(f"{option} pattern '{pattern}' is not a regular expression: {error}") from error
