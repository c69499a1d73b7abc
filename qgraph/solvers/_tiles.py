"""What the solvers share: the check of their input, tiles of whole blocks for threads to work on, and blocks
laid out as columns, for searches."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from qgraph.errors import InputError
from qgraph.formats import FORMATS, QTensor, e2m1
from qgraph.formats.nvfp4 import MAX_WEIGHT

S = TypeVar("S")
T = TypeVar("T")

# Blocks a tile. Threads hand the interpreter's lock to one another around every numpy call, which is only
# worth while when a call works for tens of microseconds; much larger tiles would leave the caches and the
# small layers one thread.
_BLOCKS_PER_TILE = 16384


class Tile(NamedTuple):
    """Slices of a [K, N] weight, and of its [blocks, N] scales."""

    rows: slice
    blocks: slice
    columns: slice


def tiles(K: int, N: int, block: int, size: int = _BLOCKS_PER_TILE) -> Iterator[Tile]:
    """Covers [K, N] with tiles of at most `size` whole blocks. A shorter last block of K has tiles of its
    own."""
    width = min(N, size)
    height = max(1, size // width)
    whole = K // block
    bands = [(b, min(b + height, whole)) for b in range(0, whole, height)]
    if K % block:
        bands.append((whole, whole + 1))
    for first, last in bands:
        for n in range(0, N, width):
            yield Tile(
                slice(first * block, min(last * block, K)), slice(first, last), slice(n, min(n + width, N))
            )


def column_slices(N: int, most: int) -> list[slice]:
    """Slices of 0..N-1, of about one size and at most `most`: the same whatever the number of threads."""
    width = -(-N // -(-N // most))
    return [slice(n, min(n + width, N)) for n in range(0, N, width)]


def check_weight(
    W: npt.NDArray[np.float32], name: str, largest: float = MAX_WEIGHT, numbers: str = "4-bit floats"
) -> float:
    """max|W|; InputError naming a weight that is not float32 [K, N], empty, not finite, or beyond `largest`,
    the most that `numbers` can represent."""
    what = f"weight '{name}'" if name else "the weight"
    if W.dtype != np.float32 or W.ndim != 2 or W.size == 0:
        raise InputError(f"{what} is {W.dtype} {list(W.shape)}; a solver takes float32 [K, N], not empty")
    amax = max(float(W.max()), -float(W.min()))
    if not np.isfinite(amax):
        bad = np.argwhere(~np.isfinite(W))
        k, n = (int(i) for i in bad[0])
        raise InputError(
            f"{what} holds {len(bad)} values that are not finite, the first {W[k, n]} at [{k}, {n}]: "
            "it cannot be quantized; exclude the layer or repair the model"
        )
    if amax > largest:
        raise InputError(
            f"{what} reaches {amax:.3g}, beyond the {largest:.3g} that {numbers} can represent safely; "
            "exclude the layer or repair the model"
        )
    return amax


def map_ordered(work: Callable[[S], T], items: Iterable[S], threads: int | None) -> list[T]:
    """work(item) of every item, in order: the same for any thread count, as items share nothing."""
    items = list(items)
    threads = min(len(items), thread_count(threads))
    if threads <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def fill(
    format: str,
    shape: tuple[int, int],
    a: np.float32,
    work: Callable[[int, Tile], tuple[npt.NDArray, npt.NDArray[np.uint8]]],
    threads: int | None,
) -> QTensor:
    """The QTensor [K, N] whose i-th tile is `work(i, tile)`: its block scales and codes."""
    spec = FORMATS[format]
    codes = np.empty(shape, np.uint8)
    block_scale = np.empty((spec.blocks(shape[0]), shape[1]), spec.scale_dtype)

    def store(item: tuple[int, Tile]) -> None:
        i, tile = item
        block_scale[tile.blocks, tile.columns], codes[tile.rows, tile.columns] = work(i, tile)

    map_ordered(store, enumerate(tiles(*shape, spec.block)), threads)
    return QTensor(format, shape, codes, block_scale, a)


_local = threading.local()


def scratch(count: int, size: int) -> npt.NDArray[np.float32]:
    """float32 [count, size] of undefined content, kept by the calling thread for its next tile.

    Fresh buffers of this size come from the kernel page by page, and threads that fault pages in wait for one
    another: with them two threads are slower than one.
    """
    if getattr(_local, "buffer", _EMPTY).size < count * size:
        _local.buffer = np.empty(count * size, np.float32)
    return _local.buffer[: count * size].reshape(count, size)


_EMPTY = np.empty(0, np.float32)


def columns(
    part: npt.NDArray[np.float32], block: int, a: np.float32, out: npt.NDArray
) -> npt.NDArray[np.float32]:
    """|w| / a of a tile [rows, width] as [rows of a block, blocks], in `out`, float32 [part.size].

    The blocks, now columns, have the order of the tile's scales.
    """
    rows, width = min(block, len(part)), part.shape[1]  # fewer rows in a shorter last block of K
    x = out.reshape(rows, -1, width)
    np.divide(part.reshape(-1, rows, width).transpose(1, 0, 2), a, out=x)
    return np.abs(x, out=x).reshape(rows, -1)


def round_at(
    x: npt.NDArray[np.float32], inverse: npt.NDArray[np.float32], buffers: Sequence[npt.NDArray[np.float32]]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(v, q) with v = x * inverse and q = E2M1(v), in the first two of three float32 buffers [>= x.size].

    x: [rows, blocks], not negative. inverse: [blocks], one over each block's scale.
    """
    v, q, magic = (b[: x.size].reshape(x.shape) for b in buffers)
    np.multiply(x, inverse, out=v)
    np.copyto(q, v)
    e2m1.round_magnitudes(q, magic)
    return v, q


def thread_count(threads: int | None) -> int:
    """`threads`, or one for every CPU that this process may use."""
    if threads:
        return threads
    if hasattr(os, "sched_getaffinity"):  # Linux: respects taskset and cpusets
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
