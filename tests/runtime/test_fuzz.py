"""Correctly signed files with mutated plans and headers: refused or run, never a crash (with sanitizers)."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import struct
import subprocess
from pathlib import Path
from typing import Any

from artifact_builder import Parts, Tensor, header_of, padded, returning_code, sign
from cmake_build import sanitizer

PLANS, TEXTS, HEADERS = 2000, 400, 400
DECODER_PLANS = 1000
VALUES: list[Any] = [
    *(0, 1, 2, 3, -1, 7, 8, 63, 64, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63), 2**63, 2**64),
    *("", "batch", "sequence", "v", "i", "scratch", "status", "f32", "bool"),
    *("temp", "input", "output", "weight", "state", "total_sequence", "cache_capacity", "logits"),
    *(None, True, 1.5, [], {}, [[]], ["v", 0], ["v", 8, 4], ["i", "batch"], ["scratch", 64], ["status"]),
    *([op, "batch", 3] for op in ("add", "sub", "mul", "floordiv", "ceildiv", "mod", "min", "max", "pow")),
    ["sub", "batch", "sequence"],
    ["sub", "total_sequence", "sequence"],
    ["sub", 3, "total_sequence"],
    ["batch", 2, "cache_capacity", 8],
    {"total": "sequence", "new": 1, "capacity": "batch", "default": 4},
    ["mul", ["mul", 2**31, "batch"], ["mul", 2**31, "sequence"]],
    "x" * 3000,
]


def harmless(parts: Parts) -> Parts:
    """With kernels that return at once: real ones would be right to crash on mutated arguments."""
    parts = copy.deepcopy(parts)
    for variant in parts.plan["variants"]:
        variant["entries"] = [0] * len(parts.plan["kernels"])
    parts.code = {isa: returning_code() for isa in parts.code}
    return parts


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    return [pair for key in keys for pair in [(node, key), *places(node[key])]]


def mutate(tree: Any, rng: random.Random) -> None:
    """One random change somewhere in a JSON tree."""
    node, key = rng.choice(places(tree))
    kind = rng.randrange(8)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, list):
        node.insert(rng.randrange(len(node) + 1), copy.deepcopy(node[key]))
    elif kind == 2 and isinstance(node, dict):
        node[str(key) + "x"] = node.pop(key)
    elif kind == 3:
        other, other_key = rng.choice(places(tree))
        node[key] = copy.deepcopy(other[other_key])
    elif kind == 4 and isinstance(node[key], int):
        node[key] += rng.choice([-1, 1])
    elif kind == 5:
        depth = rng.choice([3, 30, 50, 70, 1000])
        node[key] = "DEEP" + str(depth)
    else:
        node[key] = copy.deepcopy(rng.choice(VALUES))


def dump(tree: Any) -> bytes:
    """JSON, with the markers for deep expressions replaced (Python's own encoder would not go that deep)."""
    text = json.dumps(tree)
    for depth in (3, 30, 50, 70, 1000):
        text = text.replace(f'"DEEP{depth}"', '["add",1,' * depth + "1" + "]" * depth)
    return text.encode()


def with_plan(parts: Parts, plan: bytes) -> bytes:
    tensors = parts.tensors()
    tensors[0].data, tensors[0].shape = plan, [len(plan)]
    tensors = padded(tensors)
    header = json.dumps(header_of(tensors, parts.metadata)).encode()
    return sign(header, b"".join(t.data for t in tensors))


def corpus(
    parts: Parts, seed: int, plans: int = PLANS, texts: int = TEXTS, headers: int = HEADERS
) -> list[bytes]:
    rng = random.Random(seed)
    parts = harmless(parts)
    files = [parts.to_bytes()]
    for _ in range(plans):
        plan = copy.deepcopy(parts.plan)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            mutate(plan, rng)
        files.append(with_plan(parts, dump(plan)))
    text = json.dumps(parts.plan).encode()
    for _ in range(texts):
        damaged = bytearray(text)
        for _ in range(rng.choice([1, 1, 3])):
            damaged[rng.randrange(len(damaged))] = rng.choice(b'0123456789"[]{},:\\ue-.xE\x00\x80\xff ')
        files.append(with_plan(parts, bytes(damaged)[: rng.choice([None, rng.randrange(len(text))])]))
    for i in range(headers):
        # Every other one has a signature, of nobody: what is fuzzed is its place.
        signature = [Tensor("qgraph.signature", "U8", [96], bytes(96))] if i % 2 else []
        tensors = padded(parts.tensors()) + signature
        body = b"".join(t.data for t in tensors)
        header = copy.deepcopy(header_of(tensors, parts.metadata))
        if i % 4 == 1:  # as it should be, but for the mutation; else with a hash of its own
            del header["__metadata__"]["sha256:qgraph.signature"]
        mutate(header, rng)
        files.append(sign(dump(header), body))
        # And the body's bytes under hashes that fit them.
        assert hashlib.sha256(tensors[0].data).hexdigest() in json.dumps(header_of(tensors, {}))
    return files


def test_mutated_plans_never_crash(cpp_tests: Path, toy_parts: Parts, tmp_path: Path) -> None:
    fuzz(cpp_tests, corpus(toy_parts, seed=2), tmp_path)


def test_mutated_plans_with_state_never_crash(cpp_tests: Path, decoder_parts: Parts, tmp_path: Path) -> None:
    counts = fuzz(cpp_tests, corpus(decoder_parts, 3, DECODER_PLANS, texts=0, headers=0), tmp_path)
    assert counts["copies"] > 100
    assert counts["failed_copies"] > 100


def fuzz(cpp_tests: Path, files: list[bytes], tmp_path: Path) -> dict[str, int]:
    path = tmp_path / "corpus"
    path.write_bytes(b"".join(struct.pack("<Q", len(data)) + data for data in files))
    program = cpp_tests / "tests" / "fuzz_plans"
    done = subprocess.run([program, path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stderr[-4000:]}\n(sanitizers: {sanitizer() or 'none'})"
    counts: dict[str, int] = json.loads(done.stdout)
    print(counts)
    assert counts["refused"] + counts["loaded"] == len(files)
    # The mutations must reach both sides of every check: neither all refused nor all harmless.
    assert counts["refused"] > len(files) // 3
    assert counts["loaded"] > len(files) // 15
    assert counts["runs"] > 100
    assert counts["failed_runs"] > 100
    return counts
