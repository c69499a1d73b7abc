"""Which devices there are, which one a model is loaded on, and why there is none."""

from __future__ import annotations

import copy
import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import artifact_builder
import pytest
from artifact_builder import Parts, container
from fake_cuda import Report, run_script

Run = Callable[..., Report]


@pytest.fixture(scope="module")
def cpu_parts(tmp_path_factory: pytest.TempPathFactory, driver: Path) -> Parts:
    return artifact_builder.toy(tmp_path_factory.mktemp("cpu-kernels"))


@pytest.fixture(scope="module")
def cpu_toy(tmp_path_factory: pytest.TempPathFactory, cpu_parts: Parts) -> Path:
    path = tmp_path_factory.mktemp("cpu") / "cpu.qg"
    path.write_bytes(cpu_parts.to_bytes())
    return path


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, cpu_parts: Parts, toy_parts: Parts) -> Path:
    """An artifact for CPU and CUDA; their weights are the same tensors."""
    tensors = {t.name: t for parts in (cpu_parts, toy_parts) for t in parts.tensors()}
    path = tmp_path_factory.mktemp("both") / "both.qg"
    path.write_bytes(container(list(tensors.values())))
    return path


def test_devices(run: Run) -> None:
    report = run(
        """
cpu, first, second = runtime.devices()
assert cpu.name == "cpu" and cpu.description.split(",")[0] in ("x86_64", "aarch64"), cpu
assert first == runtime.Device("cuda:0", "Fake GPU, compute capability 1.0, 2 GiB"), first
assert second.name == "cuda:1"
assert runtime.device_problem() == ""
""",
        devices=2,
        memory=2 << 30,
    )
    assert "cuDevicePrimaryCtxRetain" not in report.calls  # looking costs no context


def test_cpu_models_do_not_look_for_a_driver(run: Run, cpu_toy: Path, both: Path) -> None:
    report = run(
        f"""
from artifact_builder import toy_inputs
for path in {[str(cpu_toy), str(both)]!r}:
    with runtime.load(path) as model:
        assert model.device == "cpu"
        model.run(toy_inputs(2, 3))
"""
    )
    assert not report.calls


def test_choice_of_the_device(run: Run, cpu_toy: Path, toy: Path, both: Path) -> None:
    run(
        f"""
from artifact_builder import toy_inputs
cpu, cuda, both = {[str(cpu_toy), str(toy), str(both)]!r}
inputs = toy_inputs(2, 3)
expected = runtime.load(cpu).run(inputs)
for path, device, got in [
    (cuda, None, "cuda:0"), (cuda, "cuda", "cuda:0"), (cuda, "cuda:1", "cuda:1"),
    (both, None, "cpu"), (both, "cpu", "cpu"), (both, "cuda", "cuda:0"), (both, "cuda:1", "cuda:1"),
]:
    with runtime.load(path, device=device) as model:
        assert model.device == got
        assert [v.isa for v in model.variants] == ["future", "wide", "base"]
        outputs = model.run(inputs)
        for name in ("pooled", "twice", "sum"):
            np.testing.assert_array_equal(outputs[name], expected[name])
for path, device, error, message in [
    (cpu, "cuda", UnsupportedError, "no code for CUDA, only for the CPU: compile the model for the target"),
    (cpu, "cuda:9", UnsupportedError, "no code for CUDA"),
    (cuda, "cpu", UnsupportedError, "no code for the CPU, only for CUDA: load it on 'cuda'"),
    (cuda, "cuda:2", UnsupportedError, "there is no device 'cuda:2': the last one is cuda:1"),
    *((cuda, wrong, InputError, f"unknown device '{{wrong}}': give cpu, cuda") for wrong in
      ("gpu", "cuda:", "cuda:x", "cuda:-1", "cuda 0", "", "CPU", "cud")),
    (cuda, 0, InputError, "device is 0: give its name"),
]:
    try:
        runtime.load(path, device=device)
    except error as caught:
        assert message in str(caught), (device, str(caught))
    else:
        raise AssertionError(device)
""",
        devices=2,
    )


def load_fails(message: str) -> str:
    """Script that expects this of loading `path`, and the CPU to be all there is."""
    return f"""
for _ in range(2):
    try:
        runtime.load(path)
    except UnsupportedError as error:
        assert {message!r} in str(error) and "\\n" not in str(error), str(error)
    else:
        raise AssertionError("it loads")
assert [device.name for device in runtime.devices()] == ["cpu"]
assert {message!r} in runtime.device_problem(), runtime.device_problem()
"""


def test_no_driver(toy: Path, tmp_path: Path) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        message = "CUDA is not available: no NVIDIA driver: libcuda.so.1: cannot open"
        run_script(None, tmp_path / "report", f"path = {str(toy)!r}" + load_fails(message))
    else:
        pytest.skip("there is an NVIDIA driver")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": 0}, "the NVIDIA driver is for CUDA 12.4, but sees no GPU"),
        ({"version": 11030}, "the NVIDIA driver is for CUDA 11.3, too old: install one for 11.4 or later"),
        ({"fail": "cuDriverGetVersion:1:999"}, "the NVIDIA driver does not tell its version"),
        ({"fail": "cuInit:1:803"}, "does not start: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"),
        ({"fail": "cuInit:1:12345"}, "does not start: CUDA error 12345"),
    ],
)
def test_drivers_of_no_use(run: Run, toy: Path, settings: dict[str, object], message: str) -> None:
    run(f"path = {str(toy)!r}" + load_fails(message), **settings)


def test_driver_without_a_function(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = 'extern "C" int cuDriverGetVersion(int* version) { *version = 12000; return 0; }\n'
    (tmp_path / "driver.cc").write_text(source + 'extern "C" int cuInit(unsigned) { return 0; }\n')
    command = ["g++", "-shared", "-fPIC", tmp_path / "driver.cc", "-o", tmp_path / "libcuda.so.1"]
    subprocess.run(command, check=True)
    message = "the NVIDIA driver is for CUDA 12.0, but has no cuGetErrorName"
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    run_script(None, tmp_path / "report", f"path = {str(toy)!r}" + load_fails(message))


@pytest.mark.parametrize(
    ("capability", "fit", "unfit"),
    [
        (10, "sm_10 sm_10a ptx_10 ptx_09", "sm_11 sm_90 sm_90a ptx_11 sm_1 sm_10b sm_ ptx_ sm10 avx2 a"),
        (89, "sm_89 sm_86 sm_80 ptx_89 ptx_50", "sm_90 sm_80a sm_86a sm_75 ptx_90 sm_800 sm_08"),
        (90, "sm_90 sm_90a ptx_80", "sm_80 sm_89 sm_100 sm_100a ptx_100"),
        (103, "sm_103 sm_103a sm_100 ptx_90 ptx_103", "sm_100a sm_90a sm_110 sm_120 sm_10 ptx_120"),
    ],
)
def test_features(run: Run, toy_parts: Parts, tmp_path: Path, capability: int, fit: str, unfit: str) -> None:
    """A device has those of its own number, its generation's lower ones, and PTX up to its own."""
    parts = copy.deepcopy(toy_parts)
    base = parts.plan["variants"][2]
    for feature in fit.split():
        refused = [{**base, "isa": f"not-{name}", "features": [name]} for name in (*unfit.split(), "")]
        parts.plan["variants"] = [*refused, {**base, "isa": feature, "features": [feature]}]
        (tmp_path / f"{feature}.qg").write_bytes(parts.to_bytes())
    run(
        f"""
for feature in {fit.split()!r}:
    with runtime.load(f"{tmp_path}/{{feature}}.qg") as model:
        assert model.isa == feature
        assert [v.supported for v in model.variants] == [False] * {len(unfit.split()) + 1} + [True]
""",
        capability=capability,
    )


def test_no_variant_fits(run: Run, toy_parts: Parts, tmp_path: Path) -> None:
    parts = copy.deepcopy(toy_parts)
    base = parts.plan["variants"][2]
    parts.plan["variants"] = [{**base, "isa": name, "features": [name]} for name in ("sm_80", "sm_90a")]
    parts.plan["variants"].append({**base, "isa": "x", "arch": "x86_64"})
    (tmp_path / "none.qg").write_bytes(parts.to_bytes())
    run(
        f"""
folder = {str(tmp_path)!r}
try:
    runtime.load(f"{{folder}}/none.qg")
except UnsupportedError as error:
    message = "no code in the file fits cuda:0 (Fake GPU, compute capability 1.0): sm_80 needs sm_80; sm_90a"
    assert message in str(error) and "x is for x86_64" in str(error), str(error)
else:
    raise AssertionError
try:
    runtime.load(f"{{folder}}/none.qg", isa="sm_80")
except UnsupportedError as error:
    assert "cuda:0 cannot run variant 'sm_80': it needs sm_80" in str(error), str(error)
else:
    raise AssertionError
"""
    )
