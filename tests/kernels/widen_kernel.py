"""A kernel that does nothing but widen fp8 words, for the test that all codes do so exactly."""

from __future__ import annotations

import triton
import triton.language as tl

from venturi.kernels.triton_kernels.decode_fp8 import widen


@triton.jit
def widen_all(words, out):
    at = tl.arange(0, 256)
    a, b, c, d = widen(tl.load(words + at), False)
    tl.store(out + at, a)
    tl.store(out + 256 + at, b)
    tl.store(out + 512 + at, c)
    tl.store(out + 768 + at, d)
