"""What the compiler makes of the kernels for every architecture: that it takes them, and that nothing
spills."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qgraph.codegen.cuda.arch import ARCHS
from qgraph.codegen.cuda.compile import CudaCode, compile_cuda
from qgraph.codegen.cuda.toolkit import find_compiler
from qgraph.codegen.spec import KernelSpec
from qgraph.errors import UnsupportedError
from qgraph.formats import FORMATS
from qgraph.formats.group import GROUP_FORMATS
from qgraph.formats.nvfp4 import NVFP4

_ATTENTION = {"mask": "none", "scale": 0.1, "softcap": 0.0}


def _hot() -> list[KernelSpec]:
    """The kernels that time goes by."""

    def matmul(name: str, rows: str, **more: Any) -> KernelSpec:
        given: dict[str, Any] = {} if name == NVFP4.name else {"block": FORMATS[name].block}
        given |= {"packing": "2bit"} if name == "ternary" else {}
        return KernelSpec.make(FORMATS[name].kernel, k=4096, n=4096, epilogue=(), rows=rows, **given, **more)

    specs = []
    # Not those of int3, whose codes take a detour through float32: its product of many rows spills 8 bytes on
    # Blackwell. What differs in products of many rows is in three of the formats.
    for name in (NVFP4.name, *(f.name for f in GROUP_FORMATS if f.name != "int3")):
        specs += [matmul(name, "one"), matmul(name, "few")]
    for name in (NVFP4.name, "ternary", "int4"):
        specs += [matmul(name, "many", parts=parts) for parts in (1, 2)]
    heads = {"head_dim": 128, "value_dim": 128}
    specs.append(KernelSpec.make("attention", q_block=32, causal=True, **heads, **_ATTENTION))
    for cache_ in ("f32", "i8"):
        decode = {"group": 4, "chunk": 256, "cache": cache_}
        specs.append(KernelSpec.make("attention_decode", **heads, **decode, **_ATTENTION))
    specs.append(KernelSpec.make("layer_norm", n=4096, eps=1e-5, rms=True, bias=False))
    return specs


@cache
def _compiled() -> CudaCode:
    try:
        find_compiler()
    except UnsupportedError as error:
        pytest.skip(str(error))
    return compile_cuda(_hot())


def _cuobjdump() -> str:
    """That of the wheel `nvidia-cuda-cuobjdump`, or of a CUDA toolkit."""
    import importlib.util
    import shutil

    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in Path(folder).glob("*/bin/cuobjdump"):
            path.chmod(path.stat().st_mode | 0o111)  # wheels lose it
            return str(path)
    found = shutil.which("cuobjdump")
    if found is None:
        pytest.skip("needs cuobjdump (pip install nvidia-cuda-cuobjdump)")
    return found


def test_every_architecture_has_code() -> None:
    code = _compiled()
    assert [image.arch for image in code.images] == [arch for arch in ARCHS if arch.name not in code.skipped]
    assert code.skipped == []  # which the compilers of the test environment all know
    for image in code.images:
        if image.arch.is_ptx:
            assert image.code.endswith(b"\0") and b".target sm_80" in image.code
        else:
            assert image.code.startswith(b"\x7fELF")


def test_what_was_compiled_before_is_not_generated_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _compiled()

    def generate(spec: KernelSpec) -> None:
        raise AssertionError(spec.symbol)

    monkeypatch.setattr("qgraph.codegen.cuda.kernels.build_kernel", generate)
    assert compile_cuda(_hot()) == before


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if not arch.is_ptx], ids=lambda arch: arch.name)
def test_hot_kernels_stay_in_registers(arch: Any, tmp_path: Path) -> None:
    image = next(image for image in _compiled().images if image.arch == arch)
    path = tmp_path / "kernels.cubin"
    path.write_bytes(image.code)
    text = subprocess.run(
        [_cuobjdump(), "-res-usage", path], capture_output=True, text=True, check=True
    ).stdout
    used = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert {name for name, *_ in used} == {spec.symbol for spec in _hot()}
    threads = {
        spec.symbol: function["threads"] for spec, function in zip(_hot(), _compiled().functions, strict=True)
    }
    for name, registers, stack, shared, local in used:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(registers) * threads[name] <= 65536, name
        assert int(shared) <= 48 * 1024, name
