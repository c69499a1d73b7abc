"""Rotary embeddings: pairs of elements of each head turned by the angle of their position."""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as B

from qgraph.codegen.cuda.kernels import CudaKernel, kernel
from qgraph.codegen.cuda.kernels.frame import device_function
from qgraph.codegen.kernels.loops import index
from qgraph.codegen.kernels.vmath import Expr, named
from qgraph.codegen.spec import CUDA_ELEMENTWISE_BLOCK, KernelSpec

_THREADS = 256


@kernel("rotary")
def rotary(spec: KernelSpec, symbol: str) -> CudaKernel:
    """y = x turned, over [batch, heads, length, 2 half + rest].

    Spec: half; interleaved: pairs are (2 i, 2 i + 1), not (i, i + half); rest: elements behind them that stay
    as they are. Arguments: y, x f32, cos, sin f32, batch, heads, length, strides of y and of x (four each),
    of cos and of sin by batch, position and element. Blocks: of CUDA_ELEMENTWISE_BLOCK pairs and single
    elements.
    """
    half, rest = spec["half"], spec["rest"]
    axes = [f"{name}_{axis}" for name in ("ys", "xs") for axis in "bhsd"]
    axes += [f"{name}_{axis}" for name in ("cs", "ss") for axis in "bsd"]
    pointers = [(name, "float32") for name in ("y", "x", "cos", "sin")]
    with device_function(symbol, pointers, ["batch", "heads", "length", *axes], _THREADS) as f:
        n, p = f.scalars, f.buffers
        width = half + rest
        total = B.bind(n["batch"] * n["heads"] * n["length"] * width)
        first = B.bind(f.block * CUDA_ELEMENTWISE_BLOCK + T.Cast("int64", f.thread))

        with B.serial(index(CUDA_ELEMENTWISE_BLOCK // _THREADS)) as turn:
            flat = B.bind(first + turn * _THREADS)
            with B.If(flat < total), B.Then():
                i, token = B.bind(T.truncmod(flat, index(width))), B.bind(T.truncdiv(flat, index(width)))
                i_s, head = B.bind(T.truncmod(token, n["length"])), B.bind(T.truncdiv(token, n["length"]))
                i_h, i_b = B.bind(T.truncmod(head, n["heads"])), B.bind(T.truncdiv(head, n["heads"]))

                def at(name: str, d: Expr) -> Expr:
                    strides = [n[f"{name}_{axis}"] for axis in "bhsd"]
                    return i_b * strides[0] + i_h * strides[1] + i_s * strides[2] + d * strides[3]

                def turn_pair() -> None:
                    a, b = (2 * i, 2 * i + 1) if spec["interleaved"] else (i, i + half)
                    left, right = named(p["x"][at("xs", a)]), named(p["x"][at("xs", b)])
                    c = named(p["cos"][i_b * n["cs_b"] + i_s * n["cs_s"] + i * n["cs_d"]])
                    s = named(p["sin"][i_b * n["ss_b"] + i_s * n["ss_s"] + i * n["ss_d"]])
                    B.buffer_store(p["y"], named(c * left) - named(s * right), [at("ys", a)])
                    B.buffer_store(p["y"], named(s * left) + named(c * right), [at("ys", b)])

                if not rest:
                    turn_pair()
                else:
                    with B.If(i < index(half)):
                        with B.Then():
                            turn_pair()
                        with B.Else():
                            d = B.bind(i + half)
                            B.buffer_store(p["y"], p["x"][at("xs", d)], [at("ys", d)])
    return CudaKernel(f.result, _THREADS)
