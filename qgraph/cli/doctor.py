"""`qgraph doctor`: is everything here that qgraph needs, and does the runtime build and load?"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from qgraph.cli.console import print_json, table
from qgraph.cli.options import json_option, standard_options
from qgraph.errors import QGraphError, ResourceError, UnsupportedError
from qgraph.report.text import size


@dataclass(frozen=True)
class Check:
    """One finding: `ok` False means that qgraph does not work until it is mended."""

    name: str
    ok: bool
    found: str


@click.command()
@click.option("--ops", is_flag=True, help="List the operators that can be compiled, and nothing else.")
@json_option
@standard_options
def command(ops: bool, as_json: bool) -> None:
    """Check this machine: versions, CPU features, C++ compiler, cache folder, whether the runtime builds and
    loads, which GPUs it sees, and what compiles for them. Exits with 6 when something that qgraph needs is
    missing or broken."""
    if ops:
        from qgraph.codegen.lowering import supported_ops

        print_json(supported_ops()) if as_json else print("\n".join(supported_ops()))
        return
    checks = list(_checks())
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        click.echo(table([("ok" if c.ok else "BROKEN", c.name, c.found) for c in checks]))
    broken = [check.name for check in checks if not check.ok]
    if broken:
        raise ResourceError(f"{len(broken)} of {len(checks)} checks failed: {', '.join(broken)}")


def _checks() -> Iterator[Check]:
    version = platform.python_version()
    yield Check("python", sys.version_info >= (3, 11), f"{version} ({sys.executable})")
    yield from _packages()
    yield from (_probe(name, probe) for name, probe in _PROBES.items())


def _packages() -> Iterator[Check]:
    """Every requirement of the installed package, read from its metadata; in a bare checkout from nothing."""
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in metadata.requires("qgraph") or []]
    except metadata.PackageNotFoundError:
        yield Check("qgraph", True, "running from a checkout: required versions are not checked")
        return
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Check(requirement.name, False, f"missing: needs {requirement.specifier}")
            continue
        ok = requirement.specifier.contains(found, prereleases=True)
        yield Check(requirement.name, ok, found if ok else f"{found}: needs {requirement.specifier}")


def _probe(name: str, probe: Callable[[], str]) -> Check:
    try:
        return Check(name, True, probe())
    except QGraphError as error:
        return Check(name, False, str(error))
    except (ImportError, OSError) as error:
        return Check(name, False, f"{type(error).__name__}: {error}")


def _cpu() -> str:
    """The machine's features among those that kernels may ask for, and the code variant that would run."""
    from qgraph.codegen.isa import ISAS

    machine = platform.machine()
    isas = [isa for isa in ISAS.values() if isa.arch == machine]
    if not isas:
        known = ", ".join(sorted({isa.arch for isa in ISAS.values()}))
        raise UnsupportedError(f"no code variant for {machine}: there are some for {known}")
    wanted = {feature for isa in isas for feature in isa.features}
    here = _cpu_flags() & wanted if wanted else set()
    runs = [isa.name for isa in isas if set(isa.features) <= here]
    if not runs:
        raise UnsupportedError(f"{machine} without {', '.join(sorted(wanted - here))}: no code variant fits")
    return f"{machine}: {' '.join(sorted(here)) or 'baseline'}; runs {runs[0]}"


def _cpu_flags() -> set[str]:
    """The features that the kernel reports, by the names of runtime/FORMAT.md."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            # Linux writes avx512_vnni and amx_tile.
            flags = set(value.replace("avx512_", "avx512").replace("amx_", "amx-").split())
            return flags | ({"neon"} if "asimd" in flags else set())
    raise ResourceError("/proc/cpuinfo names no CPU features")


def _compiler() -> str:
    from qgraph.runtime.build import find_compiler

    command = find_compiler()
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return f"{' '.join(command)}: {(done.stdout.splitlines() or ['?'])[0]}"


def _cache() -> str:
    from qgraph.cache import cache_dir

    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder):
        parts = (part for part in sorted(folder.iterdir()) if part.is_dir())
        held = ", ".join(f"{part.name} {size(_nbytes(part))}" for part in parts)
        return f"{folder}: {held}" if held else str(folder)


def _nbytes(folder: Path) -> int:
    """Of all files below; what another process removes meanwhile counts as nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(parent) / name).lstat().st_size
    return total


def _runtime() -> str:
    from qgraph.runtime import _native, build

    return f"{_native.library().qg_version().decode()} in {build.library()}"


def _gpu() -> str:
    """The GPUs, of which none is needed, or why there is none."""
    from qgraph.runtime import device_problem, devices

    try:
        gpus = [f"{device.name}: {device.description}" for device in devices() if device.name != "cpu"]
    except ResourceError:
        return "unknown without the runtime library"
    return "; ".join(gpus) or f"none: {device_problem()}"


def _cuda_compiler() -> str:
    """What compiles for GPUs, or why nothing does; only `--target cuda` needs it."""
    from qgraph.codegen.cuda.toolkit import find_compiler

    try:
        return find_compiler().name
    except QGraphError as error:
        return f"none: {error}"


def _tvm() -> str:
    from qgraph.codegen.tvm_backend import load_tvm

    tvm = load_tvm()
    if tvm.get_global_func("target.build.llvm", allow_missing=True) is None:
        raise ResourceError("this TVM was built without LLVM: install the apache-tvm wheel")
    return f"{tvm.__version__} with LLVM"


_PROBES: dict[str, Callable[[], str]] = {
    "CPU": _cpu,
    "C++ compiler": _compiler,
    "cache folder": _cache,
    "runtime library": _runtime,
    "GPU": _gpu,
    "CUDA compiler": _cuda_compiler,
    "kernel compiler": _tvm,
}
