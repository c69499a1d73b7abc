"""What benchmarks/gpu.py measures qgraph beside, all in torch: the GPU's limits, products of linear layers by
cuBLAS, tinygemm and Humming, and a Llama in bfloat16. `AbsentError` says why one is not there.

A peer runs as fast as torch lets it: weights on the device, one CUDA graph for all that is timed. It gets
what it multiplies best, bfloat16 activations, where qgraph takes float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

DEVICE = "cuda"
Run = Callable[[], object]
TINYGEMM_GROUP = 128
TINYGEMM_ROWS = 64  # at most: it is made for generation
TINYGEMM_TILES = 8  # of 16 inputs, side by side in its layout: the most it has


class AbsentError(Exception):
    """Why something cannot take part."""


def torch_on_gpu() -> Any:
    """torch. Raises AbsentError where it is not, or sees no GPU."""
    try:
        import torch
    except ImportError as error:
        raise AbsentError(f"no torch: {error}") from None
    if not torch.cuda.is_available():
        raise AbsentError(f"torch {torch.__version__} sees no GPU")
    return torch


def captured(run: Callable[[], Any]) -> Run:
    """A CUDA graph of what `run` does, launched and waited for by each call. `run` warms up before."""
    torch = torch_on_gpu()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.inference_mode():
        kept = run()

    def replay(keep: object = kept) -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


@dataclass(frozen=True)
class Peer:
    """Layers of one shape with cold weights.

    nbytes: of the weights of a layer, scales counted. bind: rows to (what does all of them, how many). most:
    rows that it is meant for.
    """

    name: str
    nbytes: int
    bind: Callable[[int], tuple[Run, int]]
    most: int = 1 << 20


def bound(
    torch: Any, K: int, layers: Sequence[Callable[[Any], Any]], passes: int
) -> Callable[[int], tuple[Run, int]]:
    """`bind` of a peer whose layers take x [rows, K] in bfloat16."""

    def bind(rows: int) -> tuple[Run, int]:
        x = torch.randn(rows, K, device=DEVICE, dtype=torch.bfloat16)

        def run() -> None:
            for _ in range(passes):
                for layer in layers:
                    layer(x)  # its output's memory is the next one's

        return captured(run), passes * len(layers)

    return bind


def cublas(K: int, N: int, cold: int, passes: int) -> Peer:
    """bfloat16 products, weights [N, K] as `torch.nn.Linear` has them."""
    torch = torch_on_gpu()
    nbytes = 2 * K * N
    weights = [_normal(torch, N, K) for _ in range(-(-cold // nbytes))]
    layers = [lambda x, w=w: torch.nn.functional.linear(x, w) for w in weights]
    return Peer("torch bf16", nbytes, bound(torch, K, layers, passes))


def tinygemm(K: int, N: int, cold: int, passes: int) -> Peer:
    """torch's own int4: a scale and a zero point in bfloat16 for every 128 inputs."""
    torch = torch_on_gpu()
    groups = K // TINYGEMM_GROUP
    nbytes = K * N // 2 + groups * N * 4
    layers = []
    for _ in range(-(-cold // nbytes)):
        codes = torch.randint(0, 256, (N, K // 2), device=DEVICE, dtype=torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, TINYGEMM_TILES)
        scales = torch.rand(groups, N, 2, device=DEVICE, dtype=torch.bfloat16) / K**0.5
        layers.append(
            lambda x, packed=packed, scales=scales: torch.ops.aten._weight_int4pack_mm(
                x, packed, TINYGEMM_GROUP, scales
            )
        )
    return Peer("tinygemm int4", nbytes, bound(torch, K, layers, passes), TINYGEMM_ROWS)


HUMMING = {
    "Humming nvfp4": (4.5, {"dtype": "float4e2m1", "group_size": 16, "scale_dtype": "float8e4m3"}),
    "Humming int2": (2.125, {"dtype": "uint2", "group_size": 128}),
}


def humming(name: str, K: int, N: int, cold: int, passes: int) -> Peer:
    """One of HUMMING, if the wheel `humming-kernels` is there; compiled by it on first use."""
    torch = torch_on_gpu()
    try:
        from humming.layer import HummingLayer
    except ImportError as error:
        raise AbsentError(f"no humming-kernels: {error}") from None
    bits, config = HUMMING[name]
    layer = HummingLayer(shape_n=N, shape_k=K, weight_config=dict(config), torch_dtype=torch.bfloat16).cuda()
    layer.load_from_unquantized(_normal(torch, N, K))
    layer.transform()
    nbytes = int(K * N * bits / 8)
    layers = [layer, *(copy.deepcopy(layer) for _ in range(-(-cold // nbytes) - 1))]
    return Peer(name, nbytes, bound(torch, K, layers, passes))


PEERS: dict[str, Callable[[int, int, int, int], Peer]] = {
    "torch bf16": cublas,
    "tinygemm int4": tinygemm,
    **{name: lambda K, N, cold, passes, name=name: humming(name, K, N, cold, passes) for name in HUMMING},
}


def _normal(torch: Any, N: int, K: int) -> Any:
    return torch.randn(N, K, device=DEVICE, dtype=torch.bfloat16) / K**0.5


def copy_bandwidth(nbytes: int = 2 << 30, runs: int = 20) -> float:
    """Bytes a second, read and written, of copies on the device: the best decile of `runs`."""
    torch = torch_on_gpu()
    source = torch.empty(nbytes, device=DEVICE, dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    return 2 * nbytes / _decile(torch, lambda: target.copy_(source), runs)


def gemm_rate(size: int = 8192, runs: int = 20) -> float:
    """Operations a second of cuBLAS on random square matrices in bfloat16, the median of `runs` in a row."""
    torch = torch_on_gpu()
    a, b = (_normal(torch, size, size) for _ in range(2))
    return 2 * size**3 / _decile(torch, lambda: a @ b, runs, 0.5)


def _decile(torch: Any, run: Run, runs: int, which: float = 0.1) -> float:
    """Seconds by the GPU's clock."""
    for _ in range(3):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) / 1e3 for a, b in pairwise(marks))
    return float(times[int(which * (len(times) - 1))])


class TorchLlama:
    """A Llama of some shape with random bfloat16 weights and a static cache, for one text.

    Its q, k and v are one product, and so are gate and up: what a peer tuned for speed would do.
    """

    def __init__(self, shape: dict[str, int], tokens: int) -> None:
        self._torch = torch = torch_on_gpu()
        width, inner, heads, kv_heads = (shape[k] for k in ("width", "inner", "heads", "kv_heads"))
        self._heads, self._kv_heads, self._size = heads, kv_heads, width // heads
        self._kv = kv_heads * self._size
        self._tokens, self.vocabulary = tokens, shape["vocabulary"]
        self._table, self._head = (_normal(torch, shape["vocabulary"], width) for _ in range(2))
        self._gain = torch.ones(width, device=DEVICE, dtype=torch.bfloat16)
        cache = (1, kv_heads, tokens, self._size)
        self._layers = [
            {
                "qkv": _normal(torch, width + 2 * self._kv, width),
                "out": _normal(torch, width, width),
                "up": _normal(torch, 2 * inner, width),
                "down": _normal(torch, width, inner),
                "keys": torch.zeros(cache, device=DEVICE, dtype=torch.bfloat16),
                "values": torch.zeros(cache, device=DEVICE, dtype=torch.bfloat16),
            }
            for _ in range(shape["layers"])
        ]
        places = torch.arange(tokens, device=DEVICE, dtype=torch.float32)
        rates = 10000.0 ** -(torch.arange(0, self._size, 2, device=DEVICE) / self._size)
        angles = torch.outer(places, rates).repeat(1, 2)
        self._cos, self._sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        self._places = torch.arange(tokens, device=DEVICE)

    def forward(self, ids: Any, at: Any) -> Any:
        """Logits [1, 1, V] of the last of ids [1, n], int64, at positions `at` [n]: all on the device."""
        torch = self._torch
        functional = torch.nn.functional
        x = functional.embedding(ids, self._table)
        # A prompt begins the text: it needs no key that is not its own.
        prompt = ids.shape[1] > 1
        mask = None if prompt else (self._places <= at[:, None])[None, None]
        cos, sin = self._cos[at], self._sin[at]
        for layer in self._layers:
            normal = functional.rms_norm(x, self._gain.shape, self._gain, 1e-5)
            q, k, v = functional.linear(normal, layer["qkv"]).split([x.shape[2], self._kv, self._kv], 2)
            q, k, v = (part.unflatten(2, (-1, self._size)).transpose(1, 2) for part in (q, k, v))
            q, k = (part * cos + self._turned(part) * sin for part in (q, k))
            layer["keys"].index_copy_(2, at, k)
            layer["values"].index_copy_(2, at, v)
            if not prompt:
                k, v = layer["keys"], layer["values"]
            grouped = self._heads != self._kv_heads
            mixed = functional.scaled_dot_product_attention(
                q, k, v, mask, is_causal=prompt, enable_gqa=grouped
            )
            x = x + functional.linear(mixed.transpose(1, 2).flatten(2), layer["out"])
            normal = functional.rms_norm(x, self._gain.shape, self._gain, 1e-5)
            gate, up = functional.linear(normal, layer["up"]).chunk(2, 2)
            x = x + functional.linear(functional.silu(gate) * up, layer["down"])
        normal = functional.rms_norm(x[:, -1:], self._gain.shape, self._gain, 1e-5)
        return functional.linear(normal, self._head)

    def _turned(self, x: Any) -> Any:
        low, high = x.chunk(2, -1)
        return self._torch.cat((-high, low), -1)

    def prompt(self, tokens: int) -> Run:
        """Reads a prompt of so many tokens, in one CUDA graph."""
        torch = self._torch
        ids = torch.randint(0, self.vocabulary, (1, tokens), device=DEVICE)
        at = torch.arange(tokens, device=DEVICE)
        return captured(lambda: self.forward(ids, at))

    def step(self, start: int) -> Run:
        """Reads one token, at first at position `start`, in one CUDA graph that moves on by itself."""
        torch = self._torch
        ids = torch.randint(0, self.vocabulary, (1, 1), device=DEVICE)
        at = torch.full((1,), start, device=DEVICE)

        def run() -> Any:
            logits = self.forward(ids, at)
            at.add_(1).clamp_(max=self._tokens - 1)
            return logits

        return captured(run)
