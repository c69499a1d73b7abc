"""Matrix products, attention, and what belongs to them."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.passes.shapes.dims import Dim
from qgraph.passes.shapes.node import NodeView, rule


def matmul_shape(n: NodeView, a: tuple[Dim, ...], b: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """numpy.matmul: vectors get an axis that the result loses again."""
    if not a or not b:
        n.fail("a scalar is not a matrix")
    left = (1, *a) if len(a) == 1 else a
    right = (*b, 1) if len(b) == 1 else b
    n.equal(left[-1], right[-2], "the inner dimensions of the product")
    shape = [*n.broadcast(left[:-2], right[:-2]), left[-2], right[-1]]
    if len(a) == 1:
        del shape[-2]
    if len(b) == 1:
        del shape[-1]
    return tuple(shape)


@rule("MatMul")
def matmul(n: NodeView) -> None:
    n.out(0, n.dtype(0), matmul_shape(n, n.shape(0), n.shape(1)))


@rule("MatMulInteger")
def matmul_integer(n: NodeView) -> None:
    n.out(0, ir.DataType.INT32, matmul_shape(n, n.shape(0), n.shape(1)))


@rule("Gemm")
def gemm(n: NodeView) -> None:
    if n.rank(0) != 2 or n.rank(1) != 2:
        n.fail("its operands must be matrices")
    a = n.shape(0)[::-1] if n.attr("transA", 0) else n.shape(0)
    b = n.shape(1)[::-1] if n.attr("transB", 0) else n.shape(1)
    shape = matmul_shape(n, a, b)
    if n.has(2) and n.broadcast(shape, n.shape(2)) != shape:
        n.fail(f"C of shape {list(n.shape(2))} does not broadcast to {list(shape)}")
    n.out(0, n.dtype(0), shape)


@rule("Einsum")
def einsum(n: NodeView) -> None:
    equation = (n.attr("equation") or "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if "." in equation:
        n.refuse("an ellipsis in the equation is not supported")
    if len(terms) != len(n):
        n.fail(f"equation '{equation}' has {len(terms)} terms for {len(n)} inputs")
    sizes: dict[str, Dim] = {}
    for index, term in enumerate(terms):
        if len(term) != n.rank(index):
            n.fail(f"term '{term}' does not fit rank {n.rank(index)}")
        for letter, dim in zip(term, n.shape(index), strict=True):
            known = sizes.get(letter, 1)
            sizes[letter] = (
                dim if known == 1 else known if dim == 1 else n.equal(known, dim, f"axis '{letter}'")
            )
    if not arrow:
        right = "".join(sorted(c for c in sizes if left.count(c) == 1))
    if any(c not in sizes for c in right):
        n.fail(f"equation '{equation}' outputs an axis that no input has")
    n.out(0, n.dtype(0), [sizes[c] for c in right])


@rule("Attention")
def attention(n: NodeView) -> None:
    """Inputs Q, K, V [B, heads, L, size] or [B, L, heads * size], mask, past key and value [B, heads, P,
    size].

    Outputs Y like Q with V's head size, present key and value [B, heads, P + L, size], and the scores.
    """
    three = n.rank(0) == 3
    if three:
        q_heads, kv_heads = n.attr("q_num_heads"), n.attr("kv_num_heads")
        if not q_heads or not kv_heads:
            n.fail("3-D inputs need the attributes q_num_heads and kv_num_heads")
        batch, length, _ = n.shape(0)
        key_length = n.shape(1)[1]
        sizes = [_split_heads(n, i, heads) for i, heads in ((0, q_heads), (1, kv_heads), (2, kv_heads))]
    else:
        if any(n.rank(i) != 4 for i in range(3)):
            n.fail("Q, K and V must all be 4-D or all 3-D")
        batch, q_heads, length, _ = n.shape(0)
        kv_heads, key_length = n.shape(1)[1], n.shape(1)[2]
        sizes = [n.shape(i)[-1] for i in range(3)]
        n.equal(n.shape(2)[1], kv_heads, "heads of key and value")
    for index in (1, 2):
        n.equal(batch, n.shape(index)[0], "batch of query, key and value")
    n.equal(key_length, n.shape(2)[1 if three else 2], "lengths of key and value")
    n.equal(sizes[0], sizes[1], "head sizes of query and key")
    if isinstance(q_heads, int) and isinstance(kv_heads, int) and q_heads % kv_heads:
        n.fail(f"{q_heads} query heads are not a multiple of {kv_heads} key heads")
    past: Dim = 0
    for index in (4, 5):
        if n.has(index):
            if n.rank(index) != 4:
                n.fail("past key and value must be 4-D")
            past = n.shape(index)[2]
            n.equal(batch, n.shape(index)[0], "batch of the past")
            n.equal(kv_heads, n.shape(index)[1], "heads of the past")
    if n.has(4) and n.has(5):
        n.equal(n.shape(4)[2], n.shape(5)[2], "lengths of past key and value")
    total = past + key_length
    scores = (batch, q_heads, length, total)
    if n.has(3) and n.broadcast(scores, n.shape(3)) != n.broadcast(scores):
        n.fail(f"the mask {list(n.shape(3))} does not broadcast to {list(scores)}")
    shape = (batch, length, q_heads * sizes[2]) if three else (batch, q_heads, length, sizes[2])
    n.out(0, n.dtype(0), shape)
    n.out(1, n.dtype(1), (batch, kv_heads, total, sizes[1]))
    n.out(2, n.dtype(2), (batch, kv_heads, total, sizes[2]))
    n.out(3, n.dtype(0), scores)


def _split_heads(n: NodeView, index: int, heads: int) -> Dim:
    if n.rank(index) != 3:
        n.fail("Q, K and V must all be 4-D or all 3-D")
    hidden = n.shape(index)[2]
    if not isinstance(hidden, int) or hidden % heads:
        n.fail(f"{heads} heads do not divide its hidden size {hidden}")
    return hidden // heads


@rule("RotaryEmbedding")
def rotary(n: NodeView) -> None:
    """x [B, heads, L, size] or [B, L, heads * size]; cos and sin [B or 1, L, size/2], or tables with
    position ids.

    A cache of batch 1 under a larger batch is beyond the standard, but is what the torch exporter writes.
    """
    x = n.shape(0)
    if len(x) not in (3, 4):
        n.fail(f"its input has rank {len(x)}, not 3 or 4")
    batch, length = x[0], x[-2] if len(x) == 4 else x[1]
    if n.rank(1) != n.rank(2) or n.rank(1) != (2 if n.has(3) else 3):
        n.fail("its caches have the wrong rank")
    for index in (1, 2):
        if not n.has(3):
            if n.shape(index)[0] != 1:
                n.equal(n.shape(index)[0], batch, "batch of input and cache")
            n.equal(n.shape(index)[1], length, "lengths of input and cache")
        n.equal(n.shape(index)[-1], n.shape(1)[-1], "widths of the caches")
    if n.has(3):
        n.equal(n.shape(3)[0], batch, "batch of input and positions")
        n.equal(n.shape(3)[1], length, "lengths of input and positions")
    n.out(0, n.dtype(0), x)


@rule("Det")
def determinant(n: NodeView) -> None:
    n.out(0, n.dtype(0), n.shape(0)[:-2])
