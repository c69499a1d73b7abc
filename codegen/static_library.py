"""An artifact as a static library and a header: weights among a program's constants, kernels in its code.

    lib<name>.a    an object with
                     .rodata.qgraph.<name>    the container (runtime/FORMAT.md) without its code for CPUs
                     .text.qgraph.<isa>       a code image, once, whichever variants share it
                     .data.rel.ro             `<name>_artifact`, a `qg_static_model` that points to these
    <name>.h       declares `<name>_artifact`, and `<name>_load`

`<name>_artifact` is the only symbol, so that programs may link any number of models. Code for GPUs is data to
a program: it stays in the container. To write both files takes no tool of the target.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qgraph.codegen import package
from qgraph.codegen.archive import Buffer, Member, write_archive
from qgraph.codegen.elf_object import (
    ALLOC,
    EXECUTE,
    MACHINES,
    WRITE,
    Section,
    write_object,
)
from qgraph.codegen.targets import WASM, parse_target
from qgraph.codegen.wasm_library import library_members
from qgraph.errors import UnsupportedError, UsageError

# Programs are linked for the small code model: all of one within 2 GiB.
MAX_BYTES = 3 << 29
# Images address their constants by pages on aarch64; a mapping's alignment on any target.
_PAGE = 4096
_CODE = "qgraph.code."
_MODEL = 5  # words of a qg_static_model


def library_name(prefix: str) -> str:
    """What names the library's files and symbols, of the name that the files of a compile begin with: every
    character that C does not allow in names becomes `_`."""
    name = re.sub(r"\W", "_", prefix, flags=re.ASCII)
    return f"_{name}" if name[:1].isdigit() else name


def require_target(target: str) -> None:
    """Raises UnsupportedError for a target whose objects are not written here, UsageError for one of GPUs
    alone: no program runs there."""
    isas = parse_target(target).isas
    if not isas:
        raise UsageError(
            f"a static library is linked into a program, which runs on a CPU: give --target cpu,{target}"
        )
    for isa in isas:
        if isa.arch not in (*MACHINES, WASM):
            raise UnsupportedError(
                f"static libraries are written for {', '.join((*MACHINES, WASM))}, not {isa.arch}"
            )


def write_library(artifact: Path, name: str, library: Path, header: Path) -> None:
    """Write the `.qg` file `artifact`, as `build_artifact` wrote it, as a static library and its header.

    Its target is one that `require_target` lets pass.

    Raises:
        UsageError: the artifact is signed: what it becomes here has other bytes.
        UnsupportedError: the model is too large to link.
    """
    with artifact.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)
        try:
            if any(tensor.name == "qgraph.signature" for tensor in package.parse(view)[0]):
                raise UsageError(
                    f"{artifact} is signed, and a static library cannot carry its signature: make it of the "
                    "unsigned artifact, and sign the program"
                )
            _write(view, name, library, header)
        finally:
            view.release()


def _write(data: memoryview, name: str, library: Path, header: Path) -> None:
    if len(data) > MAX_BYTES:
        raise UnsupportedError(
            f"a program cannot link a model of {len(data)} bytes, only up to {MAX_BYTES}: load a .qg file"
        )
    tensors, metadata = package.parse(data)
    named = {tensor.name: tensor for tensor in tensors}
    plan = json.loads(bytes(named["qgraph.plan"].raw))
    codes = dict.fromkeys(variant["code"] for variant in plan["variants"])  # each once, in this order
    images = [(code.removeprefix(_CODE), named.pop(code).raw) for code in codes]
    first, hashes = plan["variants"][0], {}
    if first["arch"] != WASM:  # of a table that the linker makes there is no hash
        hashes = {f"sha256:{_CODE}{isa}": hashlib.sha256(image).hexdigest() for isa, image in images}
    isas = [variant["isa"] for variant in plan["variants"]]
    if cuda := named.get("qgraph.plan.cuda"):
        isas += [variant["isa"] for variant in json.loads(bytes(cuda.raw))["variants"]]
    pieces = list(package.serialize(list(named.values()), metadata | hashes))
    if first["arch"] == WASM:
        ((isa, image),) = images
        members = library_members(
            name, pieces, isa, image, dict(zip(plan["kernels"], first["entries"], strict=True))
        )
    else:
        members = [Member("model.o", _object(first["arch"], name, pieces, images), [f"{name}_artifact"])]
    with library.open("wb") as file:
        for piece in write_archive(members):
            file.write(piece)
    header.write_text(_header(name, plan, isas, metadata))


def _object(
    machine: str, name: str, container: list[Buffer], images: list[tuple[str, memoryview]]
) -> list[Buffer]:
    size = sum(len(piece) for piece in container)
    texts, at = [], size
    for isa, _ in images:
        texts.append(at)
        at += len(isa) + 1
    strings = b"".join(isa.encode() + b"\0" for isa, _ in images)
    constants = Section(f".rodata.qgraph.{name}", ALLOC, package.ALIGN, [*container, strings])
    codes = [Section(f".text.qgraph.{isa}", ALLOC | EXECUTE, _PAGE, [image]) for isa, image in images]
    # qg_static_model {struct_size, data, size, code, code_count}, then the qg_static_code {isa, data, size}:
    # words all of them.
    word = MACHINES[machine].bits // 8
    place = len(codes) + 1  # sections: constants, codes, table
    words = [_MODEL * word, 0, size, 0, len(images)]
    addresses = {word: (0, 0), 3 * word: (place, _MODEL * word)}
    for i, (_, image) in enumerate(images):
        entry = len(words) * word
        addresses |= {entry: (0, texts[i]), entry + word: (i + 1, 0)}
        words += [0, 0, len(image)]
    table = b"".join(value.to_bytes(word, "little") for value in words)
    pointers = Section(".data.rel.ro", ALLOC | WRITE, word, [table], addresses)
    symbols = {f"{name}_artifact": (place, 0, _MODEL * word)}
    return write_object(machine, [constants, *codes, pointers], symbols)


def _header(name: str, plan: dict[str, Any], isas: list[str], metadata: dict[str, str]) -> str:
    guard = f"QGRAPH_MODEL_{name.upper()}_H_"
    return f"""\
/* Model `{name}`, compiled by qgraph {metadata.get("qgraph.version", "?")} ({_comment(", ".join(isas))}).
 *
{"".join(_ports(plan))} *
 * Link lib{name}.a and the qgraph runtime. */
#ifndef {guard}
#define {guard}

#ifndef QGRAPH_QGRAPH_H_ /* a program with the single-source runtime includes its qgraph.h first */
#include "qgraph/qgraph.h"
#endif

#ifdef __cplusplus
extern "C" {{
#endif

/* For qg_load_static(), and for qgraph::Model of qgraph.hpp. */
extern const qg_static_model {name}_artifact;

/* The model, to be freed by qg_model_free(). `options` may be NULL. */
static inline qg_status {name}_load(const qg_load_options* options, qg_model** model) {{
  return qg_load_static(&{name}_artifact, options, model);
}}

#ifdef __cplusplus
}}
#endif

#endif /* {guard} */
"""


def _ports(plan: dict[str, Any]) -> Iterator[str]:
    """Inputs and outputs in the order of their indices, as lines of a comment."""
    for side in ("input", "output"):
        for i, port in enumerate(plan[f"{side}s"]):
            value = plan["values"][port["value"]]
            shape = ", ".join(map(_expression, value["shape"]))
            yield f" *   {side} {i}: {_comment(port['name'])}, {value['dtype']} [{_comment(shape)}]\n"


def _expression(expr: Any) -> str:
    """A dimension of the plan as text: `384`, `batch`, `(2 * sequence)`, `max(a, b)`."""
    if not isinstance(expr, list):
        return str(expr)
    op, *operands = expr
    a, b = map(_expression, operands)
    sign = {"add": "+", "sub": "-", "mul": "*"}.get(op)
    return f"({a} {sign} {b})" if sign else f"{op}({a}, {b})"


def _comment(text: str) -> str:
    """Without what would end a comment or begin a line."""
    return json.dumps(text)[1:-1].replace("*/", "* /").replace("/*", "/ *")
