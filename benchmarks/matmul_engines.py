"""Who multiplies in benchmarks/kernels.py: qgraph's schemes, and the peers that are installed.

An engine opens a chain of linear layers (benchmarks/matmul_chain.py) for a number of threads, with weights of
its own in each layer, and gives a `Contender` that passes over it. `AbsentError` says why one is not there.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matmul_chain import X, Y, bits_chain, chain, one_layer

import qgraph
from qgraph.codegen.digits import FEW_ROWS
from qgraph.schemes import COMPUTES, PACKINGS, SCHEMES

F32 = "float32"


class AbsentError(Exception):
    """Why an engine cannot take part."""


@dataclass(frozen=True)
class Problem:
    """Layers [K, N], whose weights are to exceed `cold` bytes together, and at least one; on so many
    threads."""

    K: int
    N: int
    threads: int
    cold: int

    def layers(self, nbytes: float) -> int:
        return max(1, -(-self.cold // round(nbytes)))


@dataclass(frozen=True)
class Contender:
    """An engine with its chain.

    nbytes: of the weights of a layer, scales counted. activations: what a layer rounds its inputs to.
    bind: an input [rows, K] to what passes once over the chain.
    """

    name: str
    layers: int
    nbytes: int
    activations: str
    bind: Callable[[np.ndarray], Callable[[], object]]


Engine = Callable[[Problem], Contender]


def recipe_options(recipe: str) -> tuple[str, dict[str, str]]:
    """The scheme and options of `qgraph.compile` that `SCHEME`, `SCHEME/COMPUTE` or `SCHEME/PACKING` says."""
    scheme, _, how = recipe.partition("/")
    return scheme, {"packing" if how in PACKINGS else "compute": how} if how else {}


class QGraph:
    """Artifacts of a scheme, with whatever kernels `qgraph.compile` makes for it. `work` keeps them.

    recipe: see `recipe_options`.
    """

    def __init__(self, recipe: str, work: Path) -> None:
        self.scheme, self._how = recipe_options(recipe)
        self.name, self._stem, self._work = f"qgraph {recipe}", recipe.replace("/", "-"), work

    def __call__(self, problem: Problem) -> Contender:
        path, layers, nbytes = self.artifact(problem)
        session = qgraph.load(path, threads=problem.threads).session()

        def bind(x: np.ndarray) -> Callable[[], object]:
            return lambda: session.run({X: x})

        activations = SCHEMES[self.scheme].activation_format or F32
        if (compute := self._how.get("compute", COMPUTES[0])) != COMPUTES[0]:
            activations = f"{compute} from {FEW_ROWS + 1} rows on"
        return Contender(self.name, layers, nbytes, activations, bind)

    def artifact(self, problem: Problem) -> tuple[Path, int, int]:
        """(artifact, layers, bytes of a layer's weights): made once for all numbers of threads."""
        one = self._layer(problem)
        nbytes = weight_bytes(one.with_suffix(".qg"))
        layers = problem.layers(nbytes)
        stem = one.with_name(f"{one.stem}-{layers}")
        if not stem.with_suffix(".qg").is_file():
            longer = chain(one, layers, stem.with_suffix(".chain.onnx"))
            qgraph.build(longer, output=stem, verify=False, **self._how)
            longer.unlink()
        return stem.with_suffix(".qg"), layers, nbytes

    def _layer(self, problem: Problem) -> Path:
        """The quantized model of one layer, beside its artifact."""
        shape = f"{problem.K}x{problem.N}"
        stem = self._work / f"{self._stem}-{shape}"
        if not stem.with_suffix(".qg").is_file():
            source = one_layer(problem.K, problem.N, self._work / f"{shape}.onnx")
            solver = {"solver": "rtn"} if SCHEMES[self.scheme].solvers else {}
            options = {"verify": False, **self._how, **solver}
            qgraph.compile(source, scheme=self.scheme, output=stem, **options)
            source.unlink()
        return stem.with_suffix(".onnx")


def weight_bytes(artifact: Path) -> int:
    """Bytes of all weights of an artifact, as they lie in it."""
    with artifact.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    spans = [entry["data_offsets"] for name, entry in header.items() if name.startswith("w/")]
    return sum(end - start for start, end in spans)


class OnnxRuntime:
    """A chain of MatMul, or of MatMulNBits with blocks of `block`, whose inputs and output are bound."""

    def __init__(self, bits: int, block: int = 0, accuracy: int = 1) -> None:
        self._bits, self._block, self._accuracy = bits, block, accuracy
        self._activations = "int8" if accuracy == 4 else F32
        weights = F32 if bits == 32 else f"int{bits}"
        self.name = f"ONNX Runtime {weights}" + (f", {self._activations} x" if bits < 32 else "")

    def __call__(self, problem: Problem) -> Contender:
        K, N = problem.K, problem.N
        nbytes = K * N * self._bits // 8 + (-(-K // self._block) * N * 4 if self._block else 0)
        layers = problem.layers(nbytes)
        if self._bits == 32:
            model = float_chain(K, N, layers)
        else:
            model = bits_chain(K, N, layers, bits=self._bits, block=self._block, accuracy=self._accuracy)
        session = _ort_session(model, problem.threads)

        def bind(x: np.ndarray) -> Callable[[], object]:
            import onnxruntime

            binding = session.io_binding()
            given = onnxruntime.OrtValue.ortvalue_from_numpy(x)
            made = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((len(x), N), np.float32))
            binding.bind_ortvalue_input(X, given)
            binding.bind_ortvalue_output(Y, made)
            return lambda: session.run_with_iobinding(binding)

        return Contender(self.name, layers, nbytes, self._activations, bind)


def _ort_session(model: bytes, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes share no base
        raise AbsentError(str(error).strip().splitlines()[0]) from error


def float_chain(K: int, N: int, layers: int) -> bytes:
    """A chain of float32 MatMul."""
    with tempfile.TemporaryDirectory() as folder:
        one = one_layer(K, N, Path(folder) / "one.onnx")
        return chain(one, layers, Path(folder) / "chain.onnx").read_bytes()


class Torch:
    """`torch.nn.functional.linear` in a dtype, which the activations have as well."""

    def __init__(self, dtype: str) -> None:
        self._dtype, self.name = dtype, f"torch {dtype}"

    def __call__(self, problem: Problem) -> Contender:
        torch = _import("torch")
        dtype = getattr(torch, self._dtype)
        K, N = problem.K, problem.N
        nbytes = K * N * dtype.itemsize
        make = torch.Generator().manual_seed(0)
        weights = [
            (torch.randn(N, K, generator=make) / K**0.5).to(dtype) for _ in range(problem.layers(nbytes))
        ]

        def bind(x: np.ndarray) -> Callable[[], object]:
            given = torch.from_numpy(x).to(dtype)

            @torch.inference_mode()
            def run() -> object:
                torch.set_num_threads(problem.threads)
                value = given
                for weight in weights:
                    value = torch.nn.functional.linear(value[:, :K], weight)
                return value

            return run

        return Contender(self.name, len(weights), nbytes, self._dtype, bind)


class OpenVino:
    """Compressed weights of a type with a scale a block, settings as its users get them."""

    def __init__(self, weights: str) -> None:
        self._weights, self.name = weights, f"OpenVINO {weights}"

    def __call__(self, problem: Problem) -> Contender:
        openvino = _import("openvino")
        build = {"int4": _openvino_int4, "nvfp4": _openvino_nvfp4}[self._weights]
        operators = importlib.import_module("openvino.opset13")
        K, N = problem.K, problem.N
        block, scale_bytes = (16, 1) if self._weights == "nvfp4" else (128, 2)
        if K % block:
            raise AbsentError(f"K = {K} is not made of blocks of {block}")
        nbytes = K * N // 2 + K // block * N * scale_bytes
        layers, rng = problem.layers(nbytes), np.random.default_rng(0)
        x = operators.parameter([-1, K], np.float32, name=X)
        value = x
        for i in range(layers):
            if i and N > K:
                value = operators.slice(value, [0], [K], [1], [1])
            value = operators.matmul(value, build(operators, openvino, rng, K, N), False, True)
        settings = {"INFERENCE_NUM_THREADS": problem.threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        try:
            compiled = openvino.Core().compile_model(openvino.Model([value], [x], "chain"), "CPU", settings)
        except RuntimeError as error:
            raise AbsentError(f"OpenVINO refuses it: {str(error).strip().splitlines()[0]}") from error
        request = compiled.create_infer_request()

        def bind(x: np.ndarray) -> Callable[[], object]:
            request.set_input_tensor(openvino.Tensor(x))
            return request.infer

        precision = str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
        group = compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")
        activations = precision + (f", int8 by {group}" if group else "")
        return Contender(self.name, layers, nbytes, activations, bind)


def _openvino_int4(operators: Any, openvino: Any, rng: np.random.Generator, K: int, N: int) -> Any:
    """A weight [N, K] of int4 with a float16 scale every 128."""
    block = 128
    codes = rng.integers(0, 256, N * K // 2, np.uint8)
    packed = openvino.Tensor(codes, [N, K // block, block], openvino.Type.i4)
    scale = ((rng.random((N, K // block, 1)) + 0.5) / 4 / K**0.5).astype(np.float16)
    whole = operators.convert(operators.constant(packed), np.float16)
    scaled = operators.multiply(whole, operators.constant(scale))
    return operators.convert(operators.reshape(scaled, [N, K], False), np.float32)


def _openvino_nvfp4(operators: Any, openvino: Any, rng: np.random.Generator, K: int, N: int) -> Any:
    """A weight [N, K] of E2M1 with an E4M3 scale every 16 and a float32 scale for all."""
    block = 16
    codes = rng.integers(0, 256, N * K // 2, np.uint8)
    packed = openvino.Tensor(codes, [N, K // block, block], openvino.Type.f4e2m1)
    bits = rng.integers(0x20, 0x40, N * K // block, np.uint8)
    blocks = openvino.Tensor(bits, [N, K // block, 1], openvino.Type.f8e4m3)
    scale = operators.convert(operators.constant(blocks), np.float32)
    scale = operators.multiply(scale, operators.constant(np.float32(0.5 / K**0.5)))
    scaled = operators.multiply(operators.convert(operators.constant(packed), np.float32), scale)
    return operators.reshape(scaled, [N, K], False)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise AbsentError(f"{module} is not installed") from error


PEERS: dict[str, Callable[[], Engine]] = {
    "ort-f32": lambda: OnnxRuntime(32),
    "ort-int4": lambda: OnnxRuntime(4, 32, accuracy=1),
    "ort-int4-a8": lambda: OnnxRuntime(4, 32, accuracy=4),
    "ort-int2-a8": lambda: OnnxRuntime(2, 128, accuracy=4),
    "torch-f32": lambda: Torch("float32"),
    "torch-bf16": lambda: Torch("bfloat16"),
    "openvino-int4": lambda: OpenVino("int4"),
    "openvino-nvfp4": lambda: OpenVino("nvfp4"),
}
