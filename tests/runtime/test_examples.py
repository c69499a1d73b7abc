"""The examples, built against the installed SDK and run: each beside numpy or the Python face."""

from __future__ import annotations

import copy
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from artifact_builder import Parts, toy_decoder_reference, toy_inputs, toy_reference
from cmake_build import RUNTIME, run

from qgraph.codegen.static_library import write_library
from qgraph.pipeline import CompileResult

SENTENCES = [[3, 14, 15, 9], [3, 14, 15], [26, 5]]


def hidden_states(encoder: CompileResult, ids: list[int]) -> np.ndarray:
    """[length, width]"""
    row = np.array([ids])
    inputs = {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)}
    with encoder.load() as model:
        return model.run(inputs)["last_hidden_state"][0]


def first_numbers(output: str, name: str) -> np.ndarray:
    (line,) = [line for line in output.splitlines() if line.startswith(f"{name}: ")]
    return np.array(line.split()[1:], np.float32)


def test_embed(examples: Path, encoder: CompileResult) -> None:
    text = "".join(" ".join(map(str, ids)) + "\n" for ids in SENTENCES)
    output = run(examples / "qgraph_embed", encoder.artifact, input=text, env={})
    rows = [hidden_states(encoder, ids).astype(np.float64).mean(axis=0) for ids in SENTENCES]
    rows = [row / np.linalg.norm(row) for row in rows]
    np.testing.assert_allclose([float(x) for x in output.split()], [row @ rows[0] for row in rows], atol=2e-6)
    done = subprocess.run(
        [examples / "qgraph_embed", str(encoder.artifact)], input="1 2 x", text=True, capture_output=True
    )
    assert done.returncode == 1 and "'1 2 x' is not a line of token ids" in done.stderr


def test_c(examples: Path, encoder: CompileResult) -> None:
    command = [examples / "qgraph_c", encoder.artifact, "3", "14", "15"]
    done = subprocess.run([str(part) for part in command], text=True, capture_output=True, check=True)
    want = hidden_states(encoder, [3, 14, 15]).ravel()[:4]
    np.testing.assert_array_equal(first_numbers(done.stdout, "last_hidden_state"), want)
    assert done.stdout.splitlines()[-1].endswith(", 0 afterwards")
    assert "info: loaded " in done.stderr and "info: memory: " in done.stderr


def test_static(examples: Path, encoder: CompileResult) -> None:
    output = run(examples / "qgraph_static", "3", "14", "15", env={})
    want = hidden_states(encoder, [3, 14, 15]).ravel()[:4]
    np.testing.assert_array_equal(first_numbers(output, "last_hidden_state"), want)
    assert int(output.split()[-4]) > 0  # bytes of the block in use


def test_static_needs_neither_files_nor_mappings(
    prefix: Path, encoder: CompileResult, tmp_path: Path
) -> None:
    """What of these the runtime calls would end the program."""
    names = ("open", "open64", "fopen", "mmap", "mmap64", "mprotect", "dlopen", "dlsym")
    guard = tmp_path / "guard.c"
    guard.write_text(
        "#include <stdlib.h>\n" + "".join(f"void __wrap_{n}(void) {{ abort(); }}\n" for n in names)
    )
    run(os.environ.get("CC", "cc"), "-c", guard, "-o", tmp_path / "guard.o")
    assert encoder.artifact is not None
    folder = encoder.artifact.parent
    libraries = [folder / "libmodel.a", prefix / "lib" / "libqgraph.a"]
    wraps = [f"-Wl,--wrap={name}" for name in names]
    compiler = os.environ.get("CXX", "c++").split()

    def build(source: Path, program: Path) -> None:
        options = ["-std=c++17", f"-I{prefix / 'include'}", f"-I{folder}", "-pthread"]
        run(*compiler, *options, source, tmp_path / "guard.o", *libraries, *wraps, "-o", program)

    build(RUNTIME / "examples" / "static.cc", tmp_path / "static")
    output = run(tmp_path / "static", "3", "14", "15", cwd=tmp_path, env={})
    want = hidden_states(encoder, [3, 14, 15]).ravel()[:4]
    np.testing.assert_array_equal(first_numbers(output, "last_hidden_state"), want)
    build(RUNTIME / "examples" / "run.cc", tmp_path / "run")  # the guard is in force: this one opens a file
    assert subprocess.run([tmp_path / "run", encoder.artifact], capture_output=True).returncode < 0


def test_a_large_model_loads_without_threads(toy_parts: Parts, prefix: Path, tmp_path: Path) -> None:
    """Linked statically, so that the guard stands before every thread that is begun."""
    parts = copy.deepcopy(toy_parts)
    parts.weights["w/large"] = np.zeros(5 << 20, np.uint8)
    (tmp_path / "large.qg").write_bytes(parts.to_bytes())
    write_library(tmp_path / "large.qg", "large", tmp_path / "liblarge.a", tmp_path / "large.h")
    (tmp_path / "main.cc").write_text(
        '#include <cstdlib>\n#include "large.h"\n'
        'extern "C" int __wrap_pthread_create() { std::abort(); }\n'
        "int main(int, char** argv) {\n"
        "  qg_load_options options = QG_LOAD_OPTIONS_INIT;\n"
        "  options.threads = std::atoi(argv[1]);\n"
        "  qg_model* model;\n"
        "  return large_load(&options, &model);\n}\n"
    )
    options = ["-std=c++17", "-static", "-pthread", f"-I{prefix / 'include'}", f"-I{tmp_path}"]
    libraries = [tmp_path / "liblarge.a", prefix / "lib" / "libqgraph.a", "-Wl,--wrap=pthread_create"]
    compiler = os.environ.get("CXX", "c++").split()
    run(*compiler, *options, tmp_path / "main.cc", *libraries, "-o", tmp_path / "main")
    assert subprocess.run([tmp_path / "main", "1"], capture_output=True).returncode == 0
    assert subprocess.run([tmp_path / "main", "2"], capture_output=True).returncode < 0


def test_threads(examples: Path, toy_path: Path, encoder: CompileResult) -> None:
    """16 threads, 1000 runs each: bit-equal."""
    for path in (toy_path, encoder.artifact):
        assert "16 threads, 1000 runs each: 0 differ" in run(examples / "qgraph_threads", path)


def test_threads_sees_a_difference(examples: Path, decoder_parts: Parts, tmp_path: Path) -> None:
    """The check can fail: a step that reads what the run before left in the arena."""
    parts = copy.deepcopy(decoder_parts)
    path = tmp_path / "stale.qg"
    late = next(step for step in parts.plan["steps"] if step["name"] == "weigh")
    parts.plan["steps"].remove(late)
    parts.plan["steps"].append(late)
    path.write_bytes(parts.to_bytes())
    done = subprocess.run([examples / "qgraph_threads", path, "2", "3"], text=True, capture_output=True)
    assert done.returncode == 1 and "results differ" in done.stderr


def test_memory_does_not_grow(prefix: Path, toy_path: Path, tmp_path: Path) -> None:
    """100,000 runs and 1,000 loads; $QGRAPH_SOAK times as many for a longer look."""
    times = int(os.environ.get("QGRAPH_SOAK", "1"))
    source, program = RUNTIME / "tests" / "soak.cc", tmp_path / "soak"
    options = ["-std=c++17", "-O1", f"-I{prefix / 'include'}", "-pthread"]
    compiler = os.environ.get("CXX", "c++").split()
    run(*compiler, *options, source, prefix / "lib" / "libqgraph.a", "-o", program)
    output = run(program, toy_path, str(100_000 * times), str(1_000 * times))
    assert f"{100_000 * times} runs: " in output and f"{1_000 * times} load and unload: " in output


def test_example_agrees_with_numpy(examples: Path, toy_path: Path, toy_parts: Parts, tmp_path: Path) -> None:
    """Run in an empty environment and folder: no Python, no other file of qgraph's."""
    inputs = toy_inputs(3, 5)
    arguments = []
    for name, array in inputs.items():
        (tmp_path / f"{name}.in").write_bytes(array.tobytes())
        arguments.append(f"{name}={name}.in:3x5")
    expected = toy_reference(toy_parts, **inputs, isa_id=2)
    for threads in ("1", "2"):
        options = ["--threads", threads, "--isa", "base"]
        output = run(examples / "qgraph_run", toy_path, *arguments, *options, cwd=tmp_path, env={})
        for name, array in expected.items():
            data = (tmp_path / f"{name}.bin").read_bytes()
            np.testing.assert_array_equal(np.frombuffer(data, array.dtype).reshape(array.shape), array)
            shape = ", ".join(map(str, array.shape))
            assert f"{name} [{shape}] {checksum(data):016x} ->" in output
            (tmp_path / f"{name}.bin").unlink()


def checksum(data: bytes) -> int:
    """64-bit FNV-1a."""
    result = 0xCBF29CE484222325
    for byte in data:
        result = (result ^ byte) * 0x100000001B3 % 2**64
    return result


@pytest.fixture
def generating(examples: Path, decoder_parts: Parts, tmp_path: Path) -> tuple[Path, Path]:
    """The program, and the toy decoder as it expects one: logits alone, positions among the inputs."""
    parts = copy.deepcopy(decoder_parts)
    plan = parts.plan
    plan["outputs"].pop()
    plan["values"].pop()
    plan["steps"] = [step for step in plan["steps"] if step["name"] not in ("recall", "refuse")]
    plan["inputs"].append({"name": "position_ids", "value": len(plan["values"])})
    plan["values"].append({"kind": "input", "dtype": "i64", "shape": ["batch", "sequence"]})
    path = tmp_path / "decoder.qg"
    path.write_bytes(parts.to_bytes())
    return examples / "qgraph_generate", path


def test_generate_example_is_greedy(generating: tuple[Path, Path], decoder_parts: Parts) -> None:
    program, path = generating
    text = [3, 1, 14]
    expected: list[int] = []
    for _ in range(20):
        ids = np.array([text + expected])
        expected.append(int(toy_decoder_reference(decoder_parts, ids)["logits"][0, -1].argmax()))
    assert len(set(expected)) > 2
    output = run(program, "--capacity", "23", path, "20", *map(str, text), env={})
    assert [int(token) for token in output.split()] == expected
    eos = expected[4]
    output = run(
        program, "--eos", str(eos), "--capacity", "30", "--threads", "1", path, "20", *map(str, text)
    )
    assert [int(token) for token in output.split()] == expected[: expected.index(eos) + 1]


def test_generate_example_reads_a_long_prompt_in_runs(
    generating: tuple[Path, Path], decoder_parts: Parts
) -> None:
    program, path = generating
    text = [int(token) for token in np.random.default_rng(0).integers(0, 15, 500)]
    expected: list[int] = []
    for _ in range(3):
        ids = np.array([text + expected])
        expected.append(int(toy_decoder_reference(decoder_parts, ids)["logits"][0, -1].argmax()))
    output = run(program, "--capacity", "503", path, "3", *map(str, text))
    assert [int(token) for token in output.split()] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: qgraph_generate"),
        (["--eos", "x", "PATH", "1", "1"], "x: not a number"),
        (["--top-k", "1", "PATH", "1", "1"], "--top-k: an option that this program does not know"),
        (["nothing.qg", "1", "1"], "not found: nothing.qg: cannot open"),
        (["PATH", "14", "1", "2", "3"], "exceed the room for tokens: give a larger --capacity"),
        (["PATH", "1", "99"], "bad data: step 'embed': an index is out of range"),
        (["TOY", "1", "1"], "has no state: compile a decoder that was exported with its cache"),
    ],
)
def test_generate_example_errors(
    generating: tuple[Path, Path], toy_path: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    program, path = generating
    names = {"PATH": str(path), "TOY": str(toy_path)}
    command = [str(program), *(names.get(a, a) for a in arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_example_describes_a_model(examples: Path, toy_path: Path) -> None:
    output = run(examples / "qgraph_run", toy_path)
    assert "input ids: i64 [batch, sequence]" in output
    assert "output twice: f32 [(2 * batch), sequence]" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.qg"], "nothing.qg: cannot open"),
        ([], "usage:"),
        (["TOY", "ids=ids.in:3x5"], "input 'mask' is not given"),
        (["TOY", "ids=ids.in:3xy"], "is not a shape"),
        (["TOY", "ids=ids.in"], "is not file:shape"),
        (["TOY", "ids=ids.in:3x6", "mask=ids.in:3x6"], "ids.in has 120 bytes, its shape needs 144"),
        (["TOY", "ids=ids.in:3x5", "mask=none:3x5"], "cannot read none"),
        (["TOY", "ids=ids.in:3x5", "mask=ids.in:3x10", "x=ids.in:1"], "'mask' axis|no input 'x'"),
    ],
)
def test_example_errors(
    examples: Path, toy_path: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "ids.in").write_bytes(bytes(120))
    command = [str(examples / "qgraph_run"), *(str(toy_path) if a == "TOY" else a for a in arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert any(part in done.stderr for part in message.split("|")), done.stderr
    assert len(done.stderr.splitlines()) == 1
