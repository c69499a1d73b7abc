"""`keygen`, `sign`, `verify`, and `--public-key` of what runs artifacts."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

import pytest
from cli_harness import ROOT, command, qgraph

NAME = {"x86_64": "encoder-ternary", "aarch64": "encoder-nvfp4-aarch64"}
GOLDEN = ROOT / "tests" / "golden" / "0.1.0" / f"{NAME[platform.machine()]}.qg"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an artifact, `model.qg`, a signed one, `signed.qg`, and the keys `key` and `other`."""
    folder = tmp_path_factory.mktemp("signing")
    shutil.copy(GOLDEN, folder / "model.qg")
    for name in ("key", "other"):
        made = qgraph("keygen", "-o", name, cwd=folder)
        assert made.code == 0, made.err
    done = qgraph("sign", "model.qg", "--key", "key.pem", "-o", "signed.qg", "--json", cwd=folder)
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"artifact": "signed.qg", "key": key_of(folder)}
    return folder


def key_of(folder: Path, name: str = "signed.qg") -> str:
    done = qgraph("verify", name, "--key", "key.pub", "--json", cwd=folder)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["artifact"] == name
    return str(found["key"])


def test_what_is_signed_is_verified_and_runs(folder: Path) -> None:
    assert (folder / "model.qg").read_bytes() == GOLDEN.read_bytes()
    for verb in ("run", "bench", "profile"):
        options = () if verb == "run" else ("--repeat", "1")
        done = qgraph(verb, "signed.qg", "--public-key", "key.pub", *options, cwd=folder)
        assert done.code == 0, done.err
        for artifact, key, said in (
            ("model.qg", "key.pub", "the file is not signed"),
            ("signed.qg", "other.pub", f"signed by key {key_of(folder)[:16]}"),
        ):
            done = qgraph(verb, artifact, "--public-key", key, *options, cwd=folder)
            assert done.code == 7 and done.out == "", done
            assert done.err.startswith(f"error: {artifact}: {said}") and done.err.count("\n") == 1


def test_generate_takes_a_key_for_artifacts_alone(folder: Path) -> None:
    options = ("--prompt-ids", "1", "--ids", "--public-key", "key.pub")
    unsigned = qgraph("generate", "model.qg", *options, cwd=folder)
    assert unsigned.code == 7 and "the file is not signed" in unsigned.err
    signed = qgraph("generate", "signed.qg", *options, cwd=folder)  # whose model is no language model
    assert signed.code == 2 and "logits" in signed.err
    onnx = qgraph("generate", "model.onnx", *options, cwd=folder)
    assert onnx.code == 2 and "onnxruntime knows no signatures" in onnx.err


def test_verify_refuses(folder: Path) -> None:
    data = (folder / "signed.qg").read_bytes()
    (folder / "changed.qg").write_bytes(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:])
    (folder / "damaged.qg").write_bytes(data[:-5000] + bytes([data[-5000] ^ 1]) + data[-4999:])
    for artifact, key, code, said in (
        ("model.qg", "key.pub", 7, "model.qg: not signed"),
        ("signed.qg", "other.pub", 7, f"signed.qg: signed by key {key_of(folder)}, not by "),
        ("changed.qg", "key.pub", 7, "changed.qg: the signature is wrong"),
        ("damaged.qg", "key.pub", 3, "damaged.qg: damaged artifact: "),
        ("signed.qg", "key.pem", 3, "key.pem: a private key, which is its owner's secret"),
        ("none.qg", "key.pub", 3, "none.qg: no such file"),
        ("key.pub", "key.pub", 3, "key.pub: not a qgraph artifact"),
    ):
        done = qgraph("verify", artifact, "--key", key, cwd=folder)
        assert done.code == code and done.out == "", done
        assert done.err.startswith(f"error: {said}") and done.err.count("\n") == 1, done


def test_signing_in_place(folder: Path, tmp_path: Path) -> None:
    path = shutil.copy(folder / "model.qg", tmp_path / "mine.qg")
    path.chmod(0o640)
    done = qgraph("sign", path, "--key", folder / "key.pem")
    assert done.code == 0, done.err
    assert path.read_bytes() == (folder / "signed.qg").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["mine.qg"]
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_no_name_for_keys(name: str, tmp_path: Path) -> None:
    done = qgraph("keygen", "-o", name, cwd=tmp_path)
    assert done.code == 2 and "is no name for keys" in done.err
    assert not list(tmp_path.iterdir())


def test_links_in_a_circle(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    done = qgraph("sign", folder / "model.qg", "--key", folder / "key.pem", "-o", "loop", cwd=tmp_path)
    assert done.code == 6 and "cannot write loop: too many levels of symbolic links" in done.err


def test_inspect_shows_who_it_claims_to_be_from(folder: Path) -> None:
    done = qgraph("inspect", "signed.qg", "--json", cwd=folder)
    assert json.loads(done.out)["signature"] == f"of key {key_of(folder)}, not verified"
    assert "signature" not in json.loads(qgraph("inspect", "model.qg", "--json", cwd=folder).out)


def test_keys_are_never_overwritten(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.glob("key.*")}
    done = qgraph("keygen", "-o", "key", cwd=folder)
    assert done.code == 2 and "key.pem exists" in done.err
    done = qgraph("sign", "model.qg", "--key", "key.pem", "-o", "key.pem", cwd=folder)
    assert done.code == 2 and "would overwrite" in done.err
    assert {path.name: path.read_bytes() for path in folder.glob("key.*")} == before


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_keys_of_openssl(folder: Path, tmp_path: Path) -> None:
    """What docs/sdk.md says of it."""
    script = (
        "openssl genpkey -algorithm ed25519 -out key.pem && openssl pkey -in key.pem -pubout -out key.pub"
        " && openssl pkey -pubin -in key.pub -outform DER | tail -c 32 | od -An -v -tx1"
    )
    made = command("bash", "-c", script, cwd=tmp_path)
    assert made.code == 0, made.err
    assert qgraph("sign", folder / "model.qg", "--key", "key.pem", "-o", "s.qg", cwd=tmp_path).code == 0
    assert key_of(tmp_path, "s.qg") == "".join(made.out.split())
