"""A minimal writer of `.qg` files, from FORMAT.md alone: what the runtime is tested with, without TVM.

`toy()` is an artifact that uses every feature of the plan, `toy_reference()` the same in numpy.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

TOOLS = ("gcc", "objcopy", "nm", "objdump")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]
KERNELS = Path(__file__).parent / "kernels.c"
EMULATED = Path(__file__).parent / "emulated_kernels.cc"
ARCH = platform.machine()
VOCABULARY, WIDTH = 10, 8
SCRATCH = WIDTH * 4
# What the fixtures' artifacts are for: the CPU, or the fake CUDA driver of tests/cuda, which says so.
CUDA = os.environ.get("QGRAPH_TEST_DEVICE", "cpu") == "cuda"


@dataclass
class Tensor:
    """One entry of the container: a safetensors dtype, a shape and bytes."""

    name: str
    dtype: str
    shape: list[int]
    data: bytes


@dataclass
class Parts:
    """An artifact before it is signed, for tests to change: plan, code images by ISA, weights, metadata.

    `cuda`: the plan is one for CUDA, its images are what the fake driver of tests/cuda runs.
    """

    plan: dict[str, Any]
    code: dict[str, bytes]
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    cuda: bool = False

    def tensors(self) -> list[Tensor]:
        u8 = [("qgraph.plan.cuda" if self.cuda else "qgraph.plan", json.dumps(self.plan).encode())]
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


def emulated_module(folder: Path, isa_id: int) -> bytes:
    """kernels.c as a module of the fake CUDA driver: a shared object of the host."""
    target = folder / f"kernels{isa_id}.so"
    flags = f"-std=c++17 -O1 -shared -fPIC -DISA_ID={isa_id}".split()
    subprocess.run(["g++", *flags, str(EMULATED), "-o", str(target)], check=True)
    return target.read_bytes()


def add_variant(parts: Parts, folder: Path, isa: str, isa_id: int, features: list[str]) -> None:
    """Compile the kernels of `parts`' plan for one more variant."""
    code = f"qgraph.code.{isa}"
    if parts.cuda:  # its images have names of their own: a file may also have code for the CPU
        code = f"qgraph.code.cuda.{isa}"
        parts.code[f"cuda.{isa}"] = emulated_module(folder, isa_id)
        kernels = {"functions": [{"threads": 32, "shared": 0} for _ in parts.plan["kernels"]]}
    else:
        parts.code[isa], entries = compile_kernels(folder, isa_id)
        kernels = {"entries": [entries[name] for name in parts.plan["kernels"]]}
    arch = "cuda" if parts.cuda else ARCH
    variant = {"isa": isa, "arch": arch, "features": features, "code": code, **kernels}
    parts.plan["variants"].append(variant)


def add_step(plan: dict[str, Any], name: str, kernel: str, blocks: Any, *args: Any, grain: int = 1) -> None:
    index = plan["kernels"].index(kernel)
    entry = {"name": name, "kernel": index, "args": list(args), "blocks": blocks, "grain": grain}
    plan["steps"].append(entry)


def v(value: int, *offset: Any) -> list[Any]:
    return ["v", value, *offset]


def i(expr: Any) -> list[Any]:
    return ["i", expr]


def toy(folder: Path, cuda: bool = False) -> Parts:
    """An artifact with symbolic dims, shared slots, scratch, status, pointer offsets and three variants.

    With `cuda` it has no scratch memory, which a GPU has not, but temporaries in its place.

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

    step = partial(add_step, plan)
    step("embed", "gather", size, v(0), v(2), v(4), i(VOCABULARY), i(WIDTH), ["status"], grain=2)
    step("bias", "add_bias", ["ceildiv", elements, 16], v(4), v(3), v(5), i(elements), i(WIDTH))
    step("mask", "scale_rows", size, v(5), v(1), v(6), i(WIDTH), grain=4)
    scratch = [["scratch", SCRATCH]] * 2
    if cuda:
        plan["values"] += [{"kind": "temp", "dtype": "f32", "shape": [WIDTH], "slot": s} for s in (2, 3)]
        plan["slots"], scratch = 4, [v(11), v(12)]
    step("pool", "pool_rows", "batch", v(6), v(7), i("sequence"), i(WIDTH), *scratch)
    step("first", "copy", ["ceildiv", size, 16], v(1), v(8), i(size))
    step("second", "copy", ["ceildiv", size, 16], v(1), v(8, ["mul", size, 4]), i(size))
    step("isa", "isa_id", 1, v(9))
    numbers = [["add", "batch", n] for n in range(29)]
    step("sum", "many", 1, v(10), *map(i, numbers))

    generator = np.random.default_rng(0)
    table = generator.standard_normal((VOCABULARY, WIDTH), np.float32)
    bias = generator.standard_normal(WIDTH, np.float32)
    weights = {"w/table": table, "w/bias": bias}
    parts = Parts(plan, {}, weights, {"qgraph.version": "0.1.0", "qgraph.scheme": "none"}, cuda)
    wide = ["sm_10"] if cuda else ["avx2", "fma"] if ARCH == "x86_64" else ["neon"]
    for isa_id, (isa, features) in enumerate([("future", ["warp_drive"]), ("wide", wide), ("base", [])]):
        add_variant(parts, folder, isa, isa_id, features)
    return parts


TOKENS, HEADS, HEAD_WIDTH, CAPACITY, REFUSED = 16, 2, 8, 16, 15


def toy_decoder(folder: Path, cuda: bool = False) -> Parts:
    """An artifact with state, an option dim, and temporaries and outputs that grow with the state.

    Inputs input_ids [batch, sequence] and attention_mask [batch, total_sequence], both i64. A token with id
    REFUSED fails the last step, when the state has been written. Numbers are small integers: sums are exact.
    """
    size = ["mul", "batch", "sequence"]
    past = i(["sub", "total_sequence", "sequence"])
    named = {"batch": 64, "sequence": 4096, "total_sequence": 512, "cache_capacity": 1 << 40}
    plan: dict[str, Any] = {
        "version": 1,
        "dims": [
            {"name": "logits", "min": 1, "max": 4096, "default": "sequence"},
            *({"name": name, "min": 1, "max": most} for name, most in named.items()),
        ],
        "state": {
            "total": "total_sequence",
            "new": "sequence",
            "capacity": "cache_capacity",
            "default": CAPACITY,
        },
        "checks": [{"ge": ["sequence", "logits"], "message": "logits must be at most sequence"}],
        "inputs": [{"name": "input_ids", "value": 0}, {"name": "attention_mask", "value": 1}],
        "outputs": [{"name": "logits", "value": 7}, {"name": "history", "value": 8}],
        "values": [
            {"kind": "input", "dtype": "i64", "shape": ["batch", "sequence"]},
            {"kind": "input", "dtype": "i64", "shape": ["batch", "total_sequence"]},
            {"kind": "weight", "tensor": "w/table"},
            {"kind": "temp", "dtype": "f32", "shape": ["batch", "sequence", HEADS * HEAD_WIDTH], "slot": 0},
            {"kind": "temp", "dtype": "f32", "shape": ["batch", "total_sequence"], "slot": 1},
            {"kind": "state", "dtype": "f32", "shape": ["batch", HEADS, "cache_capacity", HEAD_WIDTH]},
            {"kind": "state", "dtype": "i64", "shape": ["batch", 1, "cache_capacity", 1]},
            {"kind": "output", "dtype": "f32", "shape": ["batch", "logits", HEADS * HEAD_WIDTH]},
            {"kind": "output", "dtype": "i64", "shape": ["batch", "total_sequence"]},
        ],
        "slots": 2,
        "kernels": ["gather", "append", "append_ids", "weigh", "attend", "recall", "refuse"],
        "steps": [],
        "variants": [],
    }
    step = partial(add_step, plan)
    total, capacity, heads, width = i("total_sequence"), i("cache_capacity"), i(HEADS), i(HEAD_WIDTH)
    step("embed", "gather", size, v(0), v(2), v(3), i(TOKENS), i(HEADS * HEAD_WIDTH), ["status"])
    rows = ["mul", "batch", HEADS]
    step("append", "append", rows, v(3), v(5), past, i("sequence"), heads, capacity, width)
    step("remember", "append_ids", "batch", v(0), v(6), past, i("sequence"), capacity)
    step("weigh", "weigh", "batch", v(1), v(4), total)
    positions = ["mul", "batch", "logits"]
    step("attend", "attend", positions, v(5), v(4), v(7), total, i("logits"), heads, capacity, width)
    step("recall", "recall", "batch", v(6), v(8), total, capacity)
    step("refuse", "refuse", size, v(0), i(REFUSED), ["status"])
    table = np.random.default_rng(0).integers(-4, 5, (TOKENS, HEADS * HEAD_WIDTH)).astype(np.float32)
    parts = Parts(plan, {}, {"w/table": table}, cuda=cuda)
    add_variant(parts, folder, "base", 0, [])
    return parts


def toy_decoder_reference(
    parts: Parts, ids: np.ndarray, mask: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """What the decoder has after all of `ids` [batch, total]: logits of every position, and the history."""
    mask = np.ones_like(ids) if mask is None else mask
    weights = np.arange(1, ids.shape[1] + 1) * mask
    terms = parts.weights["w/table"][ids] * weights[..., None]
    return {"logits": terms.cumsum(axis=1).astype(np.float32), "history": ids}


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
