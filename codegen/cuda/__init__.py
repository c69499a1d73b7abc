"""Code generation for NVIDIA GPUs: KernelSpecs -> CUDA text through TVM -> cubins and PTX.

`kernels/` builds TIR functions for the operations of `qgraph.codegen.kernels`, with the same arguments;
`text.py` turns them into CUDA C++, `toolkit.py` that into machine code, `compile.py` both into the variants
of an artifact."""
