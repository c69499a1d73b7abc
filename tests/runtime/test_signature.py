"""Signed artifacts, from signing to loading with a pinned key; each rule of the signature, broken alone."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from artifact_builder import Parts, Tensor, header_of, padded, sign
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors import safe_open

from qgraph import runtime, signing
from qgraph.codegen.static_library import write_library
from qgraph.errors import InputError, ResourceError, SignatureError, UsageError
from qgraph.report.artifact import read_artifact
from qgraph.runtime import _native

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()
Header = dict[str, Any]


def load(data: bytes, folder: Path, key: bytes | None = None) -> None:
    path = folder / "model.qg"
    path.write_bytes(data)
    runtime.load(path, public_key=key).close()


def signed_by_hand(parts: Parts, change: Callable[[Header], Any] = lambda h: None) -> bytes:
    """As FORMAT.md says it, with a change of the header before it is signed."""
    tensors = [*padded(parts.tensors()), Tensor("qgraph.signature", "U8", [96], bytes(96))]
    header = copy.deepcopy(header_of(tensors, parts.metadata))
    del header["__metadata__"]["sha256:qgraph.signature"]
    change(header)
    data = sign(json.dumps(header).encode(), b"".join(t.data for t in tensors))
    signature = KEY.sign(b"qgraph artifact signature 1\0" + data[-32:])
    return data[:-128] + PUBLIC + signature + data[-32:]


def test_a_signature_by_the_letter_of_the_format(cache: Path, toy_parts: Parts, tmp_path: Path) -> None:
    data = signed_by_hand(toy_parts)
    load(data, tmp_path)
    load(data, tmp_path, PUBLIC)
    signing.verify(tmp_path / "model.qg", PUBLIC)


def test_signing(cache: Path, toy_path: Path, signed_toy: Path, tmp_path: Path) -> None:
    key, signed = (signed_toy / "key").read_bytes(), signed_toy / "signed.qg"
    signing.verify(signed, key)
    runtime.load(signed, public_key=key).close()
    with safe_open(signed, "numpy") as file:
        assert file.get_tensor("qgraph.signature").tobytes()[:32] == key
    before, after = read_artifact(toy_path), read_artifact(signed)
    assert (before.metadata, before.tensors) == (after.metadata, after.tensors)
    assert not before.signer and after.signer == key
    # Once more gives the same bytes, and another key replaces the signature.
    again = tmp_path / "again.qg"
    signing.sign(signed, signed_toy / "key.pem", again)
    assert again.read_bytes() == signed.read_bytes()
    private, public = signing.generate_key(tmp_path / "other")
    other = signing.sign(again, private)
    assert other == signing.read_public_key(public) != key
    assert again.stat().st_size == signed.stat().st_size
    runtime.load(again, public_key=other).close()
    for check in (lambda: signing.verify(again, key), lambda: runtime.load(again, public_key=key)):
        with pytest.raises(SignatureError, match=f"signed by key {other.hex()[:16]}"):
            check()


def test_unsigned(cache: Path, toy_path: Path) -> None:
    with pytest.raises(SignatureError, match="not signed"):
        signing.verify(toy_path, PUBLIC)
    with pytest.raises(SignatureError, match=r"toy.qg: the file is not signed, and this program takes only"):
        runtime.load(toy_path, public_key=PUBLIC)


def test_a_changed_file(cache: Path, toy_parts: Parts, tmp_path: Path) -> None:
    """Whoever changes a file can make its hashes fit, but not its signature."""
    parts = copy.deepcopy(toy_parts)
    parts.weights["w/bias"] = parts.weights["w/bias"] + 1
    theirs, ours = signed_by_hand(parts), signed_by_hand(toy_parts)
    data = theirs[:-96] + ours[-96:-32] + theirs[-32:]
    with pytest.raises(
        SignatureError, match="the signature is wrong: the file was damaged, or changed after"
    ):
        load(data, tmp_path, PUBLIC)
    with pytest.raises(SignatureError, match="the signature is wrong"):
        signing.verify(tmp_path / "model.qg", PUBLIC)
    with pytest.raises(InputError, match="the signature is damaged: it is not that of the key beside it"):
        load(data, tmp_path)


def test_signatures_are_of_artifacts_alone(cache: Path, toy_parts: Parts, tmp_path: Path) -> None:
    """The root alone, signed by the same key for another purpose, is no signature of the file."""
    data = signed_by_hand(toy_parts)
    data = data[:-96] + KEY.sign(data[-32:]) + data[-32:]
    with pytest.raises(SignatureError, match="the signature is wrong"):
        load(data, tmp_path, PUBLIC)


def test_nothing_is_parsed_before_the_signature_is_right(cache: Path, tmp_path: Path) -> None:
    head = b'{"qgraph.signature": this is no JSON'
    head += b" " * (-(8 + len(head)) % 64)
    head = len(head).to_bytes(8, "little") + head
    root = hashlib.sha256(head).digest()
    with pytest.raises(SignatureError, match="the signature is wrong"):
        load(head + PUBLIC + bytes(64) + root, tmp_path, PUBLIC)
    with pytest.raises(InputError, match="header"):
        load(head + PUBLIC + bytes(64) + root, tmp_path)


def cut(header: Header) -> None:
    begin, end = header["qgraph.signature"]["data_offsets"]
    header["qgraph.signature"].update(shape=[95], data_offsets=[begin, end - 1])
    header["qgraph.pad.x"] = {"dtype": "U8", "shape": [1], "data_offsets": [end - 1, end]}


def swap(header: Header) -> None:
    """The signature's name for another tensor, and the other way round."""
    header["qgraph.signature"], header["w/bias"] = header["w/bias"], header["qgraph.signature"]


@pytest.mark.parametrize("change", [cut, swap])
def test_the_place_of_the_signature(
    cache: Path, toy_parts: Parts, tmp_path: Path, change: Callable[[Header], Any]
) -> None:
    data = signed_by_hand(toy_parts, change)
    for key in (None, PUBLIC):
        with pytest.raises(
            InputError, match=r"tensor 'qgraph.signature' is not the last but one, of 96 bytes"
        ):
            load(data, tmp_path, key)
    with pytest.raises(InputError, match=r"not the last but one|hash"):
        read_artifact(tmp_path / "model.qg")


def test_keys_that_nobody_has(cache: Path, toy_path: Path) -> None:
    """As a buffer that was not filled in is: anybody can sign for the key of 32 zeros."""
    for key in (bytes(32), bytes([1, *bytes(31)]), bytes([2, *bytes(31)])):
        with pytest.raises(InputError, match="public_key is no public key of Ed25519: 0"):
            runtime.load(toy_path, public_key=key)


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33), "0" * 32])
def test_keys_of_another_size(toy_path: Path, key: Any) -> None:
    with pytest.raises(InputError, match="give its 32 bytes"):
        runtime.load(toy_path, public_key=key)


def test_damage_is_not_signed(toy_path: Path, signed_toy: Path, tmp_path: Path) -> None:
    data = bytearray(toy_path.read_bytes())
    for place in (len(data) // 2, data.index(b"\0" * 8)):
        damaged = tmp_path / "damaged.qg"
        damaged.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(InputError, match=r"damaged.qg: .*(damaged|not a qgraph artifact)"):
            signing.sign(damaged, signed_toy / "key.pem", tmp_path / "signed.qg")
    assert not (tmp_path / "signed.qg").exists()


def test_a_static_library_carries_no_signature(signed_toy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"signed.qg is signed, .* sign the program"):
        write_library(signed_toy / "signed.qg", "toy", tmp_path / "libtoy.a", tmp_path / "toy.h")
    assert list(tmp_path.iterdir()) == []


# ---- keys


def test_key_files(tmp_path: Path) -> None:
    private, public = signing.generate_key(tmp_path / "my.key")
    assert (private.name, public.name) == ("my.key.pem", "my.key.pub")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    contents = private.read_bytes(), public.read_bytes()
    with pytest.raises(UsageError, match=r"my.key.pem exists, and keys are never overwritten"):
        signing.generate_key(tmp_path / "my.key")
    private.unlink()
    with pytest.raises(UsageError, match=r"my.key.pub exists"):
        signing.generate_key(tmp_path / "my.key")
    assert not private.exists() and public.read_bytes() == contents[1]
    with pytest.raises(ResourceError, match="cannot write"):
        signing.generate_key(tmp_path / "none" / "key")


def test_other_keys(toy_path: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    def pem(key: Any, password: bytes | None = None) -> bytes:
        how = s.BestAvailableEncryption(password) if password else s.NoEncryption()
        return bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, how))

    info = s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo
    path, signed = tmp_path / "key", tmp_path / "signed.qg"
    path.write_bytes(KEY.public_key().public_bytes(*info))
    assert signing.read_public_key(path) == PUBLIC
    with pytest.raises(InputError, match="not a private key: give a PEM file"):
        signing.sign(toy_path, path, signed)
    path.write_bytes(b"not ours\n" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert signing.read_public_key(path) == PUBLIC
    path.write_bytes(pem(KEY))
    assert signing.sign(toy_path, path, signed) == PUBLIC
    with pytest.raises(InputError, match="a private key, which is its owner's secret"):
        signing.read_public_key(path)
    other = X25519PrivateKey.generate()
    path.write_bytes(pem(other))
    with pytest.raises(InputError, match="a private key, but not of Ed25519"):
        signing.sign(toy_path, path, signed)
    for content in (
        other.public_key().public_bytes(*info),
        b"",
        b"\xff" * 40,
        b"-----BEGIN PUBLIC KEY-----\n",
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a public key of Ed25519 in PEM"):
            signing.read_public_key(path)
    for read in (signing.read_public_key, lambda p: signing.sign(toy_path, p, signed)):
        with pytest.raises(InputError, match="no such file"):
            read(tmp_path / "none")


# Of the curve SM2, which `cryptography` does not know.
_SM2 = (
    b"-----BEGIN PRIVATE KEY-----\n"
    b"MIGHAgEAMBMGByqGSM49AgEGCCqBHM9VAYItBG0wawIBAQQgbABJvpfT3SjFI83+"
    b"PrRsufTVtmLLShjXAdo9KcqJQKuhRANCAARkfPtyqG8Z7s1kw1npE1YJ5x9Y2Ayg"
    b"IPqiDdm3My+H7tbGeV316eFEWt6cvQ/eMpl1/qFgXCGbQXlDt9FQNx18"
    b"\n-----END PRIVATE KEY-----\n"
)


def test_a_curve_that_nobody_here_knows(toy_path: Path, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_bytes(_SM2)
    with pytest.raises(InputError, match="a private key, but not of Ed25519"):
        signing.sign(toy_path, tmp_path / "key.pem", tmp_path / "signed.qg")


def test_encrypted_keys(toy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cryptography.hazmat.primitives import serialization as s

    path, signed = tmp_path / "key.pem", tmp_path / "signed.qg"
    path.write_bytes(
        KEY.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"secret"))
    )
    with pytest.raises(InputError, match=r"the key is encrypted: set \$QGRAPH_KEY_PASSWORD"):
        signing.sign(toy_path, path, signed)
    monkeypatch.setenv("QGRAPH_KEY_PASSWORD", "wrong")
    with pytest.raises(InputError, match="does not open it"):
        signing.sign(toy_path, path, signed)
    monkeypatch.setenv("QGRAPH_KEY_PASSWORD", "secret")
    assert signing.sign(toy_path, path, signed) == PUBLIC
    path.write_bytes(
        KEY.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"s\xff"))
    )
    monkeypatch.setenv("QGRAPH_KEY_PASSWORD", os.fsdecode(b"s\xff"))
    assert signing.sign(toy_path, path, signed) == PUBLIC


def test_without_cryptography(toy_path: Path, signed_toy: Path) -> None:
    """Signing says what is missing; the loader, and reading its key, do without."""
    code = (
        "import sys\nsys.modules['cryptography'] = None\n"
        "from pathlib import Path\nfrom qgraph import errors, runtime, signing\n"
        "folder, toy = map(Path, sys.argv[1:])\nkey = signing.read_public_key(folder / 'key.pub')\n"
        "runtime.load(folder / 'signed.qg', public_key=key).close()\n"
        "for call in (lambda: signing.sign(toy, folder / 'key.pem'), lambda: signing.verify(toy, key),\n"
        "             lambda: signing.generate_key(folder / 'new')):\n"
        "    try:\n        call()\n    except errors.ResourceError as error:\n        print(error)\n"
    )
    env = {**os.environ, "QGRAPH_RUNTIME_LIBRARY": _native.library()._name}
    command = [sys.executable, "-c", code, str(signed_toy), str(toy_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    message = "signatures need the package cryptography, which is not installed: pip install 'qgraph[sign]'"
    assert done.stdout.splitlines() == [message] * 3
