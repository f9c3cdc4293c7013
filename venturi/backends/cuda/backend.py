"""The ordered tactics of a GPU. The reference is last and takes everything."""

from __future__ import annotations

from venturi.backends.base import Backend
from venturi.backends.cuda.device import KernelDevice
from venturi.backends.cuda.tactics.attention import TritonAttention
from venturi.backends.cuda.tactics.clusters import TritonPointwise, TritonRows
from venturi.backends.cuda.tactics.conv import DepthwiseConv, ImplicitGemmConv, ProductConv
from venturi.backends.cuda.tactics.gemm import PointerGemm, TmaGemm
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.backends.sdpa import SdpaAttention


def cuda_backend(device: KernelDevice) -> Backend:
    reference = DeviceReference()
    return Backend(
        "cuda",
        (
            ProductConv(device),
            ImplicitGemmConv(device),
            DepthwiseConv(device),
            TmaGemm(device),
            PointerGemm(device),
            TritonAttention(device),
            SdpaAttention(reference),
            TritonPointwise(device),
            TritonRows(device),
            reference,
        ),
    )
