"""Calibration, as a user of the command line meets it: what it takes, what it refuses and how, and that a
compile which was interrupted goes on where it stopped."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_harness import ROOT, Compiled, Result, default_signals
from onnx import numpy_helper
from tiny_model import VOCABULARY, tiny_transformer

import qgraph.cli
from qgraph.cache import cache_dir
from qgraph.schemes import SCHEMES

USAGE, INPUT, BUDGET, RESOURCE = 2, 3, 5, 6
LAYERS, GROUPS = 12, 8  # of the tiny model: query, key and value read the same
SOLVERS = SCHEMES["nvfp4"].solvers

TEXT = ("--tokenizer", "../tokenizer.json")

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, VOCABULARY, (8, 12))
ONES = np.ones_like(IDS)


# ---- helpers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of this module's own, but for what takes long to make: kernels and runtime library."""
    return fresh_cache(tmp_path_factory.mktemp("cache"))


def fresh_cache(folder: Path) -> Path:
    for entry in cache_dir().iterdir():
        if entry.name != "calibration":
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture
def here(tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the model and its tokenizer one level above."""
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "tiny.onnx").symlink_to(tiny)
    write_tokenizer(tmp_path / "tokenizer.json", VOCABULARY)
    monkeypatch.chdir(work)
    monkeypatch.setenv("QGRAPH_CACHE_DIR", str(cache))
    return work


def run(*args: object) -> Result:
    """`qgraph ARGS` in this process, which is much faster."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = qgraph.cli.run([str(arg) for arg in args])
    return Result(code, out.getvalue(), err.getvalue())


def quantize(*args: object) -> Result:
    return run("quantize", "-q", "../tiny.onnx", "-o", "out", *args)


def assert_fails(result: Result, code: int, *words: str) -> None:
    """One line on stderr, with these words; nothing on stdout."""
    assert (result.code, result.out) == (code, ""), result
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line


def rows(out: str) -> dict[str, str]:
    """The table that a compile prints; of rows with the same label the last."""
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.splitlines() if "  " in line)


def report(name: str = "out") -> dict[str, object]:
    document: dict[str, object] = json.loads(Path(f"{name}.report.json").read_text())
    return document


def write_tokenizer(path: Path, words: int) -> None:
    """A word `w7` is the id 7, anything else 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{i}": i for i in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))


def lines(count: int = 20) -> list[str]:
    rng = np.random.default_rng(1)
    return [" ".join(f"w{i}" for i in rng.integers(0, VOCABULARY, rng.integers(3, 20))) for _ in range(count)]


def save_npz(
    path: str | Path, ids: np.ndarray = IDS, mask: np.ndarray | None = ONES, **more: np.ndarray
) -> None:
    arrays = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask}) | more
    np.savez(path, **arrays)  # type: ignore[arg-type]


# ---- what it takes -----------------------------------------------------------------------------------------


def test_every_kind_of_file(here: Path) -> None:
    """The table says what was used of it; the report has its hash, and the low-bit file no trace of where it
    lay."""
    save_npz("data.npz")
    text = lines()
    Path("data.txt").write_text("\ufeff" + "\r\n".join(text))  # as an editor may save it
    Path("data.jsonl").write_text("".join(json.dumps({"id": 7, "text": line}) + "\n" for line in text))
    tokens = sum(len(line.split()) for line in text)
    for args, samples, used in (
        (("data.npz",), 8, IDS.size),
        (("data.npz", "--samples", 2), 2, 2 * IDS.shape[1]),
        (("data.txt", *TEXT), 20, tokens),
        (("data.jsonl", *TEXT), 20, tokens),
        (("data.txt", *TEXT, "--length", 10), tokens // 10, tokens // 10 * 10),
        (("data.txt", *TEXT, "--length", 10, "--samples", 3), 3, 30),
    ):
        result = quantize("--calibration", *args)
        assert result.code == 0, result.err
        shown = rows(result.out)
        assert shown["solver"] == "gptq"
        assert shown["calibration"].startswith(f"{samples} samples ({used} tokens) of {args[0]}")
        found = report()["calibration"]
        assert isinstance(found, dict)
        assert {k: found[k] for k in ("source", "samples", "tokens")} == {
            "source": args[0],
            "samples": samples,
            "tokens": used,
        }
        recipe = json.loads({p.key: p.value for p in onnx.load("out.onnx").metadata_props}["qgraph.config"])
        assert recipe["calibration_sha256"] == found["sha256"]
        assert not any("data." in str(value) or "tokenizer" in str(value) for value in recipe.values())


def test_text_and_json_lines_of_the_same_text_are_the_same_data(here: Path) -> None:
    Path("a.txt").write_text("\n".join(lines()))
    Path("b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines()))
    found = []
    for name in ("a.txt", "b.jsonl"):
        assert quantize("--calibration", name, *TEXT).code == 0
        found.append(Path("out.onnx").read_bytes())
    assert found[0] == found[1]


def test_few_tokens_are_told(here: Path) -> None:
    save_npz("one.npz", IDS[:1, :1], ONES[:1, :1])
    save_npz("many.npz", np.tile(IDS, (2, 1)), np.tile(ONES, (2, 1)))
    few, many = quantize("--calibration", "one.npz"), quantize("--calibration", "many.npz")
    assert few.code == many.code == 0
    assert rows(few.out)["calibration"] == (
        "1 sample (1 token) of one.npz: FEW for a layer of 128 inputs, give as many tokens or more"
    )
    assert rows(many.out)["calibration"] == "16 samples (192 tokens) of many.npz"


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_by_name(solver: str, here: Path) -> None:
    save_npz("data.npz")
    result = quantize("--calibration", "data.npz", "--solver", solver)
    assert result.code == 0, result.err
    assert rows(result.out)["solver"] == solver
    assert "worst output" in rows(result.out)
    layers = report()["layers"]
    assert isinstance(layers, list)
    errors = [layer["output_error"] for layer in layers if layer["scheme"]]
    assert len(errors) == LAYERS
    assert all(0 < error < 0.03 for error in errors)


def test_a_dry_run_says_the_same_and_writes_nothing(here: Path) -> None:
    save_npz("data.npz")
    wet, dry = (quantize("--calibration", "data.npz", *more) for more in ((), ("--dry-run", "-o", "dry")))
    assert wet.code == dry.code == 0
    for label in ("layers", "solver", "calibration", "bits/weight", "worst SQNR", "worst output"):
        assert rows(dry.out)[label] == rows(wet.out)[label]
    assert not list(here.glob("dry*"))
    for args in (("compile",), ("compile", "--scheme", "nvfp4-w4a4", "--rotate", 16, "--smooth", 0.5)):
        result = run(*args, "-q", "../tiny.onnx", "-o", "dry", "--calibration", "data.npz", "--dry-run")
        assert result.code == 0, result.err
    assert not list(here.glob("dry*"))


def test_json(here: Path) -> None:
    save_npz("data.npz")
    result = quantize("--calibration", "data.npz", "--json")
    assert json.loads(result.out) == report()


def test_a_saved_configuration_does_the_same_again(here: Path) -> None:
    Path("text.txt").write_text("\n".join(lines()))
    options = (*TEXT, "--length", 8, "--samples", 9, "--calibrate-on", "quantized", "--smooth", 0.5)
    options += ("--rotate", 16, "--scheme", "nvfp4-w4a4", "--solver", "sweep-diagonal")
    first = quantize("--calibration", "text.txt", *options, "--save-config", "saved.toml")
    assert first.code == 0, first.err
    again = run("quantize", "-q", "../tiny.onnx", "-o", "again", "--config", "saved.toml")
    assert again.code == 0, again.err
    assert Path("again.onnx").read_bytes() == Path("out.onnx").read_bytes()
    assert report("again")["config"] == report()["config"]


# ---- what it makes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["function", "qdq"])
@pytest.mark.parametrize("scheme", ["nvfp4", "nvfp4-w4a8", "nvfp4-w4a4"])
def test_build_gives_the_bytes_of_compile_and_check_accepts_them(scheme: str, style: str, here: Path) -> None:
    save_npz("data.npz")
    options = ("--calibration", "data.npz", "--scheme", scheme, "--onnx-style", style)
    made = run("compile", "-q", "../tiny.onnx", "-o", "made", *options)
    assert made.code == 0, made.err
    built = run("build", "-q", "made.onnx", "-o", "built")
    assert built.code == 0, built.err
    assert Path("built.qg").read_bytes() == Path("made.qg").read_bytes()

    # What the second half cannot know itself, the low-bit file tells.
    assert rows(built.out)["layers"] == f"{LAYERS} of {LAYERS} linear layers quantized to {scheme}"
    assert rows(built.out)["solver"] == "gptq"
    data, found = report("made")["calibration"], report("built")["calibration"]
    assert isinstance(data, dict)
    assert found == {"source": None, "sha256": data["sha256"], "samples": None, "tokens": None}
    assert str(data["sha256"]) in rows(built.out)["calibration"]

    checked = run("check", "made.qg", "--lowbit", "made.onnx", "--original", "../tiny.onnx")
    assert checked.code == 0, checked.err
    rounds = "activations are rounded at 8 places" in checked.out  # an input is shared by its layers
    assert rounds == (scheme != "nvfp4")
    shown = json.loads(run("check", "made.qg", "--lowbit", "made.onnx", "--json").out)
    assert shown["roundings"] == (8 if rounds else 0)
    assert len(shown["comparisons"]) == (9 if rounds else 1)
    assert shown["faults"] == []

    inspected = run("inspect", "made.qg")
    assert inspected.code == 0
    assert str(data["sha256"]) in inspected.out
    assert "data.npz" not in inspected.out
    assert run("inspect", "made.onnx").code == 0


def test_check_finds_what_is_wrong_between_roundings(here: Path) -> None:
    """A weight that is off by one part in a hundred: found by the bits, as roundings hide small errors."""
    save_npz("data.npz")
    options = ("--calibration", "data.npz", "--scheme", "nvfp4-w4a4")
    assert run("compile", "-q", "../tiny.onnx", "-o", "made", *options).code == 0
    model = onnx.load("made.onnx")
    scale = next(t for t in model.graph.initializer if t.name == "layer.1.down.weight.global_scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.01), scale.name))
    onnx.save(model, "odd.onnx")
    result = run("check", "made.qg", "--lowbit", "odd.onnx", "--original", "../tiny.onnx")
    assert result.code == BUDGET
    assert "output 'hidden' at these inputs is not, bit for bit, that of an artifact built" in result.err
    assert "odd.onnx" in result.err
    assert "original" in result.out  # which is compared all the same


# ---- what it refuses ---------------------------------------------------------------------------------------


def _write(content: bytes | str) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda path: path.write_bytes(data)


def _npz(
    ids: np.ndarray = IDS, mask: np.ndarray | None = ONES, **more: np.ndarray
) -> Callable[[Path], object]:
    return lambda path: save_npz(path, ids, mask, **more)


def _truncated(path: Path) -> None:
    save_npz(path)
    path.write_bytes(path.read_bytes()[:-200])


def _flipped(path: Path) -> None:
    save_npz(path)
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)


def _single(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, IDS)


def _lying(shape: str) -> Callable[[Path], object]:
    """An array whose header claims that shape."""

    def write(path: Path) -> None:
        import zipfile

        header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}}}".ljust(117).encode() + b"\n"
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("input_ids", "attention_mask"):
                magic = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
                archive.writestr(f"{name}.npy", magic + header + bytes(64))

    return write


def _not_numpy(path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("input_ids", "1 2 3")
        archive.writestr("attention_mask", "1 1 1")


# name -> (file, how it is made, options, exit code, words)
BAD: dict[str, tuple[str, Callable[[Path], object], tuple[object, ...], int, tuple[str, ...]]] = {
    "missing": ("x.npz", lambda p: None, (), INPUT, ("x.npz: no such file",)),
    "missing text": ("x.txt", lambda p: None, TEXT, INPUT, ("x.txt: no such file",)),
    "folder": ("x.npz", Path.mkdir, (), INPUT, ("x.npz: not a regular file",)),
    "pipe": ("x.npz", os.mkfifo, (), INPUT, ("x.npz: not a regular file",)),
    "text pipe": ("x.txt", os.mkfifo, TEXT, INPUT, ("x.txt: not a regular file",)),
    "suffix": ("x.csv", _write("1,2"), (), USAGE, ("x.csv", "'.csv'", ".npz, .txt, .jsonl")),
    "no suffix": ("x", _write("1,2"), (), USAGE, ("unknown kind of file",)),
    "empty": ("x.npz", _write(""), (), INPUT, ("x.npz: not an .npz file",)),
    "text as npz": ("x.npz", _write("hello"), (), INPUT, ("x.npz: not an .npz file",)),
    "truncated": ("x.npz", _truncated, (), INPUT, ("x.npz: not an .npz file, or truncated",)),
    "flipped bit": ("x.npz", _flipped, (), INPUT, ("x.npz", "CRC")),
    "single array": ("x.npz", _single, (), INPUT, ("single array", "np.savez")),
    "zip of something": ("x.npz", _not_numpy, (), INPUT, ("'input_ids' is no array",)),
    "pickled objects": ("x.npz", _npz(np.array([{}], object)), (), INPUT, ("'input_ids' is no array",)),
    "header that lies": ("x.npz", _lying("(1000000000000000000,)"), (), INPUT, ("'input_ids'",)),
    "header with code": ("x.npz", _lying("f(1)"), (), INPUT, ("'input_ids'",)),
    "input lacking": ("x.npz", _npz(mask=None), (), INPUT, ("lacks", "'attention_mask'")),
    "input too many": ("x.npz", _npz(token_types=IDS), (), INPUT, ("'token_types'", "input_ids")),
    "type": ("x.npz", _npz(IDS.astype(np.float32)), (), INPUT, ("'input_ids' is float32", "int64")),
    "rank": ("x.npz", _npz(IDS[0], ONES[0]), (), INPUT, ("[batch, sequence]",)),
    "counts": ("x.npz", _npz(mask=ONES[:3]), (), INPUT, ("8 of 'input_ids', 3 of 'attention_mask'",)),
    "lengths": ("x.npz", _npz(mask=ONES[:, :5]), (), INPUT, ("'sequence'", "12", "5")),
    "no samples": ("x.npz", _npz(IDS[:0], ONES[:0]), (), INPUT, ("holds no samples",)),
    "zero length": ("x.npz", _npz(IDS[:, :0], ONES[:, :0]), (), INPUT, ("no token", "empty")),
    "all padding": ("x.npz", _npz(mask=0 * ONES), (), INPUT, ("all is padding",)),
    "id": ("x.npz", _npz(IDS + 90), (), INPUT, ("'input_ids'", "97 rows", "tokenizer")),
    "negative id": ("x.npz", _npz(IDS - 200), (), INPUT, ("'input_ids'", "97 rows")),
    "empty text": ("x.txt", _write(""), TEXT, INPUT, ("x.txt: no text",)),
    "blank text": ("x.txt", _write("\n \t\n\n"), TEXT, INPUT, ("x.txt: no text",)),
    "not UTF-8": ("x.txt", _write(b"w1 \xff\xfe"), TEXT, INPUT, ("x.txt: not a text in UTF-8",)),
    "not JSON": ("x.jsonl", _write('{"text": "w1"}\n}\n'), TEXT, INPUT, ("x.jsonl, line 2: not JSON",)),
    "no field": ("x.jsonl", _write('{"a": 1}\n'), TEXT, INPUT, ("x.jsonl, line 1", "'text'")),
    "deep JSON": ("x.jsonl", _write("[" * 10**5 + "\n"), TEXT, INPUT, ("x.jsonl, line 1: not JSON",)),
    "too short": ("x.txt", _write("w1 w2 w3"), (*TEXT, "--length", 9), INPUT, ("3 tokens", "window of 9")),
    "no tokenizer": ("x.txt", _write("w1"), (), USAGE, ("tokenizer.json",)),
    "tokenizer for npz": ("x.npz", _npz(), TEXT, USAGE, ("tokenizer", ".npz")),
    "length for npz": ("x.npz", _npz(), ("--length", 4), USAGE, ("length", ".npz")),
    "tokenizer missing": ("x.txt", _write("w1"), ("--tokenizer", "no.json"), INPUT, ("no.json: no such",)),
    "tokenizer is none": ("x.txt", _write("w1"), ("--tokenizer", "x.txt"), INPUT, ("not a tokenizer.json",)),
    "tokenizer is a folder": ("x.txt", _write("w1"), ("--tokenizer", ".."), INPUT, ("not a regular file",)),
    "foreign tokenizer": (
        "x.txt", _write("w1 w2\nw3 w150"), ("--tokenizer", "big.json"), INPUT,
        ("x.txt: line 2 holds 150 in 'input_ids'", "97 rows", "tokenizer"),
    ),
    "scheme none": ("x.npz", _npz(), ("--scheme", "none"), USAGE, ("'none' quantizes nothing",)),
    "solver": ("x.npz", _npz(), ("--solver", "gtpq"), USAGE, ("did you mean 'gptq'?",)),
    "solver of another format": ("x.npz", _npz(), ("--solver", "mxfp4-rtn"), USAGE, ("mxfp4-rtn",)),
    "samples": ("x.npz", _npz(), ("--samples", -1), USAGE, ("samples", "-1")),
    "length": ("x.txt", _write("w1"), (*TEXT, "--length", -1), USAGE, ("length", "-1")),
    "smooth": ("x.npz", _npz(), ("--smooth", 1.5), USAGE, ("smooth", "0 to 1")),
    "smooth is NaN": ("x.npz", _npz(), ("--smooth", "nan"), USAGE, ("smooth", "nan")),
    "rotate": ("x.npz", _npz(), ("--rotate", 24), USAGE, ("rotate", "16, 32, 64, 128")),
    "calibrate on": ("x.npz", _npz(), ("--calibrate-on", "flaot"), USAGE, ("did you mean 'float'?",)),
    "nothing to correct with": (
        "x.npz", _npz(), ("--calibrate-on", "corrected", "--solver", "rtn"), USAGE, ("corrected", "'rtn'"),
    ),
    "saved over the data": ("x.npz", _npz(), ("--save-config", "x.npz"), USAGE, ("overwrite",)),
    "saved over the tokenizer": (
        "x.txt", _write("w1"), ("--tokenizer", "big.json", "--save-config", "big.json"), USAGE,
        ("overwrite",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_data(name: str, here: Path) -> None:
    file, make, options, code, words = BAD[name]
    make(Path(file))
    write_tokenizer(Path("big.json"), 200)
    before = sorted(here.iterdir())
    assert_fails(quantize("--calibration", file, *options), code, *words)
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--solver", "gptq"), ("'gptq' needs calibration data",)),
        (("--scheme", "nvfp4-w4a4"), ("'nvfp4-w4a4' needs calibration data",)),
        (("--smooth", "0.5"), ("smooth needs calibration data",)),
        (("--samples", "3"), ("samples is for calibration data",)),
        (("--length", "3"), ("length is for calibration data",)),
        (TEXT, ("tokenizer is for calibration data",)),
        (("--calibrate-on", "corrected"), ("calibrate_on is for calibration data",)),
    ],
)
def test_options_that_need_data(options: tuple[str, ...], words: tuple[str, ...], here: Path) -> None:
    assert_fails(quantize(*options), USAGE, *words, "--calibration FILE")
    assert list(here.iterdir()) == []


def test_an_output_that_is_the_data(here: Path) -> None:
    """By way of a link, as the suffixes differ."""
    save_npz("data.npz")
    before = Path("data.npz").read_bytes()
    Path("out.onnx").symlink_to("data.npz")
    assert_fails(quantize("--calibration", "data.npz"), USAGE, "out.onnx is an input")
    assert Path("data.npz").read_bytes() == before


def _with(name: str, number: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        values = numpy_helper.to_array(tensor).copy()
        values[(3,) * values.ndim] = number
        tensor.CopyFrom(numpy_helper.from_array(values, name))

    return change


BAD_MODELS: dict[str, tuple[Callable[[onnx.ModelProto], None], tuple[str, ...]]] = {
    "NaN weight": (_with("layer.1.up.weight", np.nan), ("'layer.1.up.weight'", "nan at [3, 3]")),
    "infinite weight": (_with("layer.0.down.weight", np.inf), ("'layer.0.down.weight'", "inf at [3, 3]")),
    "huge weight": (_with("layer.0.down.weight", 1e38), ("'layer.0.down.weight' reaches",)),
    "NaN bias": (_with("layer.0.up.bias", np.nan), ("'layer.0/gelu_out' is not finite for", "x.npz")),
    "activations that overflow": (_with("norm.weight", 3e37), ("is not finite for", "x.npz")),
}


@pytest.mark.parametrize(
    "options", [(), ("--calibrate-on", "float"), ("--smooth", "0.5"), ("--solver", "rtn")]
)
@pytest.mark.parametrize("name", BAD_MODELS)
def test_numbers_that_are_not_finite(name: str, options: tuple[str, ...], here: Path) -> None:
    """The weight is named; or else the value, and the sample that brings it about."""
    change, words = BAD_MODELS[name]
    model = tiny_transformer()
    change(model)
    onnx.save(model, "bad.onnx")
    save_npz("x.npz")
    before = sorted(here.iterdir())
    result = run("quantize", "-q", "bad.onnx", "-o", "out", "--calibration", "x.npz", *options)
    if name == "activations that overflow" and result.err.count("beyond float32"):
        words = ("'norm_out' reaches", "exclude the layers")
    assert_fails(result, INPUT, *words)
    assert sorted(here.iterdir()) == before


def test_a_cache_that_cannot_be_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No silent compile without a journal."""
    save_npz("data.npz")
    Path("file").touch()
    monkeypatch.setenv("QGRAPH_CACHE_DIR", "file/cache")
    assert_fails(quantize("--calibration", "data.npz"), RESOURCE, "file/cache", "QGRAPH_CACHE_DIR")
    assert not Path("out.onnx").exists()


# ---- a compile that is interrupted -------------------------------------------------------------------------

SCRIPT = Path(__file__).parent / "interrupted_compile.py"
INTERRUPTIONS = [
    ("batch", 2), ("solve", 1), ("record", 4), ("apply", 5), ("border", 8), ("records are all there", 1),
    ("low-bit file", 1), ("artifact", 1),
]  # fmt: skip


def workplace(tiny: Path, folder: Path) -> tuple[Path, Path]:
    """(folder to work in, cache folder) in `folder`, with the model beside them."""
    (folder / "tiny.onnx").symlink_to(tiny)
    (folder / "cache").mkdir()
    return folder / "work", fresh_cache(folder / "cache")


def compile_tiny(folder: Path, cache: Path, event: str = "", count: int = 0, sent: str = "SIGKILL") -> Result:
    """`qgraph compile` with calibration, in `folder`."""
    folder.mkdir(exist_ok=True)
    save_npz(folder / "data.npz", np.tile(IDS, (2, 1)), np.tile(ONES, (2, 1)))  # two batches
    # The model by a path that is the same for all: the report holds its name.
    args = [
        "compile",
        "../tiny.onnx",
        "-o",
        "out",
        "--calibration",
        "data.npz",
        "--calibrate-on",
        "corrected",
    ]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), event, str(count), sent, *args],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "QGRAPH_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=default_signals,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def made(folder: Path) -> tuple[bytes, bytes, dict[str, object]]:
    """Artifact, ONNX file and report without times."""
    document = json.loads((folder / "out.report.json").read_text())
    assert document.pop("seconds")
    return (folder / "out.qg").read_bytes(), (folder / "out.onnx").read_bytes(), document


def reused(result: Result) -> int:
    """How many groups of layers the run says that it found done."""
    found = re.search(rf"(\d+) of {GROUPS} groups of layers were quantized by an earlier run", result.err)
    return int(found[1]) if found else 0


@pytest.fixture(scope="module")
def uninterrupted(
    tiny: Path, compiled: Compiled, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bytes, bytes, dict[str, object]]:
    work, cache = workplace(tiny, tmp_path_factory.mktemp("uninterrupted"))
    result = compile_tiny(work, cache)
    assert result.code == 0, result.err
    assert reused(result) == 0
    return made(work)


@pytest.mark.parametrize(("event", "count"), INTERRUPTIONS)
def test_a_compile_that_was_killed_goes_on(
    event: str,
    count: int,
    tiny: Path,
    uninterrupted: tuple[bytes, bytes, dict[str, object]],
    tmp_path: Path,
) -> None:
    work, cache = workplace(tiny, tmp_path)
    killed = compile_tiny(work, cache, event, count)
    assert killed.code == -9, killed.err
    assert not list(work.glob("out*"))  # nothing under its name
    again = compile_tiny(work, cache)
    assert again.code == 0, again.err
    done = {"batch": 0, "solve": count - 1, "record": count - 1, "apply": count, "border": None}.get(
        event, GROUPS
    )
    if done is None:  # after some group
        assert 0 < reused(again) < GROUPS
    else:
        assert reused(again) == done
    assert made(work) == uninterrupted
    if event == "record":
        third = compile_tiny(work, cache)
        assert reused(third) == GROUPS
        assert made(work) == uninterrupted


def test_killed_again_and_again(
    tiny: Path, uninterrupted: tuple[bytes, bytes, dict[str, object]], tmp_path: Path
) -> None:
    """Every run gets one group further."""
    work, cache = workplace(tiny, tmp_path)
    for done in range(GROUPS - 1):
        killed = compile_tiny(work, cache, "solve", 2)
        assert killed.code == -9
        assert reused(killed) == done
    last = compile_tiny(work, cache, "solve", 2)
    assert last.code == 0
    assert made(work) == uninterrupted


@pytest.mark.parametrize(("event", "sent", "code"), [("solve", "SIGINT", 130), ("border", "SIGTERM", 143)])
def test_ctrl_c_keeps_what_is_done(
    event: str,
    sent: str,
    code: int,
    tiny: Path,
    uninterrupted: tuple[bytes, bytes, dict[str, object]],
    tmp_path: Path,
) -> None:
    work, cache = workplace(tiny, tmp_path)
    stopped = compile_tiny(work, cache, event, 4, sent)
    assert stopped.code == code
    assert stopped.err.splitlines()[-1] in ("error: interrupted", "error: terminated")
    assert [path.name for path in work.iterdir()] == ["data.npz"]
    again = compile_tiny(work, cache)
    assert again.code == 0, again.err
    assert 0 < reused(again) < GROUPS
    assert made(work) == uninterrupted


def test_other_options_do_not_take_up_the_records(here: Path) -> None:
    """What decides a result is part of a journal's name; what does not is not."""
    save_npz("data.npz")
    save_npz("other.npz", IDS[:, ::-1])

    def notes(*args: object) -> str:
        done = run("quantize", "../tiny.onnx", "-o", "out", *args)
        assert done.code == 0, done.err
        return done.err

    first = ("--calibration", "data.npz", "--calibrate-on", "quantized", "--exclude", "*.key")
    assert "earlier run" not in notes(*first)
    for more in ((), ("--threads", 1), ("--onnx-style", "qdq")):
        assert "earlier run" in notes(*first, *more)
    for more in (("--samples", 3), ("--rotate", 16), ("--solver", "sweep"), ("--scheme", "nvfp4-w4a8")):
        assert "earlier run" not in notes(*first, *more)
    assert "earlier run" not in notes("--calibration", "other.npz", *first[2:])
    Path("renamed.npz").write_bytes(Path("data.npz").read_bytes())
    assert "earlier run" in notes("--calibration", "renamed.npz", *first[2:])


# ---- doctor ------------------------------------------------------------------------------------------------


def test_doctor_tells_what_the_cache_holds(here: Path) -> None:
    save_npz("data.npz")
    assert quantize("--calibration", "data.npz").code == 0
    found = {check["name"]: check["found"] for check in json.loads(run("doctor", "--json").out)}
    assert re.search(r": calibration [\d.]+ [kM]?B, kernels [\d.]+ [kM]?B", found["cache folder"])
