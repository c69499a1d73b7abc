"""Whatever is wrong: one clear line, the documented exit code, no traceback, and no file that was not there
before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_harness import ROOT, Compiled, Result, command, default_signals, qgraph
from onnx import TensorProto, helper, numpy_helper
from tiny_model import save_tiny, tiny_transformer

USAGE, INPUT, UNSUPPORTED, BUDGET, RESOURCE = 2, 3, 4, 5, 6


def assert_fails(result: Result, code: int, *words: str) -> None:
    """One line on stderr that begins with `error: ` and holds `words`; nothing on stdout; the exit code."""
    assert result.code == code, result
    assert result.out == ""
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.err
    assert all(char.isprintable() for char in lines[0])
    for word in words:
        assert word in lines[0], (word, lines[0])


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- models ------------------------------------------------------------------------------------------------


def _missing(path: Path) -> None:
    pass


def _empty(path: Path) -> None:
    path.touch()


def _truncated(path: Path) -> None:
    save_tiny(path)
    path.write_bytes(path.read_bytes()[:-1000])


def _random(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(4096))


def _text(path: Path) -> None:
    path.write_text("this is not a model\n" * 20)


def _folder(path: Path) -> None:
    path.mkdir()


def _change(change: Callable[[onnx.ModelProto], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        model = tiny_transformer()
        change(model)
        onnx.save(model, path)

    return write


def _foreign_op(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Gelu")
    node.op_type, node.domain = "Frobnicate", "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def _standard_op_without_kernel(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Gelu").op_type = "Det"


def _control_characters(model: onnx.ModelProto) -> None:
    _foreign_op(model)
    next(
        node for node in model.graph.node if node.op_type == "Frobnicate"
    ).name = "\x1b[31mred\x07\nnext\u202eline"


def _nan_weight(model: onnx.ModelProto) -> None:
    weight = next(t for t in model.graph.initializer if t.name == "layer.0.up.weight")
    values = numpy_helper.to_array(weight).copy()
    values[3, 5] = np.nan
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))


def _no_opset(model: onnx.ModelProto) -> None:
    del model.opset_import[:]


def _undefined_value(model: onnx.ModelProto) -> None:
    model.graph.node[5].input[0] = "nowhere"


def _external(location: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        weight = model.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)

    return change


MODELS: dict[str, tuple[Callable[[Path], None], int, tuple[str, ...]]] = {
    "missing": (_missing, INPUT, ("bad.onnx", "no such file")),
    "empty": (_empty, INPUT, ("bad.onnx", "empty")),
    "truncated": (_truncated, INPUT, ("bad.onnx", "truncated")),
    "random bytes": (_random, INPUT, ("bad.onnx", "not an ONNX model")),
    "text": (_text, INPUT, ("bad.onnx",)),
    "folder": (_folder, INPUT, ("bad.onnx", "not a file")),
    "operator of another domain": (_change(_foreign_op), UNSUPPORTED, ("Frobnicate", "layer.0/gelu")),
    "operator without a kernel": (_change(_standard_op_without_kernel), UNSUPPORTED, ("Det", "layer.0/gelu")),
    "control characters in a name": (
        _change(_control_characters),
        UNSUPPORTED,
        ("Frobnicate", r"\x1b[31mred"),
    ),
    "NaN weight": (_change(_nan_weight), INPUT, ("layer.0.up.weight",)),
    "no opset": (_change(_no_opset), INPUT, ("opset",)),
    "undefined value": (_change(_undefined_value), INPUT, ("nowhere",)),
    "external data missing": (_change(_external("gone.bin")), INPUT, ("gone.bin", "missing")),
    "external data above": (_change(_external("../gone.bin")), INPUT, ("../gone.bin",)),
    "external data absolute": (_change(_external("/etc/passwd")), INPUT, ("/etc/passwd",)),
}


@pytest.mark.parametrize("name", MODELS)
def test_bad_model(name: str, tmp_path: Path) -> None:
    write, code, words = MODELS[name]
    write(tmp_path / "bad.onnx")
    before = files(tmp_path)
    assert_fails(qgraph("compile", "-q", "bad.onnx", cwd=tmp_path), code, *words)
    assert files(tmp_path) == before


def test_a_low_bit_model_is_not_quantized_again(compiled: Compiled, tmp_path: Path) -> None:
    result = qgraph("compile", "-q", compiled.onnx, "-o", tmp_path / "x")
    assert_fails(result, USAGE, "quantized already", "qgraph build")


def test_a_4_bit_weight_that_no_kernel_reads(compiled: Compiled, tmp_path: Path) -> None:
    """It would run in float32, which nobody asked for: an error that names the node, not a slow artifact."""
    done = qgraph("quantize", "-q", compiled.model, "-o", tmp_path / "qdq", "--onnx-style", "qdq")
    assert done.code == 0, done.err
    model = onnx.load(tmp_path / "qdq.onnx")
    node = next(node for node in model.graph.node if node.name == "layer.0.up/weight")
    scale = next(n for n in model.graph.node if n.output[0] == node.input[1])
    scale.input.append("zero")
    model.graph.initializer.append(helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0]))
    onnx.save(model, tmp_path / "odd.onnx")
    before = files(tmp_path)
    assert_fails(
        qgraph("build", "-q", tmp_path / "odd.onnx"), UNSUPPORTED, "layer.0.up", "zero point", "float32"
    )
    assert files(tmp_path) == before


def test_a_failure_leaves_earlier_results(tiny: Path, tmp_path: Path) -> None:
    """What an earlier run wrote under the same names is untouched, byte for byte."""
    for suffix in (".onnx", ".qg", ".report.json"):
        (tmp_path / f"out{suffix}").write_text(f"earlier {suffix}")
    before = files(tmp_path)
    _change(_nan_weight)(tmp_path / "bad.onnx")
    before |= {"bad.onnx": (tmp_path / "bad.onnx").read_bytes()}
    assert_fails(qgraph("compile", "-q", "bad.onnx", "-o", "out", cwd=tmp_path), INPUT)
    assert files(tmp_path) == before


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = qgraph("compile", "-q", "missing.onnx", "--debug", cwd=tmp_path)
    assert result.code == INPUT
    assert "Traceback" in result.err


# ---- options -----------------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {
    "unknown scheme": (("--scheme", "nvfp5"), USAGE, ("nvfp5", "did you mean 'nvfp4'?")),
    "unknown embeddings": (("--embeddings", "int8"), USAGE, ("int8", "float, tied, nvfp4")),
    "embeddings of another scheme": (
        ("--embeddings", "nvfp4", "--scheme", "none"),
        USAGE,
        ("embeddings 'nvfp4'", "scheme 'none'"),
    ),
    "unknown solver": (("--solver", "sweeep"), USAGE, ("sweeep", "did you mean 'sweep'?")),
    "solver of another scheme": (("--scheme", "int4", "--solver", "pt2-llm"), USAGE, ("pt2-llm", "gptq")),
    "unknown packing": (("--scheme", "ternary", "--packing", "tiny"), USAGE, ("packing 'tiny'", "small")),
    "packing of what is not ternary": (("--packing", "small"), USAGE, ("packing 'small'", "ternary")),
    "unknown reorder": (("--scheme", "int2", "--reorder", "on"), USAGE, ("reorder 'on'", "fold, gather")),
    "mean shift without data": (
        ("--scheme", "int2", "--mean-shift", "all"),
        USAGE,
        ("mean_shift", "--calibration"),
    ),
    "dual scales of floats": (("--dual-scale", "on"), USAGE, ("dual_scale 'on'", "int2", "not 'nvfp4'")),
    "layer without a scheme": (("--layer", "*down*"), USAGE, ("PATTERN=SCHEME", "'*down*'")),
    "layer of an unknown scheme": (("--layer", "*down*=int5"), USAGE, ("unknown scheme 'int5'",)),
    "layer that matches nothing": (("--layer", "a=b=int4"), USAGE, ("layer pattern 'a=b'",)),
    "layer that is not among the linear ones": (
        ("--layer", "embedding=int4"),
        USAGE,
        ("'embedding'", "layer pattern"),
    ),
    "solver of a layer in float": (
        ("--layer", "*down*=none:rtn"),
        USAGE,
        ("layers: scheme 'none' of '*down*'", "takes no solver"),
    ),
    "layer without the scheme's activations": (
        ("--scheme", "nvfp4-w4a8", "--layer", "*down*=int4"),
        USAGE,
        ("'int4' of '*down*'", "does not round activations"),
    ),
    "unknown target": (("--target", "x86-linux"), USAGE, ("x86-linux", "did you mean 'x86_64-linux'?")),
    "unknown style": (("--onnx-style", "qcd"), USAGE, ("qcd", "did you mean 'qdq'?")),
    "unknown option": (("--schema", "nvfp4"), USAGE, ("--schema",)),
    "option without value": (("--scheme",), USAGE, ("--scheme",)),
    "two models": (("tiny.onnx",), USAGE, ("tiny.onnx",)),
    "negative threads": (("--threads", "-1"), USAGE, ("threads",)),
    "too many threads": (("--threads", "99999999"), USAGE, ("threads", "1024")),
    "config is a device": (("--config", "/dev/zero"), INPUT, ("/dev/zero", "not a regular file")),
    "config over the model": (("--save-config", "tiny.onnx"), USAGE, ("tiny.onnx", "overwrite")),
    "config over an output": (("--save-config", "./tiny.nvfp4.qg"), USAGE, ("tiny.nvfp4.qg", "overwrite")),
    "config and dry run": (("--save-config", "a.toml", "--dry-run"), USAGE, ("--dry-run",)),
    "config and a failure": (("--save-config", "a.toml", "--exclude", "no/such"), USAGE, ("no/such",)),
    "not a number": (("--seed", "x"), USAGE, ("--seed",)),
    "pattern that matches nothing": (("--exclude", "no/such/layer"), USAGE, ("no/such/layer",)),
    "config missing": (("--config", "none.toml"), INPUT, ("none.toml",)),
    "output folder missing": (("-o", "none/out"), RESOURCE, ("none/out", "does not exist")),
    "output is the input": (("-o", "tiny"), USAGE, ("tiny.onnx", "is an input")),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_option(name: str, tiny: Path, tmp_path: Path) -> None:
    options, code, words = OPTIONS[name]
    (tmp_path / "tiny.onnx").write_bytes(tiny.read_bytes())
    before = files(tmp_path)
    assert_fails(qgraph("compile", "-q", "tiny.onnx", *options, cwd=tmp_path), code, *words)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated"), (signal.SIGHUP, "hangup")],
)
def test_a_signal_leaves_nothing(number: signal.Signals, words: str, tiny: Path, tmp_path: Path) -> None:
    """Ctrl-C, `kill` or a closed terminal in the middle: 128 + signal, one line, no file."""
    args = [sys.executable, "-m", "qgraph", "compile", str(tiny), "-o", str(tmp_path / "out")]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "QGRAPH_CACHE_DIR": str(tmp_path / "cache"),
    }  # kernels take long
    process = subprocess.Popen(args, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=default_signals)
    assert process.stderr is not None
    for line in process.stderr:
        if line.split()[0] == "import":  # the phase before
            break
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 128 + number
    assert rest.strip() == f"error: {words}"
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == []


def test_unknown_command() -> None:
    assert_fails(qgraph("comple"), USAGE, "comple", "did you mean 'compile'?")


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("scheme = ", INPUT, ("bad.toml", "TOML")),
        ("shceme = 'nvfp4'", USAGE, ("shceme", "did you mean 'scheme'?")),
        ("include = 'all'", USAGE, ("include",)),
        ("threads = 'two'", USAGE, ("threads",)),
        ("verify = 1", USAGE, ("verify",)),
        ("\xff\xfe", INPUT, ("bad.toml",)),
    ],
)
def test_bad_config(text: str, code: int, words: tuple[str, ...], tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_bytes(text.encode("latin-1"))
    assert_fails(
        qgraph("compile", "-q", tiny, "--config", tmp_path / "bad.toml", "-o", tmp_path / "x"), code, *words
    )
    assert set(files(tmp_path)) == {"bad.toml"}


# ---- where the result goes ---------------------------------------------------------------------------------


def _mount(folder: Path, options: str) -> bool:
    """Whether a tmpfs could be mounted there: a matter of being root."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that this user cannot write to."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    mounted = _mount(folder, "ro")  # modes do not bind root
    if os.access(folder, os.W_OK):
        pytest.skip("nothing is read-only to root, and a tmpfs cannot be mounted")
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_unwritable_folder(tiny: Path, locked: Path) -> None:
    result = qgraph("compile", "-q", tiny, "-o", locked / "out")
    assert_fails(result, RESOURCE, "cannot write", "read-only" if os.geteuid() == 0 else "permission denied")


def test_unwritable_run_output(compiled: Compiled, locked: Path) -> None:
    assert_fails(qgraph("run", compiled.artifact, "-o", locked / "out.npz"), RESOURCE, "cannot write")


def test_output_below_a_file(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_fails(qgraph("compile", "-q", tiny, "-o", tmp_path / "file" / "out"), RESOURCE, "not a directory")


def test_output_is_a_folder(tiny: Path, tmp_path: Path) -> None:
    """A folder stands where the artifact should go."""
    (tmp_path / "out.qg").mkdir()
    assert_fails(qgraph("compile", "-q", tiny, "-o", tmp_path / "out"), RESOURCE, "out.qg", "directory")
    assert [p.name for p in tmp_path.iterdir()] == ["out.qg"]


def test_a_folder_stands_where_the_report_should_go(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out.report.json").mkdir()
    result = qgraph("quantize", "-q", tiny, "-o", tmp_path / "out")
    assert_fails(result, RESOURCE, "cannot write", "out.report.json: it is a directory")
    assert [p.name for p in tmp_path.iterdir()] == ["out.report.json"]


# Kilobytes that are too few for the tiny model's ONNX file, and too few for its artifact but not for the ONNX
# file.
TOO_SMALL = (32, 128)


@pytest.fixture(params=TOO_SMALL)
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system that is too small."""
    folder = tmp_path / "small"
    folder.mkdir()
    if not _mount(folder, f"size={request.param}k"):
        pytest.skip("needs root that may mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(tiny: Path, small_disk: Path) -> None:
    result = qgraph("compile", "-q", tiny, "-o", small_disk / "out")
    assert_fails(result, RESOURCE, "the disk is full")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("limit", TOO_SMALL)
def test_file_size_limit(limit: int, tiny: Path, tmp_path: Path) -> None:
    """The same without root: the process may write no larger file."""
    script = 'ulimit -f "$0"; trap "" XFSZ; exec "$1" -m qgraph compile -q "$2" -o "$3"'
    result = command("bash", "-c", script, str(limit), sys.executable, str(tiny), str(tmp_path / "out"))
    assert_fails(result, RESOURCE, "cannot write")
    assert list(tmp_path.iterdir()) == []


# ---- at run time -------------------------------------------------------------------------------------------


def _feeds(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    feeds: dict[str, np.ndarray | None] = {
        "input_ids": np.arange(14, dtype=np.int64).reshape(2, 7),
        "attention_mask": np.ones((2, 7), np.int64),
        **changes,
    }
    return {name: array for name, array in feeds.items() if array is not None}


FEEDS: dict[str, tuple[dict[str, np.ndarray], tuple[str, ...]]] = {
    "missing input": (_feeds(attention_mask=None), ("attention_mask", "missing")),
    "unknown input": (_feeds(token_types=np.ones((2, 7), np.int64)), ("token_types",)),
    "wrong dtype": (_feeds(input_ids=np.ones((2, 7), np.float32)), ("input_ids", "int64", "float32")),
    "wrong rank": (_feeds(input_ids=np.ones(7, np.int64)), ("input_ids",)),
    "dims that disagree": (_feeds(attention_mask=np.ones((2, 8), np.int64)), ("attention_mask",)),
    "no elements": (_feeds(input_ids=np.ones((0, 7), np.int64)), ("batch",)),
    "id outside the table": (_feeds(input_ids=np.full((2, 7), 97, np.int64)), ("embedding",)),
}


@pytest.mark.parametrize("name", FEEDS)
def test_bad_feeds(name: str, compiled: Compiled, tmp_path: Path) -> None:
    feeds, words = FEEDS[name]
    np.savez(tmp_path / "in.npz", **feeds)  # type: ignore[arg-type]
    result = qgraph("run", compiled.artifact, "--input", tmp_path / "in.npz", "-o", tmp_path / "out.npz")
    assert_fails(result, INPUT, *words)
    assert set(files(tmp_path)) == {"in.npz"}


RUN_OPTIONS: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {
    "input file missing": (("--input", "input_ids=none.npy"), INPUT, ("none.npy", "no such file")),
    "input file not numpy": (("--input", "input_ids=text.npy"), INPUT, ("text.npy",)),
    "input with pickle": (("--input", "input_ids=pickle.npy"), INPUT, ("pickle.npy",)),
    "npy without a name": (("--input", "ids.npy"), USAGE, ("ids.npy", "name")),
    "unknown dim": (("--dim", "bach=2"), USAGE, ("bach", "batch")),
    "malformed dim": (("--dim", "batch"), USAGE, ("batch", "NAME=SIZE")),
    "zero dim": (("--dim", "batch=0"), USAGE, ("batch", "at least 1")),
    "huge dim": (("--dim", f"batch={10**12}"), USAGE, ("batch", "the model takes 1 to ")),
    "dim twice": (("--dim", "batch=2", "--dim", "batch=3"), USAGE, ("'batch' twice",)),
    "unknown isa": (("--isa", "x86-64-v5"), USAGE, ("x86-64-v5", "did you mean")),
    "too many threads": (("--threads", "5000"), USAGE, ("--threads", "1024")),
    "negative seed": (("--seed", "-1"), USAGE, ("--seed",)),
    "input without a file": (("--input", "input_ids="), USAGE, ("NAME=FILE",)),
    "input is a pipe": (("--input", "input_ids=pipe"), INPUT, ("pipe", "not a regular file")),
    "input whose header lies": (("--input", "input_ids=huge.npy"), INPUT, ("huge.npy", "memory")),
    "input with code for a header": (("--input", "input_ids=call.npy"), INPUT, ("call.npy: not a .npy",)),
    "output is the artifact": (("-o", "tiny.qg"), USAGE, ("tiny.qg", "overwrite")),
    "output is an input": (("--input", "in.npz", "-o", "link.npz"), USAGE, ("link.npz", "overwrite")),
}


@pytest.mark.parametrize("name", RUN_OPTIONS)
def test_bad_run_option(name: str, compiled: Compiled, tmp_path: Path) -> None:
    options, code, words = RUN_OPTIONS[name]
    (tmp_path / "text.npy").write_text("not numpy")
    np.save(tmp_path / "ids.npy", np.ones((2, 7), np.int64))
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], object), allow_pickle=True)
    _npy_header(tmp_path / "huge.npy", f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({10**18},)}}")
    _npy_header(tmp_path / "call.npy", "{'descr': '<i8', 'fortran_order': False, 'shape': f(1)}")
    np.savez(tmp_path / "in.npz", **_feeds())  # type: ignore[arg-type]
    (tmp_path / "link.npz").symlink_to("in.npz")
    (tmp_path / "tiny.qg").write_bytes(compiled.artifact.read_bytes())
    before = files(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert_fails(qgraph("run", "tiny.qg", *options, cwd=tmp_path, timeout=60), code, *words)
    assert files(tmp_path) == before


def _npy_header(path: Path, header: str) -> None:
    text = header.ljust(117).encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64))


def test_damaged_artifact(compiled: Compiled, tmp_path: Path) -> None:
    """A flipped bit, a cut, and what is no artifact at all: by `run` and by `inspect`."""
    data = bytearray(compiled.artifact.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped.qg").write_bytes(data)
    (tmp_path / "cut.qg").write_bytes(compiled.artifact.read_bytes()[:-1])
    (tmp_path / "empty.qg").touch()
    (tmp_path / "onnx.qg").write_bytes(compiled.model.read_bytes())
    for name in ("flipped", "cut", "empty", "onnx", "missing"):
        for verb in ("run", "inspect"):
            assert_fails(qgraph(verb, tmp_path / f"{name}.qg"), INPUT, f"{name}.qg")


def test_check_exits_with_5_beyond_its_limits(compiled: Compiled) -> None:
    """Against the original at a demand that 4-bit weights cannot meet: the table is printed, then the
    error."""
    result = qgraph("check", compiled.artifact, "--original", compiled.model, "--min-cosine", "0.99999999")
    assert result.code == BUDGET
    assert result.err.count("\n") == 1 and result.err.startswith("error: ")
    assert "MISSED" in result.out


def test_check_needs_a_reference(compiled: Compiled) -> None:
    assert_fails(qgraph("check", compiled.artifact), USAGE, "--lowbit")


def test_internal_errors_are_one_line_and_70(tmp_path: Path) -> None:
    """An exception that nobody foresaw."""
    code = (
        "import sys, qgraph.cli.schemes as s\n"
        "s.SCHEMES = None\n"
        "from qgraph.cli import run\n"
        "sys.exit(run(['schemes']))"
    )
    assert_fails(command(sys.executable, "-c", code), 70, "internal error", "--debug")


# ---- where the output goes ---------------------------------------------------------------------------------


def shell(script: str, *args: object) -> Result:
    """A bash script in which `qgraph` is the command and $1... are the arguments."""
    define = f'qgraph() {{ "{sys.executable}" -m qgraph "$@"; }}\n'
    return command("bash", "-c", define + script, "bash", *map(str, args))


def test_a_closed_pipe_is_141_and_silent(compiled: Compiled) -> None:
    for verb in ("inspect", "schemes", "--help"):
        done = shell(
            'qgraph "$@" | true; exit ${PIPESTATUS[0]}', verb, *[compiled.artifact][: verb == "inspect"]
        )
        assert (done.code, done.err) == (141, ""), verb


@pytest.mark.parametrize("redirect", [">&-", ">&- 2>&-", "<&- >&-"])
def test_closed_streams(redirect: str, compiled: Compiled) -> None:
    done = shell(
        f'qgraph inspect "$1" {redirect} && qgraph inspect --json "$1" {redirect}', compiled.artifact
    )
    assert (done.code, done.out, done.err) == (0, "", "")


def test_an_encoding_without_the_letters(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "t\u00efny \U0001f642.onnx"
    source.write_bytes(tiny.read_bytes())
    done = shell('PYTHONIOENCODING=ascii qgraph quantize -q "$1"', source)
    assert (done.code, done.err) == (0, "")
    assert r"t\xefny \U0001f642.nvfp4.onnx" in done.out


def test_a_full_device_is_a_line(compiled: Compiled) -> None:
    assert_fails(shell('qgraph inspect "$1" > /dev/full', compiled.artifact), RESOURCE, "no space left")


# ---- the same from Python ----------------------------------------------------------------------------------


def test_wrong_python_arguments(compiled: Compiled) -> None:
    import qgraph as api
    from qgraph.errors import InputError, UsageError

    with pytest.raises(UsageError, match="output: a path cannot hold the character NUL"):
        api.compile(compiled.model, output="a\0b")
    with pytest.raises(UsageError, match="output: expected a path, got a int"):
        api.compile(compiled.model, output=3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="model: expected a path, got a NoneType"):
        api.compile(None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="config: expected a CompileConfig, got a dict"):
        api.compile(compiled.model, {"a": 1})  # type: ignore[arg-type]
    with api.load(compiled.artifact) as model:
        for inputs in (None, [1]):
            with pytest.raises(InputError, match="give a dict of input_ids, attention_mask to arrays"):
                model.run(inputs)  # type: ignore[arg-type]
        masked = np.ma.masked_array(np.ones((1, 2), np.int64), [[True, False]])
        with pytest.raises(InputError, match="'input_ids' is a masked array"):
            model.run(_feeds(input_ids=masked))
