"""Signatures of artifacts: who vouches for a file. Ed25519, by the package `cryptography` (`qgraph[sign]`).

runtime/FORMAT.md specifies what is signed and where the signature lies; docs/sdk.md says what it is worth.
Keys are PEM files as OpenSSL writes them: PKCS #8 private ones, SubjectPublicKeyInfo public ones. Nothing
here knows which keys to trust: callers do.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgraph.atomic import atomic_write, write_in_large_pages
from qgraph.errors import InputError, ResourceError, SignatureError, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY_SIZE, SIGNATURE_SIZE, ROOT_SIZE = 32, 64, 32
PASSWORD = "QGRAPH_KEY_PASSWORD"
# In front of the root: no signature of something else is one of an artifact.
_DOMAIN = b"qgraph artifact signature 1\0"
# A SubjectPublicKeyInfo of Ed25519 in DER is this and the key (RFC 8410, 4).
_SPKI = bytes.fromhex("302a300506032b6570032100")
_PUBLIC = "PUBLIC KEY"


def generate_key(prefix: Path) -> tuple[Path, Path]:
    """Write a new key pair, `prefix`.pem (private, for its owner's eyes alone) and `prefix`.pub, and return
    the two paths.

    Raises:
        UsageError: one of them is there, or `prefix` has no name; nothing is written.
        ResourceError: the disk refuses, or `cryptography` is missing.
    """
    ed25519, serialization, _ = _cryptography()
    if prefix.name in ("", ".."):
        raise UsageError(f"'{prefix}' is no name for keys: give what their names begin with")
    private, public = (prefix.with_name(f"{prefix.name}{suffix}") for suffix in (".pem", ".pub"))
    for path in (private, public):
        if os.path.lexists(path):
            raise UsageError(f"{path} exists, and keys are never overwritten: choose another name")
    key = ed25519.Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    written = []
    try:
        for path, mode, text in ((private, 0o600, pem), (public, 0o644, _public_pem(key))):
            # O_EXCL: whoever makes the file at the same time keeps theirs.
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                written.append(path)
                file.write(text)
    except BaseException as error:  # Ctrl-C as well: half a pair is of no use
        for done in written:
            done.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ResourceError(f"cannot write {path}: {(error.strerror or str(error)).lower()}") from error
        raise
    return private, public


def read_public_key(path: Path) -> bytes:
    """The 32 bytes of the public key in a PEM file. Needs no `cryptography`.

    Raises:
        InputError: no such file, or no public key of Ed25519.
    """
    lines = _read(path).decode("ascii", "replace").split("\n")
    fences = [f"-----{edge} {_PUBLIC}-----" for edge in ("BEGIN", "END")]
    lines = [line.strip() for line in lines]
    if any("PRIVATE KEY-----" in line for line in lines):
        raise InputError(f"{path}: a private key, which is its owner's secret: give the public one, .pub")
    try:
        begin, end = map(lines.index, fences)
        der = base64.b64decode("".join(lines[begin + 1 : end]), validate=True)
    except (ValueError, binascii.Error):
        der = b""
    if len(der) != len(_SPKI) + KEY_SIZE or not der.startswith(_SPKI):
        raise InputError(f"{path}: not a public key of Ed25519 in PEM, as `qgraph keygen` writes")
    return der[len(_SPKI) :]


def sign(path: Path, key: Path, output: Path | None = None) -> bytes:
    """Sign the artifact at `path`, whose bytes are all checked first, with the private key in the file `key`,
    and write it to `output`, by default in its place. A signature that it has is replaced.

    Returns:
        The public key, 32 bytes.

    Raises:
        InputError: an artifact that is missing or damaged; no such key, or none of Ed25519.
        UnsupportedError: an artifact of another format version.
        ResourceError: the disk refuses, or `cryptography` is missing.
    """
    private = _read_private_key(key)
    public = _raw(private)
    data = _checked(path)[0]
    head, body = _with_slot(data)
    root = hashlib.sha256(head).digest()
    with atomic_write(output or path) as temporary:
        with temporary.open("wb") as file:
            write_in_large_pages(file, (head, body, public, private.sign(_DOMAIN + root), root))
        if output is None:  # the same file, for the same eyes
            shutil.copymode(path, temporary)
    return public


def verify(path: Path, public_key: bytes) -> None:
    """Check every byte of the artifact at `path`, and that the owner of the key has signed it.

    Raises:
        SignatureError: unsigned, signed by another key, or changed after it was signed.
        InputError: no such file, damaged, or not an artifact.
        UnsupportedError: an artifact of another format version.
        ResourceError: `cryptography` is missing.
    """
    ed25519, _, InvalidSignature = _cryptography()
    info = _checked(path)[1]
    if not info.seal:
        raise SignatureError(f"{path}: not signed: get the signed file, or sign it with `qgraph sign`")
    signer, signature = info.signer, info.seal[KEY_SIZE:]
    if signer != public_key:
        raise SignatureError(
            f"{path}: signed by key {signer.hex()}, not by {public_key.hex()}: get it from that key's owner"
        )
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _DOMAIN + info.root)
    except InvalidSignature:
        raise SignatureError(
            f"{path}: the signature is wrong: the file was damaged, or changed after it was signed: "
            "get it anew"
        ) from None


def _cryptography() -> tuple[Any, Any, type[Exception]]:
    """Its modules `ed25519` and `serialization`, and `InvalidSignature`."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise ResourceError(
            "signatures need the package cryptography, which is not installed: pip install 'qgraph[sign]'"
        ) from None
    return ed25519, serialization, InvalidSignature


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None


def _checked(path: Path) -> tuple[bytes, Any]:
    """The file's content, and what it holds."""
    from qgraph.report.artifact import parse_artifact

    data = _read(path)
    return data, parse_artifact(data, path)


def _read_private_key(path: Path) -> Ed25519PrivateKey:
    ed25519, serialization, _ = _cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm

    password = os.environ.get(PASSWORD)
    data = _read(path)
    try:
        key = serialization.load_pem_private_key(data, os.fsencode(password) if password else None)
    except TypeError:
        what = "is encrypted: set" if not password else "is not encrypted: do not set"
        raise InputError(f"{path}: the key {what} ${PASSWORD}") from None
    except UnsupportedAlgorithm:  # an exotic curve, say
        key = None
    except ValueError:
        reason = (
            f"the password in ${PASSWORD} does not open it" if b"ENCRYPTED" in data else "not a private key"
        )
        raise InputError(f"{path}: {reason}: give a PEM file as `qgraph keygen` writes") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise InputError(f"{path}: a private key, but not of Ed25519: make one with `qgraph keygen`")
    return key


def _raw(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def _public_pem(key: Ed25519PrivateKey) -> bytes:
    text = base64.b64encode(_SPKI + _raw(key)).decode()
    return f"-----BEGIN {_PUBLIC}-----\n{text}\n-----END {_PUBLIC}-----\n".encode()


def _with_slot(data: bytes) -> tuple[bytes, memoryview]:
    """Length and header of the artifact with a signature, and what lies between header and signature."""
    from qgraph.report.artifact import SIGNATURE

    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    sizes = {SIGNATURE: KEY_SIZE + SIGNATURE_SIZE, "qgraph.root": ROOT_SIZE}
    for name in sizes:
        header.pop(name, None)
    end = at = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text, memoryview(data)[start : start + end]
