"""The device forms of `venturi.kernels`, in Triton. Imported only when a tensor is on CUDA (or by tests).

Kernels take the flag PDL: with programmatic dependent launch a kernel may start while the one before it still runs,
so it waits (gdc_wait) before it touches anything that is not a weight.
"""
