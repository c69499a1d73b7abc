"""The Llama shapes of models.py with random weights as GGUF files, for llama.cpp beside ours.

    python benchmarks/llama_gguf.py llama-134m --ggml INCLUDE LIBRARIES [--types q4_0] [--work FOLDER]
    python benchmarks/models.py llama-134m --llama-bench PATH --gguf FOLDER/llama-134m.*.gguf

Needs `pip install gguf`. Weights, embeddings and head are in the type that is asked for, norms float32. There
is no vocabulary but its size: llama-bench, which takes random tokens, needs no more. Prints the files.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ggml_engine import TYPES, load
from llama_shapes import POSITIONS, SEED, SHAPES, LlamaShape


def tensors(shape: LlamaShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names in GGUF, and shapes: (outputs, inputs) of a matrix."""
    kv = shape.kv_heads * (shape.width // shape.heads)
    yield "token_embd.weight", (shape.vocabulary, shape.width)
    for layer in range(shape.layers):
        for name, size in (
            ("attn_norm", (shape.width,)),
            ("attn_q", (shape.width, shape.width)),
            ("attn_k", (kv, shape.width)),
            ("attn_v", (kv, shape.width)),
            ("attn_output", (shape.width, shape.width)),
            ("ffn_norm", (shape.width,)),
            ("ffn_gate", (shape.inner, shape.width)),
            ("ffn_up", (shape.inner, shape.width)),
            ("ffn_down", (shape.width, shape.inner)),
        ):
            yield f"blk.{layer}.{name}.weight", size
    yield "output_norm.weight", (shape.width,)
    yield "output.weight", (shape.vocabulary, shape.width)


def write(shape: LlamaShape, kind: str, ggml: tuple[Path, Path], path: Path) -> None:
    import gguf

    library = load(*ggml)
    type_ = library.find_type(kind.encode())
    if type_ < 0:
        raise SystemExit(f"this ggml has no type {kind}")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(POSITIONS)
    writer.add_block_count(shape.layers)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(SEED)
    for name, size in tensors(shape):
        if len(size) == 1:
            writer.add_tensor(name, np.ones(size, np.float32))
            continue
        rows, inputs = size
        weight = rng.standard_normal(size, np.float32) * np.float32(0.02)
        packed = np.empty((rows, library.row_bytes(type_, inputs)), np.uint8)
        library.round_weight(type_, weight.ctypes.data, packed.ctypes.data, rows, inputs)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType(type_))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--types", default="nvfp4,q4_0,tq2_0", help=f"of {', '.join(TYPES)}")
    parser.add_argument("--ggml", type=Path, nargs=2, required=True, metavar=("INCLUDE", "LIBRARIES"))
    parser.add_argument("--work", type=Path, default=Path(), metavar="FOLDER")
    options = parser.parse_args(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    for kind in options.types.split(","):
        path = options.work / f"{options.shape}.{kind}.gguf"
        write(SHAPES[options.shape], kind, tuple(options.ggml), path)
        print(path)


if __name__ == "__main__":
    main()
