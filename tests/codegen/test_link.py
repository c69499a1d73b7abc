"""The linker: images run wherever they are mapped, on AArch64 addresses point at their constants, and what
cannot be linked is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_harness import Kernel, native_isas
from matmul_cases import digits_of

from qgraph.codegen.isa import ISAS, Isa
from qgraph.codegen.kernels import build_kernel
from qgraph.codegen.kernels.support import support_object
from qgraph.codegen.link import ENTRY_ALIGN, CodeImage, link
from qgraph.codegen.spec import KernelSpec
from qgraph.codegen.tiles import symbol
from qgraph.codegen.tvm_backend import compile_object, compile_text, load_tvm
from qgraph.errors import QGraphError

isas = pytest.mark.parametrize("isa", native_isas(), ids=lambda i: i.name)
LINKED = [isa for isa in ISAS.values() if isa.arch != "wasm32"]  # there, a program's linker links
SPECS = [
    KernelSpec.make("matmul_nvfp4", k=32, n=n, n_block=16, m_block=16, epilogue=("gelu_erf",))
    for n in (16, 48)
]


@pytest.fixture(scope="module")
def objects() -> dict[Isa, dict[str, bytes]]:
    return {
        i: {symbol(s, i): compile_object({symbol(s, i): build_kernel(s, i)}, i) for s in SPECS}
        for i in LINKED
    }


def _link(objects: dict[str, bytes], isa: Isa) -> CodeImage:
    return link(objects, list(objects), support_object(isa))


def _run(image: CodeImage, spec: KernelSpec, isa: Isa) -> np.ndarray:
    N = spec["n"]
    y, x = np.zeros((2, N), np.float32), np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
    words = np.arange(N * 4, dtype=np.uint32).reshape(N // 16, 4, 16) * np.uint32(2654435761)
    scale = np.full((N // 16, 2, 16), 0x38, np.uint8)
    digits = digits_of(isa, "nvfp4", x)
    Kernel(spec, isa, image)(y, x, *digits, words, scale, np.ones(1, np.float32), 2, blocks=-(-N // 16))
    return y


@isas
def test_two_kernels_in_one_image_and_any_order(isa: Isa, objects: dict[Isa, dict[str, bytes]]) -> None:
    image = _link(objects[isa], isa)
    backward = _link(dict(reversed(objects[isa].items())), isa)
    for spec in SPECS:
        assert image.entries[spec.symbol] % ENTRY_ALIGN == 0
        alone = _link({spec.symbol: objects[isa][spec.symbol]}, isa)
        y = _run(alone, spec, isa)
        assert y.any()
        np.testing.assert_array_equal(_run(image, spec, isa), y)
        np.testing.assert_array_equal(_run(backward, spec, isa), y)


@isas
def test_the_image_runs_at_two_addresses_at_once(isa: Isa, objects: dict[Isa, dict[str, bytes]]) -> None:
    image = _link(objects[isa], isa)
    first, second = Kernel(SPECS[0], isa, image), Kernel(SPECS[0], isa, image)
    assert first._entry != second._entry
    np.testing.assert_array_equal(_run(image, SPECS[0], isa), _run(image, SPECS[0], isa))


def test_linking_is_deterministic(objects: dict[Isa, dict[str, bytes]]) -> None:
    for isa in LINKED:
        every = objects[isa] | objects.get(ISAS.get(isa.base, isa), {})
        assert _link(every, isa) == _link(every, isa)
        name = symbol(SPECS[0], isa)
        again = compile_object({name: build_kernel(SPECS[0], isa)}, isa)
        assert again == objects[isa][name]


def test_kernels_call_each_other(objects: dict[Isa, dict[str, bytes]]) -> None:
    """A form for tiles calls the kernel that it is a form of: they are one image, or none."""
    isa = ISAS["x86-64-v4-amx"]
    tiles, base = objects[isa], objects[ISAS[isa.base]]
    alone, both = _link(base, isa), _link(base | tiles, isa)
    assert both.entries.keys() == base.keys() | tiles.keys() and len(both.code) > len(alone.code)
    wanted = link(base | tiles, list(tiles), support_object(isa))
    assert wanted.entries.keys() == tiles.keys() and len(wanted.code) >= len(alone.code)
    with pytest.raises(QGraphError, match=f"calls '{SPECS[0].symbol}', which no kernel library provides"):
        _link(tiles, isa)


def test_aarch64_addresses_reach_their_constants(objects: dict[Isa, dict[str, bytes]]) -> None:
    """Follow every ADRP (and the ADD or LDR on its register) through the machine code of the image."""
    isa = ISAS["aarch64"]
    code = _link({SPECS[0].symbol: objects[isa][SPECS[0].symbol]}, isa).code
    table = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int8)
    table_at = code.index(np.concatenate([table, -table]).tobytes())  # twice the E2M1 values
    words = np.frombuffer(code[: len(code) // 4 * 4], "<u4").tolist()
    pages: dict[int, int] = {}
    targets = set()
    for i, w in enumerate(words):
        if w & 0x9F000000 == 0x90000000:  # ADRP Xd
            offset = (w >> 5 & 0x7FFFF) << 2 | w >> 29 & 3
            offset -= (offset & 1 << 20) << 1
            pages[w & 31] = (4 * i & ~0xFFF) + (offset << 12)
        elif w & 0xFFC00000 == 0x91000000 and (w >> 5 & 31) in pages:  # ADD Xd, Xn, #imm
            targets.add(pages[w >> 5 & 31] + (w >> 10 & 0xFFF))
        elif w & 0xFFC00000 == 0x3DC00000 and (w >> 5 & 31) in pages:  # LDR Qt, [Xn, #imm * 16]
            targets.add(pages[w >> 5 & 31] + (w >> 10 & 0xFFF) * 16)
    assert table_at in targets


def _copy_kernel(symbol: str) -> Any:
    """y[:n] = x, y[n:2n] = 0, in loops that LLVM turns into memcpy and memset."""
    load_tvm()
    from tvm.script import tirx as T  # noqa: N812

    @T.prim_func(s_tir=True)
    def func(y: T.handle("uint8"), x: T.handle("uint8"), n: T.int64, begin: T.int64, end: T.int64):
        T.func_attr({"global_symbol": symbol, "tirx.noalias": True})
        Y = T.decl_buffer((2 * n,), "uint8", data=y)
        X = T.decl_buffer((n,), "uint8", data=x)
        for i in T.serial(n):
            Y[i] = X[i]
        for i in T.serial(n):
            Y[n + i] = T.uint8(0)

    return func


@isas
@pytest.mark.parametrize("n", [1, 31, 32, 33, 1000])
def test_support_routines_are_linked_in(isa: Isa, n: int) -> None:
    spec = KernelSpec.make("copy")
    function = {spec.symbol: _copy_kernel(spec.symbol)}
    assert {"memcpy", "memset"} <= set(compile_text(function, isa).replace("@PLT", "").split())
    kernel = Kernel(spec, isa, _link({spec.symbol: compile_object(function, isa)}, isa))
    x = np.arange(n, dtype=np.uint8) + 1
    y = np.full(2 * n, 0xEE, np.uint8)
    kernel(y, x, n, blocks=1, guard=True)
    np.testing.assert_array_equal(y, np.concatenate([x, np.zeros(n, np.uint8)]))


def test_support_routines_exist_for_every_isa() -> None:
    spec = KernelSpec.make("copy")
    for isa in LINKED:
        assert _link({spec.symbol: compile_object({spec.symbol: _copy_kernel(spec.symbol)}, isa)}, isa).code


def test_an_undefined_symbol_is_refused() -> None:
    isa, spec = ISAS["x86-64-v3"], KernelSpec.make("copy")
    data = compile_object({spec.symbol: _copy_kernel(spec.symbol)}, isa)
    with pytest.raises(QGraphError, match="which no kernel library provides"):
        link({spec.symbol: data}, [spec.symbol])


def test_a_missing_entry_is_refused(objects: dict[Isa, dict[str, bytes]]) -> None:
    with pytest.raises(QGraphError, match="no object defines kernel qg_missing"):
        link(objects[ISAS["x86-64-v3"]], ["qg_missing"])


def _assemble(tmp_path: Path, source: str) -> bytes:
    path = tmp_path / "a.s"
    path.write_text(source + '\n.section .note.GNU-stack,"",@progbits\n')
    try:
        subprocess.run(["as", "--64", "-o", tmp_path / "a.o", path], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("needs the GNU assembler for x86-64")
    return (tmp_path / "a.o").read_bytes()


def test_writable_data_and_absolute_addresses_are_refused(tmp_path: Path) -> None:
    data = _assemble(tmp_path, ".data\nx: .long 1\n.text\n.globl f\nf: ret")
    with pytest.raises(QGraphError, match="writable data"):
        link({"a": data}, ["f"])
    data = _assemble(tmp_path, ".text\n.globl f\nf: movabs $f, %rax\nret")
    with pytest.raises(QGraphError, match="is not relative"):
        link({"a": data}, ["f"])
    good = _assemble(tmp_path, ".text\n.globl f\nf: mov x(%rip), %eax\nret\n.section .rodata\nx: .long 7")
    assert link({"a": good}, ["f"]).entries == {"f": 0}


def test_what_no_entry_reaches_is_left_out(objects: dict[Isa, dict[str, bytes]]) -> None:
    isa = ISAS["x86-64-v3"]
    one = link(objects[isa], [SPECS[0].symbol], support_object(isa))
    assert len(one.code) < len(_link(objects[isa], isa).code)
