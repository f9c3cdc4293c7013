"""Plain functions from tensors to tensors, shared by the language models' layers. No graph, no model is known here.

Each file holds the function that callers use and its torch form, which is also the reference; on CUDA the function
launches the Triton kernel of `triton_kernels/` of the same name.
"""
