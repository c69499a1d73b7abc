"""A minimal writer of `.qg` files, from FORMAT.md alone: what the runtime is tested with, without TVM.

`toy()` is an artifact that uses every feature of the plan, `toy_reference()` the same in numpy.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TOOLS = ("gcc", "objcopy", "nm", "objdump")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]
KERNELS = Path(__file__).parent / "kernels.c"
ARCH = platform.machine()
VOCABULARY, WIDTH = 10, 8
SCRATCH = WIDTH * 4


@dataclass
class Tensor:
    """One entry of the container: a safetensors dtype, a shape and bytes."""

    name: str
    dtype: str
    shape: list[int]
    data: bytes


@dataclass
class Parts:
    """An artifact before it is signed, for tests to change: plan, code images by ISA, weights, metadata."""

    plan: dict[str, Any]
    code: dict[str, bytes]
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        u8 = [("qgraph.plan", json.dumps(self.plan).encode())]
        u8 += [(f"qgraph.code.{isa}", image) for isa, image in self.code.items()]
        result = [Tensor(name, "U8", [len(data)], data) for name, data in u8]
        names = {"float32": "F32", "int64": "I64", "uint8": "U8"}
        for name, array in self.weights.items():
            result.append(Tensor(name, names[array.dtype.name], list(array.shape), array.tobytes()))
        return result

    def to_bytes(self) -> bytes:
        return container(self.tensors(), self.metadata)


def padded(tensors: list[Tensor]) -> list[Tensor]:
    """With the pads that bring every tensor to a multiple of 64."""
    result: list[Tensor] = []
    for tensor in tensors:
        result.append(tensor)
        if rest := -len(tensor.data) % 64:
            result.append(Tensor(f"qgraph.pad.{len(result)}", "U8", [rest], bytes(rest)))
    return result


def header_of(tensors: list[Tensor], metadata: dict[str, str]) -> dict[str, Any]:
    """Header of tensors that lie one after another, the root included."""
    hashes = {
        f"sha256:{t.name}": hashlib.sha256(t.data).hexdigest()
        for t in tensors
        if not t.name.startswith("qgraph.pad.")
    }
    header: dict[str, Any] = {"__metadata__": {"qgraph.format": "1", **metadata, **hashes}}
    offset = 0
    for tensor in [*tensors, Tensor("qgraph.root", "U8", [32], bytes(32))]:
        end = offset + len(tensor.data)
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    return header


def sign(header: bytes, body: bytes) -> bytes:
    """The file: length, header padded with spaces, body, and the root over what comes before the body."""
    header += b" " * (-(8 + len(header)) % 64)
    start = struct.pack("<Q", len(header)) + header
    return start + body + hashlib.sha256(start).digest()


def container(tensors: list[Tensor], metadata: dict[str, str] | None = None) -> bytes:
    tensors = padded(tensors)
    header = json.dumps(header_of(tensors, metadata or {})).encode()
    return sign(header, b"".join(t.data for t in tensors))


def compile_kernels(folder: Path, isa_id: int) -> tuple[bytes, dict[str, int]]:
    """Flat code image of kernels.c and the offset of each of its functions."""
    target, image = folder / f"kernels{isa_id}.o", folder / f"kernels{isa_id}.bin"
    flags = (
        "-O1 -c -fPIC -ffreestanding -fno-stack-protector -fno-asynchronous-unwind-tables -fno-tree-vectorize"
    )
    run = lambda *command: subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: E731
    run("gcc", *flags.split(), f"-DISA_ID={isa_id}", str(KERNELS), "-o", str(target))
    relocations = run("objdump", "-r", "-j", ".text", str(target))
    assert "RELOCATION RECORDS FOR [.text]" not in relocations, "a kernel is not self-contained"
    run("objcopy", "-O", "binary", "-j", ".text", str(target), str(image))
    symbols = (line.split() for line in run("nm", str(target)).splitlines())
    return image.read_bytes(), {name: int(offset, 16) for offset, kind, name in symbols if kind == "T"}


def toy(folder: Path) -> Parts:
    """An artifact with symbolic dims, shared slots, scratch, status, pointer offsets and three variants.

    Inputs ids i64 [batch, sequence] and mask f32 [batch, sequence]. The first variant needs a feature that
    no machine has, the next ("wide") what most have, the last ("base") nothing.
    """
    size = ["mul", "batch", "sequence"]
    elements = ["mul", size, WIDTH]
    hidden = ["batch", "sequence", WIDTH]
    plan: dict[str, Any] = {
        "version": 1,
        "dims": [{"name": "batch", "min": 0, "max": 4096}, {"name": "sequence", "min": 1, "max": 4096}],
        "checks": [{"ge": [64, "sequence"], "message": "sequence must be at most 64"}],
        "inputs": [{"name": "ids", "value": 0}, {"name": "mask", "value": 1}],
        "outputs": [
            {"name": "pooled", "value": 7},
            {"name": "twice", "value": 8},
            {"name": "isa", "value": 9},
            {"name": "sum", "value": 10},
        ],
        "values": [
            {"kind": "input", "dtype": "i64", "shape": ["batch", "sequence"]},
            {"kind": "input", "dtype": "f32", "shape": ["batch", "sequence"]},
            {"kind": "weight", "tensor": "w/table"},
            {"kind": "weight", "tensor": "w/bias"},
            {"kind": "temp", "dtype": "f32", "shape": hidden, "slot": 0},
            {"kind": "temp", "dtype": "f32", "shape": hidden, "slot": 1},
            {"kind": "temp", "dtype": "f32", "shape": hidden, "slot": 0},
            {"kind": "output", "dtype": "f32", "shape": ["batch", WIDTH]},
            {"kind": "output", "dtype": "f32", "shape": [["mul", 2, "batch"], "sequence"]},
            {"kind": "output", "dtype": "i64", "shape": [1]},
            {"kind": "output", "dtype": "i64", "shape": []},
        ],
        "slots": 2,
        "kernels": ["gather", "add_bias", "scale_rows", "pool_rows", "copy", "isa_id", "many"],
        "steps": [],
        "variants": [],
    }

    def step(name: str, kernel: str, blocks: Any, *args: Any, grain: int = 1) -> None:
        index = plan["kernels"].index(kernel)
        entry = {"name": name, "kernel": index, "args": list(args), "blocks": blocks, "grain": grain}
        plan["steps"].append(entry)

    def v(value: int, *offset: Any) -> list[Any]:
        return ["v", value, *offset]

    def i(expr: Any) -> list[Any]:
        return ["i", expr]

    step("embed", "gather", size, v(0), v(2), v(4), i(VOCABULARY), i(WIDTH), ["status"], grain=2)
    step("bias", "add_bias", ["ceildiv", elements, 16], v(4), v(3), v(5), i(elements), i(WIDTH))
    step("mask", "scale_rows", size, v(5), v(1), v(6), i(WIDTH), grain=4)
    scratch = ["scratch", SCRATCH]
    step("pool", "pool_rows", "batch", v(6), v(7), i("sequence"), i(WIDTH), scratch, scratch)
    step("first", "copy", ["ceildiv", size, 16], v(1), v(8), i(size))
    step("second", "copy", ["ceildiv", size, 16], v(1), v(8, ["mul", size, 4]), i(size))
    step("isa", "isa_id", 1, v(9))
    numbers = [["add", "batch", n] for n in range(29)]
    step("sum", "many", 1, v(10), *map(i, numbers))

    generator = np.random.default_rng(0)
    table = generator.standard_normal((VOCABULARY, WIDTH), np.float32)
    bias = generator.standard_normal(WIDTH, np.float32)
    parts = Parts(
        plan, {}, {"w/table": table, "w/bias": bias}, {"qgraph.version": "0.1.0", "qgraph.scheme": "none"}
    )
    wide = ["avx2", "fma"] if ARCH == "x86_64" else ["neon"]
    for isa_id, (isa, features) in enumerate([("future", ["warp_drive"]), ("wide", wide), ("base", [])]):
        image, entries = compile_kernels(folder, isa_id)
        code = f"qgraph.code.{isa}"
        offsets = [entries[name] for name in plan["kernels"]]
        variant = {"isa": isa, "arch": ARCH, "features": features, "code": code, "entries": offsets}
        plan["variants"].append(variant)
        parts.code[isa] = image
    return parts


def toy_reference(parts: Parts, ids: np.ndarray, mask: np.ndarray, isa_id: int) -> dict[str, np.ndarray]:
    """What the toy computes, in the kernels' order of operations: outputs are bit-equal."""
    hidden = (parts.weights["w/table"][ids] + parts.weights["w/bias"]) * mask[..., None]
    pooled = np.zeros((ids.shape[0], WIDTH), np.float32)
    for t in range(ids.shape[1]):
        pooled += hidden[:, t]
    return {
        "pooled": pooled,
        "twice": np.concatenate([mask, mask]),
        "isa": np.array([isa_id]),
        "sum": np.array(sum((n + 1) * (len(ids) + n) for n in range(29))),
    }


def toy_inputs(batch: int, sequence: int, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "ids": generator.integers(0, VOCABULARY, (batch, sequence)),
        "mask": generator.standard_normal((batch, sequence), np.float32),
    }


def returning_code(size: int = 64) -> bytes:
    """An image where every entry returns at once: for plans that no real kernel would survive."""
    returns = {"x86_64": b"\xc3", "aarch64": b"\xc0\x03\x5f\xd6"}[ARCH]
    return returns * (size // len(returns))
