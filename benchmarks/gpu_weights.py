"""Weights made up, where a skeleton leaves them out (gpu_skeleton.py); and the matrix that tensors mean.

Layouts are those of runtime/FORMAT.md, by the packers of codegen; a tensor's name ends with its layout.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qgraph.codegen import packing, packing_group
from qgraph.formats import FORMATS, QTensor, e4m3

LANES = packing.LANES
TILES = 16  # of 16 outputs that are made; a larger weight repeats them
LOWEST_SCALE, HIGHEST_SCALE = 112, 126  # E4M3 bits of block scales: 128 to 448, as large blocks have
F32_LAYOUTS = ("f32_n16",)
CODE_LAYOUTS = {
    "n16k8": "nvfp4",
    "n16b2": "ternary",
    "n16t5": "ternary",
    "n16b3": "int3",
    "n16b4": "int4",
    "n16b8": "int8",
}
SCHEMES_OF_TWO_BITS = ("ternary", "int2")


def weight_format(layout: str, scheme: str, zero_points: bool) -> str:
    """The format of codes in a layout, a key of `FORMATS`; zero_points: whether there are any."""
    if layout == "n16b2":
        return next((name for name in SCHEMES_OF_TWO_BITS if scheme.startswith(name)), "ternary")
    if layout == "n16b4" and not zero_points:
        return "int4-sym"
    return CODE_LAYOUTS[layout]


def made_up(
    name: str, shape: tuple[int, ...], like: np.dtype, scheme: str, names: frozenset[str]
) -> np.ndarray:
    """Seeded content for a weight tensor: valid codes, and scales with which W is near 1 / sqrt(K).

    Args:
        name, shape, like: the tensor; names: of all tensors, for what belongs together.
        scheme: the artifact's.

    Raises ValueError for a tensor that is no weight of a matrix, nor a table.
    """
    rng = np.random.default_rng(list(name.encode()))
    stem, _, layout = name.rpartition("/")
    part = stem.rpartition(".")[2]
    if layout in CODE_LAYOUTS:
        zero_points = _has_zero_points(stem.removesuffix("codes"), names)
        return _repeated(_codes(rng, shape, layout, weight_format(layout, scheme, zero_points)), shape, like)
    if layout == "block_scale":  # of NVFP4, E4M3 bits
        bits = rng.integers(LOWEST_SCALE, HIGHEST_SCALE + 1, (TILES, *shape[1:]), np.uint8)
        return _repeated(bits, shape, like)
    if part == "zero_point":
        return _repeated(rng.integers(0, 256, (TILES, *shape[1:]), np.uint8), shape, like)
    if part in ("block_scale", "mean"):
        base = stem.removesuffix(part)
        codes = next(other for other in names if other.startswith(f"{base}codes/")).rpartition("/")[2]
        spec = FORMATS[weight_format(codes, scheme, _has_zero_points(base, names))]
        rms = float(np.sqrt(np.mean(np.square(spec.values.astype(np.float64)))))
        unit = 1 / (rms * (shape[1] * spec.block) ** 0.5)
        shift = 0.5 if part == "block_scale" else -0.5
        return _repeated((rng.random((TILES, *shape[1:])) + shift) * unit, shape, like)
    if like == np.float32:
        depth = shape[1] if layout in F32_LAYOUTS else 2500  # 0.02, as tables begin
        values = rng.standard_normal((TILES, *shape[1:]), np.float32) / np.float32(depth**0.5)
        return _repeated(values, shape, like)
    raise ValueError(f"no content can be made up for {name}, {like} {list(shape)}")


def _has_zero_points(base: str, names: frozenset[str]) -> bool:
    return any(name.startswith(f"{base}zero_point/") for name in names)


def can_be_made_up(name: str, like: np.dtype) -> bool:
    """Whether `made_up` takes a tensor of that name."""
    stem, _, layout = name.rpartition("/")
    parts = ("zero_point", "block_scale", "mean")
    known = layout in CODE_LAYOUTS or layout == "block_scale" or stem.rpartition(".")[2] in parts
    return known or like == np.float32


def _codes(rng: np.random.Generator, shape: tuple[int, ...], layout: str, name: str) -> np.ndarray:
    """Packed codes [TILES, rows, 16]: as many inputs as rows hold."""
    spec = FORMATS[name]
    if layout == "n16k8":
        return rng.integers(0, 1 << 32, (TILES, *shape[1:]), np.uint32)
    bits = {"n16b3": 3}.get(layout, spec.code_bits)
    K = shape[1] * 32 // bits if layout != "n16b3" else shape[1] // 3 * 32
    if layout == "n16t5":
        K = shape[1] // 26 * spec.block  # whole blocks
    codes = rng.integers(0, len(spec.values), (K, TILES * LANES), np.uint8)
    return packing_group.pack_codes(name, codes, layout)


def _repeated(tiles: np.ndarray, shape: tuple[int, ...], like: np.dtype) -> np.ndarray:
    """The first axis as long as in `shape`."""
    tiles = tiles.astype(like, copy=False)
    if tiles.shape[1:] != shape[1:]:
        raise ValueError(f"made {tiles.shape} for {shape}")
    return np.resize(tiles, shape)


def matrix(tensors: Mapping[str, np.ndarray], shape: tuple[int, int], scheme: str) -> np.ndarray:
    """float32 [K, N]: the weight that the tensors of one layer stand for, by name, prefix included."""
    K, N = shape
    by_end = {name.rpartition("/")[2]: array for name, array in tensors.items()}
    by_part = {name.rpartition("/")[0].rpartition(".")[2]: array for name, array in tensors.items()}
    if "f32_n16" in by_end:
        return by_end["f32_n16"].transpose(1, 0, 2).reshape(K, -1)[:, :N]
    if "n16k8" in by_end:
        codes, bits = packing.unpack_nvfp4_n16k8(by_end["n16k8"], by_end["block_scale"], shape)
        scale = np.float32(by_end["global_scale"].reshape(()))
        return QTensor("nvfp4", shape, codes, e4m3.from_codes(bits), scale).dequantize()
    layout = next(end for end in by_end if end in CODE_LAYOUTS)
    name = weight_format(layout, scheme, "zero_point" in by_part)
    spec = FORMATS[name]
    offset = None
    if spec.offset == "mean":
        offset = packing_group.unpack_blocks(by_part["mean"], N)
    elif spec.offset == "zero_point":
        offset = packing_group.unpack_nibbles(by_part["zero_point"], (spec.blocks(K), N))
    scales = packing_group.unpack_blocks(by_part["block_scale"], N)
    codes = packing_group.unpack_codes(name, by_end[layout], layout, shape)
    return QTensor(name, shape, codes, scales, block_offset=offset).dequantize()
