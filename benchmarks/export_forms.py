"""In which form stock ONNX Runtime multiplies low-bit weights fastest, on this CPU: what `--export ort-cpu`
goes by.

    python benchmarks/export_forms.py [--shapes 2048,4096] [--rows 1,32] [--formats
    nvfp4,int8,ternary,int3,int4] [--layers 1] [--threads 1] [--seconds 0.5] [--json FILE]

A form is how a weight of one of qgraph's formats is given to ONNX Runtime: as MatMulNBits nodes of so many
bits (`8`, or `4+4`: two whose results are added), as DequantizeLinear and MatMul (`dq`), or as a float32
matrix (`dense`). Formats with means have them in a small product of sums of blocks (`sums`) or as zero points
in float (`zp`). `x` is what activations are rounded to: nothing (`float`, accuracy_level 0) or int8 (4).

Times are of one product, the least of all runs and their median; `MB` is what the weight takes as
initializers, `error` is relative, to float64 products with the same weight. `--layers` chains so many
different weights [K, K], so that they do not all lie in the cache. One process has the machine, hopefully:
the least is what others disturb least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from machine import description
from onnx import TensorProto, helper, numpy_helper

from qgraph.export.nbits import Plane, means, planes
from qgraph.formats import FORMATS, QTensor

CONTRIB = "com.microsoft"
LEVELS = {"float": 0, "int8": 4}


@dataclass(frozen=True)
class Cell:
    """One form of one weight, for so many rows; `seconds` are of a product."""

    size: int
    format: str
    form: str
    x: str
    rows: int
    megabytes: float
    least: float
    median: float
    error: float


class Chain:
    """Products one after the other, in a graph that grows."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.value = "x"

    def add(self, op_type: str, *inputs: str, domain: str = "", **attributes: object) -> str:
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], domain=domain, **attributes))
        return output

    def tensor(self, array: npt.NDArray) -> str:
        name = f"t{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(array, name))
        return name

    def session(self, size: int, threads: int, level: int) -> onnxruntime.InferenceSession:
        x, y = (
            helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", size]) for n in ("x", self.value)
        )
        graph = helper.make_graph(self.nodes, "chain", [x], [y], self.tensors)
        imports = [helper.make_opsetid("", 23), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=11)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
        return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


Form = Callable[[Chain, QTensor, int], None]


def nbits(
    chain: Chain, plane: Plane, level: int, zero: npt.NDArray | None = None, scale: str = ""
) -> tuple[str, str]:
    """(product, initializer of the scales)."""
    K, N = plane.fields.shape
    scale = scale or chain.tensor(np.ascontiguousarray(plane.scale.T))
    inputs = [chain.value, chain.tensor(plane.packed()), scale]
    if plane.zero_point is not None:
        inputs.append(chain.tensor(plane.packed_zero_points()))
    elif zero is not None:
        inputs.append(chain.tensor(zero))
    sizes = {"K": K, "N": N, "bits": plane.bits, "block_size": plane.block}
    return chain.add("MatMulNBits", *inputs, domain=CONTRIB, accuracy_level=level, **sizes), scale


def planes_form(wide: bool) -> Form:
    """What `--export ort-cpu` writes: planes, and sums of blocks for the means."""

    def build(chain: Chain, q: QTensor, level: int) -> None:
        first, *others = planes(q, wide)
        total, scale = nbits(chain, first, level)
        for other in others:
            shared = scale if other.scale is first.scale else ""
            total = chain.add("Add", total, nbits(chain, other, level, scale=shared)[0])
        if (M := means(q)) is not None:
            shape = chain.tensor(np.array([0, -1, FORMATS[q.format].block]))
            blocks = chain.add("Reshape", chain.value, shape)
            sums = chain.add("ReduceSum", blocks, chain.tensor(np.array([-1])), keepdims=0)
            total = chain.add("Add", total, chain.add("MatMul", sums, chain.tensor(M)))
        chain.value = total

    return build


def zero_points(bits: int) -> Form:
    """Means as zero points in float: v s + m = (v - z) s with z = -m / s."""

    def build(chain: Chain, q: QTensor, level: int) -> None:
        spec = FORMATS[q.format]
        s, m = q.block_scale.astype(np.float32), means(q)
        (plane,) = planes(q, wide=bits == 4)
        assert m is not None and plane.bits == bits and spec.offset == "mean"
        zero = np.float32(1 << (bits - 1)) - m / s
        chain.value, _ = nbits(chain, plane, level, np.ascontiguousarray(zero.T))

    return build


def dequantized(chain: Chain, q: QTensor, level: int) -> None:
    """int8 codes behind DequantizeLinear, which ONNX Runtime may fuse with the MatMul."""
    (plane,) = planes(q, wide=False)
    codes = chain.tensor((plane.fields.astype(np.int16) - 128).astype(np.int8))
    W = chain.add("DequantizeLinear", codes, chain.tensor(plane.scale), axis=0, block_size=plane.block)
    chain.value = chain.add("MatMul", chain.value, W)


def dense(chain: Chain, q: QTensor, level: int) -> None:
    """float32, nothing low-bit."""
    chain.value = chain.add("MatMul", chain.value, chain.tensor(q.dequantize()))


FORMS: dict[str, dict[str, Form]] = {
    "nvfp4": {"dense": dense, "8": planes_form(False), "4+4": planes_form(True), "dq": dequantized},
    "int8": {"8": planes_form(False), "4+4": planes_form(True)},
    "int4": {"4": planes_form(True)},
    "int3": {"4 sums": planes_form(True), "4 zp": zero_points(4)},
    "ternary": {
        "2 sums": planes_form(False),
        "4 sums": planes_form(True),
        "2 zp": zero_points(2),
        "4 zp": zero_points(4),
    },
}


def weight(format: str, size: int, seed: int) -> QTensor:
    """Random, of such a scale that a chain neither grows nor vanishes."""
    rng, spec = np.random.default_rng(seed), FORMATS[format]
    spread = float(np.std(spec.values)) * size**0.5
    blocks = (spec.blocks(size), size)
    offset = None
    if spec.offset == "mean":
        offset = (rng.normal(-spec.values.mean(), 0.1, blocks) / spread).astype(np.float16)
    elif spec.offset == "zero_point":
        offset = rng.integers(7, 9, blocks).astype(np.uint8)
    a = {"global_scale": np.float32(1 / spread)} if spec.has_global_scale else {}
    scale = rng.uniform(0.8, 1.2, blocks) / (1 if a else spread)
    codes = rng.integers(0, len(spec.values), (size, size)).astype(np.uint8)
    return QTensor(format, (size, size), codes, scale.astype(spec.scale_dtype), block_offset=offset, **a)


def measure(args: argparse.Namespace) -> Iterator[Cell]:
    """All cells, one weight at a time."""
    for size in args.shapes:
        for format in args.formats:
            weights = [weight(format, size, seed) for seed in range(args.layers)]
            exact = {rows: np.random.default_rng(rows).standard_normal((rows, size)) for rows in args.rows}
            xs = {rows: x.astype(np.float32) for rows, x in exact.items()}
            exact = {rows: x.astype(np.float64) for rows, x in xs.items()}
            for q in weights:
                W = q.dequantize().astype(np.float64)
                exact = {rows: x @ W for rows, x in exact.items()}
            for form, build in FORMS[format].items():
                for x, level in LEVELS.items():
                    if form == "dense" and level:
                        continue
                    chain = Chain()
                    for q in weights:
                        build(chain, q, level)
                    session = chain.session(size, args.threads, level)
                    nbytes = sum(len(tensor.raw_data) for tensor in chain.tensors) / args.layers
                    for rows in args.rows:
                        (found,), times = timed(session, xs[rows], args.seconds)
                        error = np.linalg.norm(found - exact[rows]) / np.linalg.norm(exact[rows])
                        least, median = min(times) / args.layers, statistics.median(times) / args.layers
                        yield Cell(size, format, form, x, rows, nbytes / 1e6, least, median, float(error))


def timed(
    session: onnxruntime.InferenceSession, x: npt.NDArray, seconds: float
) -> tuple[list[npt.NDArray], list[float]]:
    """The outputs, and the time of runs for so many seconds, at least three after a first one."""
    found, times = session.run(None, {"x": x}), []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        session.run(None, {"x": x})
        times.append(time.perf_counter() - start)
    return found, times


def main() -> None:
    def many(text: str) -> list[int]:
        return [int(item) for item in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=many, default=[2048, 4096])
    parser.add_argument("--rows", type=many, default=[1, 32])
    parser.add_argument("--formats", type=lambda text: text.split(","), default=list(FORMS))
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"{description()}; ONNX Runtime {onnxruntime.__version__}, {args.threads} threads")
    heads = ("K=N", "format", "form", "x", "rows", "MB", "least ms", "median", "error")
    print("{:>5} {:8} {:7} {:5} {:>4} {:>6} {:>9} {:>9} {:>8}".format(*heads))
    cells = []
    for cell in measure(args):
        cells.append(cell)
        print(
            f"{cell.size:5} {cell.format:8} {cell.form:7} {cell.x:5} {cell.rows:4} {cell.megabytes:6.1f} "
            f"{1e3 * cell.least:9.3f} {1e3 * cell.median:9.3f} {cell.error:8.1e}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1))


if __name__ == "__main__":
    main()
