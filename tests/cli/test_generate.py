"""`qgraph generate`: what it prints where, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_harness import ROOT, default_signals
from onnx import TensorProto, helper, numpy_helper
from tiny_decoder import VOCABULARY, save_decoder
from tokenizers_for_tests import saved

from qgraph.cli import run
from qgraph.generation.text import Text

USAGE, INPUT = 2, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes; a model that writes "abc..z", then ESC, over and over; a decoder with a cache."""
    path = tmp_path_factory.mktemp("generate")
    text = Text(saved("bytes", path))
    ids = text.encode("abcdefghijklmnopqrstuvwxyz\x1b\n")
    table = np.zeros((text.size, text.size), np.float32)
    for token, follows in pairwise([*ids, ids[0]]):
        table[token, follows] = 9
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["logits"])],
        "alphabet",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", text.size])],
        [numpy_helper.from_array(table, "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.save(model, path / "alphabet.onnx")
    save_decoder(path / "decoder.onnx", cache=True)
    return path


class Generate:
    """Runs the verb in this process; `alphabet.onnx` with its tokenizer if not told otherwise."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capture = folder, capture

    def __call__(self, *args: object, model: str = "alphabet.onnx", tokenizer: bool = True) -> str:
        code, out, err = self.result(*args, model=model, tokenizer=tokenizer)
        assert code == 0, err
        self.err = err
        return out

    def result(
        self, *args: object, model: str = "alphabet.onnx", tokenizer: bool = True
    ) -> tuple[int, str, str]:
        options = ["--tokenizer", str(self.folder / "tokenizer.json")] if tokenizer else []
        self._capture.readouterr()
        code = run(["generate", str(self.folder / model), *options, "--threads", "1", *map(str, args)])
        out, err = self._capture.readouterr()
        return code, out, err

    def fails(self, code: int, message: str, *args: object, **options: object) -> None:
        found, out, err = self.result(*args, **options)  # type: ignore[arg-type]
        assert (found, out) == (code, ""), err
        assert re.fullmatch(f"error: .*{message}.*\n", err), err


@pytest.fixture
def generate(folder: Path, capsys: pytest.CaptureFixture[str]) -> Generate:
    return Generate(folder, capsys)


def test_text_goes_to_stdout_alone(generate: Generate) -> None:
    assert generate("-p", "xyza", "-n", 6) == "bcdefg\n"
    assert generate.err == ""
    assert generate("-p", "xyza", "-n", 6, "--echo") == "xyzabcdefg\n"
    assert generate("-p", "c", "--stop", "hi") == "defg\n"
    assert generate("-p", "y", "-n", 4) == "z\x1b\na\n"  # to a pipe as it is


def test_prompts_from_files(generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompt.txt").write_text("xyz abc", encoding="utf-8")
    assert generate("--prompt-file", tmp_path / "prompt.txt", "-n", 3) == "def\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"f")))
    assert generate("--prompt-file", "-", "-n", 2) == "gh\n"


def test_ids(generate: Generate) -> None:
    ids = Text(generate.folder / "tokenizer.json").encode("abcde")
    listed = " ".join(map(str, ids))
    assert generate("-p", "a", "-n", 4, "--ids") == " ".join(map(str, ids[1:])) + "\n"
    assert generate("-p", "a", "-n", 4, "--ids", "--echo") == listed + "\n"
    assert generate("--prompt-ids", f"{ids[0]}, {ids[1]}", "-n", 3) == "cde\n"
    bare = generate("--prompt-ids", ids[0], "-n", 4, "--ids", "--echo", tokenizer=False)
    assert bare == listed + "\n"


def test_statistics_go_to_stderr(generate: Generate) -> None:
    assert generate("-p", "ab", "-n", 5, "--stats") == "cdefg\n"
    assert re.fullmatch(
        r"prompt: 2 tokens, [\d.]+ tokens/s, first token after [\d.]+ s\n"
        r"generated: 5 tokens, [\d.]+ tokens/s\n",
        generate.err,
    )


def test_json(generate: Generate) -> None:
    bare = json.loads(generate("--prompt-ids", "1 2", "-n", 2, "--json", tokenizer=False))
    assert bare["prompt_ids"] == [1, 2]
    found = json.loads(generate("-p", "ab", "-n", 5, "--json"))
    ids = Text(generate.folder / "tokenizer.json").encode("abcdefg")
    assert found["engine"] == "onnxruntime"
    assert found["prompt_ids"] == ids[:2]
    assert found["samples"] == [{"text": "cdefg", "ids": ids[2:], "reason": "length"}]
    assert found["timing"]["prompt_tokens"] == 2 and found["timing"]["generated_tokens"] == 5


def test_seeds_and_samples(generate: Generate) -> None:
    options = ("--prompt-ids", "5 6 7", "-n", 12, "--ids", "--temperature", 1.5, "--top-k", 20)

    def drawn(*more: object) -> str:
        return generate(*options, *more, model="decoder.onnx", tokenizer=False)

    assert drawn() == drawn("--seed", 0) != drawn("--seed", 1)
    several = drawn("--samples", 3)
    assert re.fullmatch(r"--- 1 of 3\n([\d ]+)\n--- 2 of 3\n([\d ]+)\n--- 3 of 3\n([\d ]+)\n", several)
    assert several.splitlines()[1] == drawn().strip()
    assert len(set(several.splitlines())) == 6


def test_a_capacity_is_noted(generate: Generate) -> None:
    assert generate("-p", "ab", "--capacity", 5) == "cdef\n"
    assert generate.err == "note: the text ends at the capacity of 5 tokens\n"
    generate.fails(
        INPUT, "the prompt has 6 tokens, the model has room for 5", "-p", "abcdef", "--capacity", 5
    )


def test_what_is_wrong(generate: Generate, tmp_path: Path) -> None:
    generate.fails(USAGE, "give one of --prompt, --prompt-file and --prompt-ids")
    generate.fails(USAGE, "give one of", "-p", "a", "--prompt-ids", "1")
    generate.fails(USAGE, "--prompt-ids 1 x: expected token ids", "--prompt-ids", "1 x")
    generate.fails(USAGE, "the prompt is empty", "-p", "")
    generate.fails(USAGE, "text needs the model's --tokenizer", "-p", "a", tokenizer=False)
    generate.fails(USAGE, "a prompt of text needs", "-p", "a", "--ids", tokenizer=False)
    generate.fails(INPUT, "the prompt: no tokens for this text", "-p", "\udcff")
    generate.fails(USAGE, "with --json the prompt is", "-p", "a", "--json", "--echo")
    generate.fails(USAGE, "all the same", "-p", "a", "--samples", 2)
    generate.fails(USAGE, "top_k says what is drawn from", "-p", "a", "--top-k", 4)
    generate.fails(USAGE, "temperature", "-p", "a", "--temperature", "nan")
    generate.fails(INPUT, "no such file", "--prompt-file", tmp_path / "none")
    generate.fails(INPUT, "no such file", "-p", "a", model="none.onnx")
    (tmp_path / "latin").write_bytes(b"\xe9")
    generate.fails(INPUT, "not text in UTF-8", "--prompt-file", tmp_path / "latin")
    generate.fails(
        INPUT, r"not a tokenizer\.json", "-p", "a", "--tokenizer", generate.folder / "alphabet.onnx"
    )
    generate.fails(INPUT, f"logits for {VOCABULARY}: it is another model's", "-p", "a", model="decoder.onnx")
    wrong = ("--prompt-ids", VOCABULARY, "--ids")
    generate.fails(INPUT, f"token {VOCABULARY} has no logit", *wrong, model="decoder.onnx", tokenizer=False)


def test_a_model_without_logits(generate: Generate, tiny: Path) -> None:
    generate.fails(USAGE, "has no output 'logits'; it has hidden", "-p", "a", model=str(tiny))


def _started(folder: Path, *args: object, **options: object) -> subprocess.Popen:
    """An endless text, in a process of its own."""
    command = [sys.executable, "-m", "qgraph", "generate", folder / "alphabet.onnx", "-p", "a", "-n", 10**7]
    return subprocess.Popen(
        [str(part) for part in (*command, "--tokenizer", folder / "tokenizer.json", "--threads", 1, *args)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=default_signals,
        **options,  # type: ignore[call-overload]
    )


def test_ctrl_c_ends_a_text(folder: Path) -> None:
    process = _started(folder, "--stats", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    head = process.stdout.read(40)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert head.startswith(b"bcdefg") and (head + rest).endswith(b"\n")
    lines = [line for line in err.decode().splitlines() if line]
    assert lines[0].startswith("prompt: 1 tokens") and lines[1].startswith("generated: ")
    assert lines[2:] == ["error: interrupted"]


def test_a_terminal_gets_no_control_characters(folder: Path) -> None:
    """A reader that goes away, too: a terminal that is closed."""
    main, terminal = pty.openpty()
    process = _started(folder, stdout=terminal, stderr=subprocess.PIPE)
    os.close(terminal)
    shown, end = b"", time.monotonic() + 60
    while len(shown) < 200 and time.monotonic() < end:
        shown += os.read(main, 200)
    process.terminate()
    os.close(main)
    _, err = process.communicate(timeout=60)
    assert b"\x1b" not in shown and b"\\x1b" in shown and b"xyz" in shown
    assert b"Traceback" not in err


def test_the_reader_of_a_pipe_goes_away(folder: Path) -> None:
    process = _started(folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(5) == b"bcdef"
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
