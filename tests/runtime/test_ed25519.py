"""The runtime's Ed25519 beside that of `cryptography` (OpenSSL's), with sanitizers: vectors of RFC 8032,
random signatures with and without a changed bit, and what implementations are known to disagree about."""

from __future__ import annotations

import hashlib
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from cmake_build import RUNTIME, run, sanitizer
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from rfc8032 import VECTORS

Record = tuple[bytes, bytes, bytes]  # key, signature, message
Verdicts = Callable[[list[Record]], list[bool]]
Point = tuple[int, int]

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
ROOT_OF_MINUS_ONE = pow(2, (P - 1) // 4, P)
NEUTRAL = (0, 1)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[Record]], list[str]]:
    """What the program `verify_signatures` says to each record, two digits."""
    folder = tmp_path_factory.mktemp("ed25519")
    program, corpus = folder / "verify_signatures", folder / "corpus"
    flags = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-pedantic"]
    if sanitizer():
        flags += [f"-fsanitize={sanitizer()}", "-fno-sanitize-recover=all"]
    sources = [RUNTIME / "src" / "ed25519.cc", RUNTIME / "src" / "sha512.cc"]
    sources.append(RUNTIME / "tests" / "verify_signatures.cc")
    compiler = os.environ.get("CXX", "c++").split()
    run(*compiler, *flags, f"-I{RUNTIME / 'src'}", f"-I{RUNTIME / 'include'}", *sources, "-o", program)

    def said(records: list[Record]) -> list[str]:
        data = (struct.pack("<Q", len(text)) + key + signature + text for key, signature, text in records)
        corpus.write_bytes(b"".join(data))
        return run(program, corpus).split()

    return said


@pytest.fixture(scope="module")
def verdicts(judge: Callable[[list[Record]], list[str]]) -> Verdicts:
    """Whether signatures are right."""
    return lambda records: [digits[0] == "1" for digits in judge(records)]


@pytest.fixture(scope="module")
def are_keys(judge: Callable[[list[Record]], list[str]]) -> Callable[[list[bytes]], list[bool]]:
    """Whether somebody can have the private key."""
    return lambda keys: [digits[1] == "1" for digits in judge([(key, bytes(64), b"") for key in keys])]


def openssl(record: Record) -> bool:
    key, signature, message = record
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except InvalidSignature:
        return False
    return True


def public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def add(a: Point, b: Point) -> Point:
    t = D * a[0] * a[1] * b[0] * b[1] % P
    x = (a[0] * b[1] + b[0] * a[1]) * pow(1 + t, -1, P)
    y = (a[1] * b[1] + a[0] * b[0]) * pow(1 - t, -1, P)
    return x % P, y % P


def times(n: int, a: Point) -> Point:
    result = NEUTRAL
    while n:
        if n & 1:
            result = add(result, a)
        a, n = add(a, a), n >> 1
    return result


def point(y: int) -> Point | None:
    """That with this y and an even x."""
    xx = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(xx, (P + 3) // 8, P)
    if x * x % P != xx:
        x = x * ROOT_OF_MINUS_ONE % P
    return (P - x if x & 1 else x, y) if x * x % P == xx else None


def encode(a: Point, more: int = 0, sign: int = 0) -> bytes:
    """With `more` added to y, and the sign changed by `sign`."""
    return ((a[1] + more) | ((a[0] & 1) ^ sign) << 255).to_bytes(32, "little")


def hashed(r: bytes, key: bytes, message: bytes) -> int:
    return number(hashlib.sha512(r + key + message).digest()) % L


BASE = point(4 * pow(5, -1, P) % P)
assert BASE is not None


def small_order() -> list[Point]:
    """The eight points of the curve whose order divides 8."""
    for y in range(2, 100):
        a = point(y)
        if a is not None and times(4, found := times(L, a)) != NEUTRAL:
            return [times(n, found) for n in range(8)]
    raise AssertionError


SMALL = small_order()


def forged(key: bytes, a: Point) -> Record:
    """A signature that fits a key of small order, which is that of nobody: R = S B - h A."""
    assert BASE is not None
    for n in range(1000):
        message, s = b"%d" % n, 12345 + n
        sb = times(s, BASE)
        for torsion in SMALL:
            r = add(sb, torsion)
            if add(r, times(hashed(encode(r), key, message), a)) == sb:
                return key, encode(r) + s.to_bytes(32, "little"), message
    raise AssertionError


def test_vectors_of_the_rfc(verdicts: Verdicts) -> None:
    records = [(key, signature, message) for _, key, message, signature in VECTORS]
    assert verdicts(records) == [True] * len(VECTORS)
    longer = [(key, signature, message + b"\0") for key, signature, message in records]
    assert verdicts(longer) == [False] * len(VECTORS)


def test_random_signatures_and_changed_bits(verdicts: Verdicts) -> None:
    rng = random.Random(0)
    records: list[Record] = []
    for _ in range(150):
        key = Ed25519PrivateKey.from_private_bytes(rng.randbytes(32))
        message = rng.randbytes(rng.choice([0, 1, 32, 47, 48, 63, 64, 111, 112, 128, 300]))
        right = (public(key), key.sign(message), message)
        records.append(right)
        for part in range(3):
            changed = bytearray(right[part])
            if changed:
                bit = rng.randrange(8 * len(changed))
                changed[bit // 8] ^= 1 << bit % 8
                records.append((*right[:part], bytes(changed), *right[part + 1 :]))  # type: ignore[arg-type]
    want = [openssl(record) for record in records]
    assert sum(want) == 150 and len(want) > 550
    assert verdicts(records) == want


def test_every_bit_of_a_signature_and_a_key_counts(verdicts: Verdicts) -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    message = b"message"
    right = public(key) + key.sign(message)
    changed = [(number(right) ^ 1 << bit).to_bytes(96, "little") for bit in range(8 * 96)]
    records = [(data[:32], data[32:], message) for data in changed]
    assert verdicts(records) == [False] * len(records)


def test_no_second_s(verdicts: Verdicts) -> None:
    """S + L is the same modulo L, and would make another signature of a right one."""
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    signature = key.sign(b"")
    r, s = signature[:32], number(signature[32:])
    others = [s + n * L for n in range(1, 16) if s + n * L < 2**256]
    records = [(public(key), r + other.to_bytes(32, "little"), b"") for other in [s, *others]]
    assert len(others) > 10
    assert verdicts(records) == [openssl(record) for record in records] == [True] + [False] * len(others)


def test_keys_of_small_order(verdicts: Verdicts) -> None:
    """They are in order, if useless: anybody can sign for them."""
    records = [forged(encode(a), a) for a in SMALL]
    assert verdicts(records) == [openssl(record) for record in records] == [True] * 8


def test_keys_in_another_encoding_than_the_canonical_one(verdicts: Verdicts) -> None:
    """RFC 8032, 5.1.3: y >= p, and x = 0 with the sign of an odd x, are no points. OpenSSL lets them pass."""
    records = [forged(encode(a, sign=1), a) for a in SMALL if a[0] == 0]
    for a in SMALL:
        if a[1] < 19:
            records += [forged(encode(a, more=P), a), forged(encode(a, more=P, sign=1), (P - a[0], a[1]))]
    assert len(records) == 8
    assert verdicts(records) == [False] * 8


def test_what_a_key_is(are_keys: Callable[[list[bytes]], list[bool]]) -> None:
    """No point, not canonical, of small order: nobody's. Else somebody's, whatever else is in it."""
    assert BASE is not None
    nobodys = [encode(a) for a in SMALL] + [
        encode(NEUTRAL, more=P),
        encode(NEUTRAL, sign=1),
        b"\2" + bytes(31),
    ]
    assert are_keys(nobodys) == [False] * 11
    mixed = [encode(add(times(5, BASE), a)) for a in SMALL]
    assert are_keys([*mixed, *(key for _, key, _, _ in VECTORS)]) == [True] * 13


def test_what_is_no_point(verdicts: Verdicts) -> None:
    signature = Ed25519PrivateKey.from_private_bytes(bytes(32)).sign(b"")
    values = [*range(40), *(P + n for n in range(19)), *(2**256 - 1 - n for n in range(20))]
    records = [(value.to_bytes(32, "little"), signature, b"") for value in values]
    assert verdicts(records) == [openssl(record) for record in records] == [False] * len(records)


def test_the_check_has_no_cofactor(verdicts: Verdicts) -> None:
    """A key with a part of small order: its signatures are right for an eighth of the messages alone."""
    assert BASE is not None
    secret = hashed(b"", b"", b"secret")
    a = add(times(secret, BASE), SMALL[1])
    key, r = encode(a), encode(times(777, BASE))
    records = []
    for n in range(64):
        message = b"%d" % n
        s = (777 + hashed(r, key, message) * secret) % L
        records.append((key, r + s.to_bytes(32, "little"), message))
    want = [openssl(record) for record in records]
    assert 0 < sum(want) < 32
    assert verdicts(records) == want


def test_r_in_another_encoding(verdicts: Verdicts) -> None:
    """R of small order, as it is and not: what is compared are bytes."""
    seed = bytes(32)
    key = public(Ed25519PrivateKey.from_private_bytes(seed))
    digest = bytearray(hashlib.sha512(seed).digest()[:32])
    digest[0] &= 248
    digest[31] = digest[31] & 63 | 64
    encodings = [encode(NEUTRAL), encode(NEUTRAL, sign=1), encode(NEUTRAL, more=P)]
    encodings += [encode(a) for a in SMALL[1:]]
    records = []
    for r in encodings:
        s = hashed(r, key, b"") * number(bytes(digest)) % L
        records.append((key, r + s.to_bytes(32, "little"), b""))
    assert verdicts(records) == [openssl(record) for record in records] == [True] + [False] * 9


def test_sha512(tmp_path: Path) -> None:
    """Lengths around the borders of blocks, beside Python's."""
    source, program = tmp_path / "sha512.cc", tmp_path / "sha512"
    source.write_text(
        '#include <cstdio>\n#include <vector>\n#include "sha512.h"\nint main() {\n'
        "  std::vector<unsigned char> data;\n  for (int n = 0; n < 400; ++n) {\n"
        '    for (unsigned char b : qg::sha512(data.data(), data.size())) std::printf("%02x", b);\n'
        '    std::puts("");\n    data.push_back(static_cast<unsigned char>(37 * n + 11));\n  }\n}\n'
    )
    compiler = os.environ.get("CXX", "c++").split()
    flags = ["-std=c++17", "-O1", f"-I{RUNTIME / 'src'}"]
    run(*compiler, *flags, source, RUNTIME / "src" / "sha512.cc", "-o", program)
    data = bytes((37 * n + 11) % 256 for n in range(400))
    assert run(program).split() == [hashlib.sha512(data[:n]).hexdigest() for n in range(400)]
