"""The runtime as single files for foreign build systems: `qgraph.h`, `qgraph.hpp` and `qgraph.cc`.

`qgraph.cc` is every source of `runtime/src`, one after another, with our own headers in place of their first
include. So names in the anonymous namespaces of these sources are unique across all of them.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch

from qgraph.errors import QGraphError
from qgraph.runtime.build import ROOT

_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.MULTILINE)
_GUARD = re.compile(r"^#ifndef (QGRAPH_\w+_H_)\n#define \1\n(.*)^#endif  // \1\n", re.MULTILINE | re.DOTALL)
_PUBLIC = "qgraph/"
# What needs an operating system, and what stands in for it in WebAssembly.
_NATIVE = ("code_image.cc", "cuda_*.cc", "mapped_file.cc", "thread_pool.cc")
_WASM = "wasm_platform.cc"


def amalgamate() -> dict[str, str]:
    """File name -> content. Raises QGraphError for a source that includes what is not there."""
    public = {
        name: (ROOT / "include" / "qgraph" / name).read_text().replace(f'"{_PUBLIC}', '"')
        for name in ("qgraph.h", "qgraph.hpp")
    }
    names = sorted(path.name for path in (ROOT / "src").glob("*.cc"))
    native = [name for name in names if any(fnmatch(name, pattern) for pattern in _NATIVE)]
    seen: set[str] = set()
    # Last, so that a header that others need, too, is not among what is left out.
    body = _joined([name for name in names if name not in native and name != _WASM], seen)
    body += f"\n#if !defined(__wasm__)\n{_joined(native, set(seen))}\n#endif\n{_joined([_WASM], seen)}"
    version = re.search(r'QG_VERSION "(.*?)"', public["qgraph.h"])
    assert version is not None
    head = (
        f"// qgraph runtime {version[1]}, all of it: made from its sources by `qgraph sdk --amalgamation`.\n"
        "// SPDX-License-Identifier: Apache-2.0\n"
        "//\n"
        "//   c++ -std=c++17 -O2 -fvisibility=hidden -pthread -c qgraph.cc\n"
        '#include "qgraph.h"\n'
    )
    return {**public, "qgraph.cc": head + body}


def _joined(names: list[str], seen: set[str]) -> str:
    return "".join(f"\n// ---- {name} ----\n\n{_inlined(name, seen)}" for name in names)


def _inlined(name: str, seen: set[str]) -> str:
    """A file of `src` with our headers in place of their first include, and no second one."""
    path = ROOT / "src" / name
    if not path.is_file():
        raise QGraphError(f"a source of the runtime includes '{name}', which is not in {ROOT / 'src'}")
    text = path.read_text()
    if path.suffix == ".h":
        guarded = _GUARD.search(text)
        if guarded is None:
            raise QGraphError(f"{path} has no include guard")
        text = text[: guarded.start()] + guarded[2].strip("\n") + "\n"

    def include(match: re.Match[str]) -> str:
        if match[1].startswith(_PUBLIC) or match[1] in seen:
            return ""
        seen.add(match[1])
        return _inlined(match[1], seen)

    return _INCLUDE.sub(include, text)
