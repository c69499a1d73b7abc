"""Memory of calibrated quantization against the depth of a model.

    python benchmarks/calibration_memory.py [--size 768] [--layers 16 64 192]

A chain of square layers with their weights in a file beside the model, quantized by `sweep-diagonal` on
activations of the layers before as quantized, each depth in a process of its own. Printed is the largest
anonymous memory, sampled every 5 ms, beyond that before the model is loaded: pages of mapped files do not
count, as the system takes them back when it needs them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np


def write_chain(path: Path, layers: int, size: int) -> None:
    """x [rows, size] through `layers` products and Tanh, weights in `<path>.data`."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, weights, x = [], [], "x"
    for i in range(layers):
        W = (rng.standard_normal((size, size)) / np.sqrt(size)).astype(np.float32)
        weights.append(numpy_helper.from_array(W, f"W{i}"))
        nodes.append(helper.make_node("MatMul", [x, f"W{i}"], [f"p{i}"], f"layer{i}"))
        x = f"x{i}"
        nodes.append(helper.make_node("Tanh", [f"p{i}"], [x], f"tanh{i}"))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", size])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["rows", size])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("needs Linux: /proc/self/status has no RssAnon here")


def quantize(path: Path, size: int) -> tuple[float, float]:
    """(MiB beyond what was there before the model, seconds) of quantizing the file."""
    from qgraph.calibration import StreamingCalibrator, model_inputs, open_data
    from qgraph.passes import load_model, prepare_model
    from qgraph.passes.quantize_weights import QuantizeWeights
    from qgraph.passes.select_layers import SelectLayers

    rng = np.random.default_rng(1)
    feeds = [{"x": rng.standard_normal((256, size)).astype(np.float32)} for _ in range(8)]
    before, peak, over = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = prepare_model(load_model(path))
    SelectLayers()(model)
    calibrator = StreamingCalibrator(open_data(feeds, model_inputs(model)), sequential=True)
    QuantizeWeights("nvfp4", "sweep-diagonal", calibrator=calibrator)(model)
    seconds = time.perf_counter() - start
    over.set()
    watcher.join()
    return (peak - before) / 2**20, seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 64, 192])
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)  # of the process that measures
    options = parser.parse_args()
    if options.file:
        print(*quantize(options.file, options.size))
        return
    print("| layers | weights, MiB | memory, MiB | quantized weights, MiB | s |\n|---|---|---|---|---|")
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "chain.onnx"
            write_chain(path, layers, options.size)
            command = [sys.executable, __file__, "--file", str(path), "--size", str(options.size)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        memory, seconds = map(float, done.stdout.split())
        weights = layers * options.size**2
        print(
            f"| {layers} | {4 * weights / 2**20:.0f} | {memory:.0f} | {weights * 4.5 / 8 / 2**20:.0f} "
            f"| {seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
