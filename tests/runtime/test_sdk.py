"""The SDK as those use it who never see the sources: by CMake, by pkg-config, linked in, as one file."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from artifact_builder import Parts
from cmake_build import RUNTIME, cmake_build, run, tool
from elftools.elf.elffile import ELFFile

import qgraph
from qgraph.codegen.static_library import library_name, write_library
from qgraph.errors import ResourceError, UsageError
from qgraph.pipeline import CompileResult
from qgraph.runtime import sdk

DOCS = (RUNTIME.parent / "docs" / "sdk.md").read_text()
IDS = [3, 14, 15, 9, 26]
CXX = os.environ.get("CXX", "c++").split()


def block(language: str) -> str:
    """The first fenced block of this language in docs/sdk.md."""
    found = re.search(rf"^```{language}\n(.*?)^```", DOCS, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


# ---- what is in it


def test_tree(prefix: Path) -> None:
    names = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if not path.is_dir()}
    examples = {f"share/qgraph/examples/{path.name}" for path in (RUNTIME / "examples").iterdir()}
    assert names >= examples
    assert names - examples == {
        "include/qgraph/qgraph.h",
        "include/qgraph/qgraph.hpp",
        "lib/libqgraph.a",
        "lib/libqgraph_ort.so",
        "lib/libqgraph.so",
        "lib/libqgraph.so.1",
        f"lib/libqgraph.so.1.{qgraph.__version__}",
        "lib/pkgconfig/qgraph.pc",
        "lib/cmake/qgraph/qgraph-config.cmake",
        "lib/cmake/qgraph/qgraph-config-version.cmake",
        "lib/cmake/qgraph/qgraph-targets.cmake",
        "lib/cmake/qgraph/qgraph-targets-release.cmake",
    }


def test_nothing_knows_where_it_was_built(prefix: Path) -> None:
    traces = (str(prefix.parent).encode(), str(RUNTIME).encode(), b"qgraph-sdk-")
    for path in prefix.rglob("*"):
        if path.is_file():
            assert not any(trace in path.read_bytes() for trace in traces), path


def test_the_shared_library_shows_qg_functions_alone(prefix: Path) -> None:
    library = prefix / "lib" / "libqgraph.so"
    names = [line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()]
    assert names and all(re.fullmatch(r"qg_\w+", name) for name in names)
    system = ("libc.so", "libm.so", "libstdc++.so", "libgcc_s.so", "ld-linux", "linux-vdso")
    needed = [line.split()[0].rsplit("/", 1)[-1] for line in run("ldd", library).splitlines()]
    assert needed and all(name.startswith(system) for name in needed)
    with library.open("rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        assert [tag.soname for tag in dynamic.iter_tags("DT_SONAME")] == ["libqgraph.so.1"]


def test_abi_number_is_that_of_the_header() -> None:
    """A new number is a decision: change it here, in the header and in docs/sdk.md."""
    header = (RUNTIME / "include/qgraph/qgraph.h").read_text()
    assert "#define QG_ABI_VERSION 1\n" in header
    assert "`libqgraph.so.1`" in DOCS and "now 1," in DOCS


def test_static_library_links_from_c(prefix: Path, tmp_path: Path) -> None:
    source, program = RUNTIME / "tests" / "header_is_c99.c", tmp_path / "program"
    options = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", f"-I{prefix / 'include'}"]
    libraries = [prefix / "lib" / "libqgraph.a", "-lstdc++", "-lm", "-pthread", "-ldl"]
    run(os.environ.get("CC", "cc"), *options, source, *libraries, "-o", program)
    run(program)


# ---- the program of the documentation, in every way to deploy


Build = Callable[[Path, Path, Path], list[str | Path]]
STRICT = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-O1"]


def find_package(folder: Path, prefix: Path, model: Path, target: str = "qgraph") -> list[str | Path]:
    (folder / "CMakeLists.txt").write_text(block("cmake").replace("qgraph::qgraph", f"qgraph::{target}"))
    cmake_build(folder, folder / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    return [folder / "build" / "embed", model]


def find_package_static(folder: Path, prefix: Path, model: Path) -> list[str | Path]:
    command = find_package(folder, prefix, model, "qgraph_static")
    assert "libqgraph" not in run("ldd", command[0])
    return command


def package_config(prefix: Path, *arguments: str) -> list[str]:
    environment = {**os.environ, "PKG_CONFIG_PATH": str(prefix / "lib" / "pkgconfig")}
    return run(tool("pkg-config"), *arguments, "qgraph", env=environment).split()


def pkg_config(folder: Path, prefix: Path, model: Path) -> list[str | Path]:
    flags = package_config(prefix, "--cflags", "--libs")
    assert package_config(prefix, "--modversion") == [qgraph.__version__]
    rpath = f"-Wl,-rpath,{prefix / 'lib'}"
    run(*CXX, *STRICT, folder / "embed.cc", *flags, rpath, "-o", folder / "embed")
    return [folder / "embed", model]


def with_model_inside(folder: Path) -> None:
    """The change that docs/sdk.md names."""
    source = (folder / "embed.cc").read_text()
    changed = source.replace("model(argv[1])", "model(model_artifact)")
    assert changed != source
    (folder / "embed.cc").write_text(changed.replace("int main", '#include "model.h"\n\nint main', 1))


def static_lib(folder: Path, prefix: Path, model: Path) -> list[str | Path]:
    with_model_inside(folder)
    options = [*STRICT, f"-I{model.parent}", *package_config(prefix, "--cflags")]
    (library,) = package_config(prefix, "--variable=static_library")
    objects = [folder / "embed.cc", model.parent / "libmodel.a", library]
    run(*CXX, *options, *objects, "-pthread", "-ldl", "-o", folder / "embed")
    return [folder / "embed", "unused"]


def amalgamation(folder: Path, prefix: Path, model: Path) -> list[str | Path]:
    """Three files and a compiler; the model inside, too."""
    sdk.write_amalgamation(folder / "qgraph")
    run(*CXX, "-std=c++17", "-c", folder / "qgraph" / "qgraph.cc", "-o", folder / "qgraph.o")
    with_model_inside(folder)
    source = (folder / "embed.cc").read_text()
    (folder / "embed.cc").write_text(source.replace('"qgraph/qgraph.hpp"', '"qgraph.hpp"'))
    options = [*STRICT, f"-I{folder / 'qgraph'}", f"-I{model.parent}"]
    objects = [folder / "embed.cc", folder / "qgraph.o", model.parent / "libmodel.a"]
    run(*CXX, *options, *objects, "-pthread", "-ldl", "-o", folder / "embed")
    return [folder / "embed", "unused"]


@pytest.mark.parametrize("build", [find_package, find_package_static, pkg_config, static_lib, amalgamation])
def test_the_program_of_the_docs(build: Build, prefix: Path, encoder: CompileResult, tmp_path: Path) -> None:
    assert encoder.artifact is not None
    assert len(block("cpp").splitlines()) <= 20
    (tmp_path / "embed.cc").write_text(block("cpp"))
    command = build(tmp_path, prefix, encoder.artifact)
    output = run(*command, *map(str, IDS), cwd=tmp_path, env={})
    row = np.array([IDS])
    with encoder.load() as model:
        inputs = {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)}
        hidden = model.run(inputs)["last_hidden_state"][0]
    mean = hidden[0].copy()
    for other in hidden[1:]:
        mean += other  # in the program's order: equal to the last bit
    np.testing.assert_array_equal(np.array(output.split(), np.float32), mean / np.float32(len(IDS)))


def test_single_source_has_no_warnings(tmp_path: Path) -> None:
    files = sdk.write_amalgamation(tmp_path / "out")
    assert [path.name for path in files] == ["qgraph.cc", "qgraph.h", "qgraph.hpp"]
    strict = ["-std=c++17", "-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only"]
    run(*CXX, *strict, tmp_path / "out" / "qgraph.cc")
    assert '#include "qgraph/' not in "".join(path.read_text() for path in files)


def test_a_library_with_the_runtime_inside_exports_none_of_it(prefix: Path, tmp_path: Path) -> None:
    source = tmp_path / "mine.c"
    source.write_text('#include "qgraph/qgraph.h"\nconst char* mine(void) { return qg_version(); }\n')
    run(
        os.environ.get("CC", "cc"),
        "-fPIC",
        f"-I{prefix / 'include'}",
        "-c",
        source,
        "-o",
        tmp_path / "mine.o",
    )
    single = tmp_path / "qgraph"
    sdk.write_amalgamation(single)
    hidden = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-DQG_API=", "-c", single / "qgraph.cc"]
    run(*CXX, *hidden, "-o", single / "qgraph.o")
    for inside in (["-Wl,--exclude-libs,libqgraph.a", prefix / "lib" / "libqgraph.a"], [single / "qgraph.o"]):
        library = tmp_path / "libmine.so"
        run(*CXX, "-shared", "-pthread", tmp_path / "mine.o", *inside, "-o", library)
        names = [line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()]
        # Hidden visibility does not reach the C++ library's templates: these are the same everywhere.
        assert "mine" in names and not [
            name for name in names if name.startswith(("qg_", "_ZN2qg", "_ZNK2qg"))
        ]


# ---- static libraries


def test_library_is_constants_code_and_one_symbol(encoder: CompileResult, tmp_path: Path) -> None:
    assert encoder.artifact is not None
    library = encoder.artifact.with_name("libmodel.a")
    run("ar", "x", library, cwd=tmp_path)
    with (tmp_path / "model.o").open("rb") as file:
        elf = ELFFile(file)
        found = {section.name: section for section in elf.iter_sections()}
        flags = {name: found[name]["sh_flags"] for name in found}
        assert flags[".rodata.qgraph.model"] == 2  # SHF_ALLOC: neither written nor run
        codes = [name for name in found if name.startswith(".text")]
        assert encoder.report.isas == ["x86-64-v4-amx", "x86-64-v4", "x86-64-v3"]
        assert codes == [".text.qgraph.x86-64-v4", ".text.qgraph.x86-64-v3"]  # AMX has that of v4
        assert all(flags[name] == 6 for name in codes)  # SHF_ALLOC | SHF_EXECINSTR
        assert flags[".note.GNU-stack"] == 0
        names = [s.name for s in found[".symtab"].iter_symbols() if s["st_info"]["bind"] == "STB_GLOBAL"]
        assert names == ["model_artifact"]
        # Each byte once: no code among the constants.
        code = found[codes[0]].data()
        assert code[:256] not in found[".rodata.qgraph.model"].data()
        size = sum(found[name]["sh_size"] for name in codes) + found[".rodata.qgraph.model"]["sh_size"]
    assert abs(size - encoder.artifact.stat().st_size) < 500


def test_header_says_what_the_model_takes(encoder: CompileResult) -> None:
    assert encoder.artifact is not None
    text = encoder.artifact.with_name("model.h").read_text()
    assert " *   input 0: input_ids, i64 [batch, sequence]\n" in text
    assert " *   output 1: pooler_output, f32 [batch, 48]\n" in text
    assert "extern const qg_static_model model_artifact;" in text


def test_same_bytes_again(encoder: CompileResult, tmp_path: Path) -> None:
    assert encoder.artifact is not None
    write_library(encoder.artifact, "model", tmp_path / "libmodel.a", tmp_path / "model.h")
    for name in ("libmodel.a", "model.h"):
        assert (tmp_path / name).read_bytes() == encoder.artifact.with_name(name).read_bytes()


def test_names() -> None:
    assert library_name("model.nvfp4") == "model_nvfp4"
    assert library_name("3b-chat") == "_3b_chat"
    assert library_name("größe") == "gr__e"


def test_header_of_a_hostile_model(toy_parts: Parts, tmp_path: Path) -> None:
    """Names come from the model: none ends the comment that they stand in, or begins a line."""
    parts = copy.deepcopy(toy_parts)
    parts.plan["inputs"][0]["name"] = 'x */ int bad; /*\n"\\'
    (tmp_path / "toy.qg").write_bytes(parts.to_bytes())
    write_library(tmp_path / "toy.qg", "toy", tmp_path / "libtoy.a", tmp_path / "toy.h")
    strict = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", f"-I{RUNTIME / 'include'}"]
    (tmp_path / "use.c").write_text('#include "toy.h"\nint bad;\nint use(void) { return toy_load(0, 0); }\n')
    run(os.environ.get("CC", "cc"), *strict, "-c", tmp_path / "use.c", cwd=tmp_path)


# ---- what goes wrong


def test_a_folder_that_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    sdk.write_amalgamation(tmp_path / "here")  # empty: taken
    before = sorted(tmp_path.rglob("*"))
    for write in (sdk.write_amalgamation, sdk.install):
        with pytest.raises(UsageError, match="here is there and not an empty folder: give another --out"):
            write(tmp_path / "here")
    with pytest.raises(UsageError, match="not an empty folder"):
        sdk.write_amalgamation(tmp_path / "here" / "qgraph.h")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"cannot write .*file/sdk: File exists: .*/file$"):
        sdk.write_amalgamation(tmp_path / "file" / "sdk")


def test_no_cmake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ResourceError, match="built by CMake, and there is none: pip install cmake ninja"):
        sdk.install(tmp_path / "sdk")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_build_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool("cmake")
    monkeypatch.setenv("CXXFLAGS", "-fno-such-flag")
    with pytest.raises(ResourceError, match=r"the SDK does not build: .* ends with status \d+: "):
        sdk.install(tmp_path / "sdk")
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path) -> None:
    def qgraph_sdk(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "qgraph", "sdk", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = qgraph_sdk("--amalgamation", "--out", "one", "--json", "-q")
    assert done.returncode == 0 and '"one/qgraph.cc"' in done.stdout and done.stderr == ""
    assert qgraph_sdk("--amalgamation", "--out", "one").returncode == 2
