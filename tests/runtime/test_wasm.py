"""Models in WebAssembly: compiled, linked with the single-source runtime by clang, run by Node.js."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from cmake_build import RUNTIME, run
from onnx import numpy_helper

import encoder_model  # isort: skip

import qgraph
from qgraph.errors import UsageError
from qgraph.evaluate.runners import ReferenceRunner
from qgraph.pipeline import CompileResult
from qgraph.runtime import sdk

DOCS = (RUNTIME.parent / "docs" / "sdk.md").read_text()
SECTION = DOCS[DOCS.index("## WebAssembly") :]
OPTIONS = ["--target=wasm32-wasi", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-O1"]
STACK = "-Wl,--stack-first,-z,stack-size=1048576"


def block(language: str, text: str = SECTION) -> str:
    """The first fenced block of this language."""
    found = re.search(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


@cache
def clang() -> str:
    """A clang++ that makes WebAssembly programs, or nothing."""
    names = ["clang++", *(f"clang++-{version}" for version in range(30, 15, -1))]
    for name in filter(shutil.which, names):
        command = [name, "--target=wasm32-wasi", "-x", "c++", "-", "-o", "/dev/null"]
        done = subprocess.run(command, input=b"#include <string>\nint main() {}", capture_output=True)
        if done.returncode == 0:
            return name
    return ""


@pytest.fixture(scope="module")
def tools() -> str:
    if not shutil.which("node") or not clang():
        pytest.skip(
            "needs node, and clang++ for WASI (Debian: nodejs, clang-19, lld-19, wasi-libc, "
            "libc++-19-dev-wasm32, libclang-rt-19-dev-wasm32)"
        )
    return clang()


@pytest.fixture(scope="module")
def runtime(tools: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the single source, and its object."""
    folder = tmp_path_factory.mktemp("wasm") / "qgraph"
    sdk.write_amalgamation(folder)
    run(tools, *OPTIONS, "-c", folder / "qgraph.cc", "-o", folder / "qgraph.o")
    (folder / "run.mjs").write_text(block("js"))
    return folder


@pytest.fixture(scope="module")
def encoder_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of the fixture `encoder`, for WebAssembly, with its header beside it."""
    folder = tmp_path_factory.mktemp("encoder-wasm")
    source = encoder_model.save(folder / "encoder.onnx")
    options = {"include": ("*",), "onnx": False, "format": "static-lib", "target": "wasm32"}
    library = qgraph.compile(source, output=folder / "model", **options).library
    assert library is not None
    return library


def program(source: str, runtime: Path, *libraries: Path) -> list[str]:
    """The command that runs a program with these models inside."""
    folder = libraries[0].parent
    (folder / "program.cc").write_text(source)
    objects = [folder / "program.cc", runtime / "qgraph.o", *libraries]
    run(clang(), *OPTIONS, f"-I{runtime}", *objects, STACK, "-o", folder / "program.wasm")
    return ["node", "--no-warnings", str(runtime / "run.mjs"), str(folder / "program.wasm")]


# ---- what may be asked for


@pytest.mark.parametrize(
    ("target", "format", "message"),
    [
        ("wasm32", "qg", r"cannot load code from a file: --target wasm32 needs --format static-lib"),
        ("wasm32,cuda", "static-lib", "a WebAssembly program has no GPU: give --target wasm32"),
        ("wasm32,x86_64-linux", "static-lib", "for one kind of CPU"),
    ],
)
def test_targets(target: str, format: str, message: str, tmp_path: Path) -> None:
    source = encoder_model.save(tmp_path / "encoder.onnx")
    with pytest.raises(UsageError, match=message):
        qgraph.compile(source, output=tmp_path / "model", target=target, format=format)
    assert list(tmp_path.iterdir()) == [source]


# ---- the program of the documentation


def test_the_program_of_the_docs(
    runtime: Path, encoder_library: Path, encoder: CompileResult, tmp_path: Path
) -> None:
    """By the very commands, but for the name of the compiler and the ids."""
    source = block("cpp", DOCS).replace("qgraph/qgraph.hpp", "qgraph.hpp")
    source = source.replace("model(argv[1])", "model(model_artifact)")
    (tmp_path / "embed.cc").write_text(source.replace("int main", '#include "model.h"\n\nint main', 1))
    for path in (encoder_library, encoder_library.with_name("model.h"), runtime / "run.mjs"):
        shutil.copy(path, tmp_path)
    shutil.copytree(runtime, tmp_path / "qgraph")
    commands = block("sh").splitlines()
    assert [line.split()[0] for line in commands] == ["qgraph", "qgraph", "clang++", "node"]
    ids = [3, 14, 15, 9, 26]
    build = [clang(), *commands[2].split()[1:]]
    start = ["node", "--no-warnings", *commands[3].split()[1:4], *map(str, ids)]
    # But for the runtime, which is compiled already.
    run(*[part.replace("qgraph/qgraph.cc", "qgraph/qgraph.o") for part in build], cwd=tmp_path)
    got = np.array(run(*start, cwd=tmp_path).split(), np.float32)
    row = np.array([ids])
    with encoder.load() as model:
        inputs = {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)}
        want = model.run(inputs)["last_hidden_state"][0].mean(axis=0)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


# ---- every way to read weights


FLOAT = ("nvfp4", "ternary", "int4")
ROUNDED = ("nvfp4-w4a8", "int8-w8a8")
K, N = 160, 48  # no multiple of a block of 128, and half a panel

SHOW = """
#include <cstdio>
#include <cstdlib>
#include "qgraph.hpp"
{includes}

static void show(const qg_static_model& artifact, std::int64_t rows) {{
  const qgraph::Model model(artifact);
  qgraph::Session session(model);
  const std::vector<std::int64_t> shape{{rows, {k}}};
  std::vector<float> x;
  for (std::int64_t i = 0; i < rows * {k}; ++i) x.push_back(static_cast<float>(i * 7919 % 2003 - 1001) / 512);
  session.bind_input(0, x.data(), shape);
  std::vector<std::vector<float>> outputs;
  for (std::size_t i = 0; i < model.outputs().size(); ++i) outputs.push_back(session.make_output<float>(i));
  session.run();
  for (const auto& output : outputs) {{
    for (float value : output) std::printf("%.9g ", value);
    std::puts("");
  }}
}}

int main(int, char** argv) {{
  const std::int64_t rows = std::atoll(argv[1]);
  {calls}
}}
"""


def build(folder: Path, name: str, nodes: list[str], outputs: list[str], **options: object) -> Path:
    """The low-bit file of a model of the input x [rows, K]; beside it its library."""
    declared = ", ".join(outputs)
    text = f'<ir_version: 11, opset_import: ["" : 23]> g (float[rows, {K}] x) => ({declared}) {{'
    model = onnx.parser.parse_model("\n".join([text, *nodes, "}"]))
    rng = np.random.default_rng(0)
    for weight in {name for node in model.graph.node for name in node.input if name.endswith("_weight")}:
        array = rng.standard_normal((K, N)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, weight))
    onnx.save(model, folder / f"{name}.float.onnx")
    lowbit = qgraph.quantize(folder / f"{name}.float.onnx", output=folder / name, **options).onnx
    assert lowbit is not None
    built = qgraph.build(lowbit, output=folder / name, target="wasm32", format="static-lib")
    assert built.library == folder / f"lib{name}.a"
    return lowbit


def products(schemes: tuple[str, ...], folder: Path, name: str) -> Path:
    """A model of one product for each scheme."""
    nodes = [f"[p{i}] y{i} = MatMul(x, p{i}_weight)" for i in range(len(schemes))]
    outputs = [f"float[rows, {N}] y{i}" for i in range(len(schemes))]
    layers = tuple(f"p{i}={scheme}" for i, scheme in enumerate(schemes))
    options = {"scheme": schemes[0], "layers": layers, "include": ("*",), "strict": True}
    return build(folder, name, nodes, outputs, **options)


def compare(runtime: Path, lowbits: list[Path], rows: tuple[int, ...], rtol: float = 0) -> None:
    """A program with these models against ONNX's reference evaluator: to 1e-5 of the largest element, or with
    `rtol` each element by itself."""
    includes = "\n".join(f'#include "{path.stem}.h"' for path in lowbits)
    calls = " ".join(f"show({path.stem}_artifact, rows);" for path in lowbits)
    source = SHOW.format(includes=includes, calls=calls, k=K)
    command = program(source, runtime, *(path.with_name(f"lib{path.stem}.a") for path in lowbits))
    output = lowbits[0].with_name("output.txt")
    for count in rows:
        with output.open("w") as file:  # not a pipe: Node.js may lose what does not fit into one
            subprocess.run([*command, str(count)], stdout=file, check=True)
        i = np.arange(count * K)
        x = ((i * 7919 % 2003 - 1001) / 512).astype(np.float32).reshape(count, K)
        wanted = [item for path in lowbits for item in ReferenceRunner(path).run({"x": x}).items()]
        lines = output.read_text().splitlines()
        for (name, want), line in zip(wanted, lines, strict=True):
            got = np.array(line.split(), np.float32).reshape(want.shape)
            atol = 1e-6 if rtol else 1e-5 * np.abs(want).max()
            np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=name)


def test_formats(runtime: Path, tmp_path: Path) -> None:
    """Two models in one program; few rows and many."""
    models = [products(FLOAT, tmp_path, "floats"), products(ROUNDED, tmp_path, "rounded")]
    compare(runtime, models, (3, 11))


def test_functions(runtime: Path, tmp_path: Path) -> None:
    """Where they were reduced by fused multiply-adds elsewhere: exp of +-80 has its full precision."""
    nodes = ["forty = Constant<value = float {40.0}>()", "wide = Mul(x, forty)"]
    nodes += ["y0 = Exp(wide)", "y1 = Sin(wide)", "y2 = Tanh(x)", "y3 = Mod<fmod = 1>(wide, forty)"]
    outputs = [f"float[rows, {K}] y{i}" for i in range(4)]
    compare(runtime, [build(tmp_path, "functions", nodes, outputs, scheme="none")], (3,), rtol=5e-7)


# ---- what goes wrong

FAILING = """
#include <cstdlib>
#include <cstring>
#include "qgraph.hpp"
#include "model.h"

int main(int, char** argv) {
  if (!std::strcmp(argv[1], "file")) qgraph::Model("model.qg");
  if (!std::strcmp(argv[1], "memory")) {
    qgraph::Model::from_memory(model_artifact.data, model_artifact.size);
  }
  if (!std::strcmp(argv[1], "gpu")) return qg_device_count() == 1 && qg_device_problem() ? 7 : 0;
  const std::vector<std::int64_t> shape{1, 2}, ids{1, std::atoll(argv[1])}, ones(2, 1);
  const qgraph::Model model(model_artifact);
  qgraph::Session session(model);
  for (const char* name : {"attention_mask", "token_type_ids"}) {
    session.bind_input(model.input(name), ones.data(), shape);
  }
  session.bind_input(model.input("input_ids"), ids.data(), shape);
  std::vector<float> hidden = session.make_output<float>(0), pooled = session.make_output<float>(1);
  session.run();
}
"""


def test_a_failure_ends_the_program(runtime: Path, encoder_library: Path) -> None:
    command = program(FAILING, runtime, encoder_library)

    def failure(argument: str) -> tuple[int, str]:
        done = subprocess.run([*command, argument], capture_output=True, text=True)
        return done.returncode, done.stderr

    assert failure("1") == (0, "")
    assert failure("gpu")[0] == 7
    for argument, message in {
        "50": r"qgraph: bad data: step '.*': an index is out of range\n",
        "file": "qgraph: unsupported: WebAssembly runs no code but the program's: compile the model with",
        "memory": r"qgraph: invalid file: plan.variants\[0\].code is 'qgraph.code.wasm32', a tensor that the",
    }.items():
        code, said = failure(argument)
        assert code != 0 and re.search(f"^{message}", said) and "unreachable" in said, said
