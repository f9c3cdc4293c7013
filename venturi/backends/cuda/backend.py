"""The ordered tactics of a GPU. The reference is last and takes everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from venturi.backends.base import Backend, Tactic
from venturi.backends.cuda.device import KernelDevice
from venturi.backends.cuda.placement import OnDevice
from venturi.backends.cuda.rounding import no_rounding
from venturi.backends.cuda.tactics.aten_conv import AtenCudnnConv
from venturi.backends.cuda.tactics.attention import TritonAttention
from venturi.backends.cuda.tactics.back_to_back import BackToBack
from venturi.backends.cuda.tactics.branches import BranchesConv
from venturi.backends.cuda.tactics.clusters import TritonPointwise, TritonRows
from venturi.backends.cuda.tactics.conv import DepthwiseConv, ImplicitGemmConv, PixelProduct
from venturi.backends.cuda.tactics.cublaslt import CublasLtGemm
from venturi.backends.cuda.tactics.cudnn import CudnnConv
from venturi.backends.cuda.tactics.cudnn_attention import CudnnAttention
from venturi.backends.cuda.tactics.early import EARLY, EarlyConv
from venturi.backends.cuda.tactics.gemm import Gemm
from venturi.backends.cuda.tactics.pingpong import PINGPONG, PingpongConv
from venturi.backends.cuda.tactics.pool import ImageMean, WindowPool
from venturi.backends.cuda.tactics.products import POINTERS, TMA, TMA_SPLIT, VECTOR
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.backends.cuda.tactics.stem import StemConv, StemPingpong
from venturi.backends.cuda.tactics.stem_strips import StemStrips
from venturi.backends.cuda.tactics.transposed import TransposedConv
from venturi.backends.cuda.tactics.volumes import CudnnVolumes
from venturi.backends.sdpa import SdpaAttention

# The first whose tensor cores multiply e4m3.
FP8_ARCH = 89


@contextmanager
def exact() -> Iterator[None]:
    """No tf32, and no cuDNN: its transforms let a NaN reach more outputs than a convolution's definition does."""
    with no_rounding(), torch.backends.cudnn.flags(enabled=False):
        yield


def is_well(place: torch.device) -> bool:
    """Whether the process can still use the GPU: a kernel that faults ends that for good."""
    try:
        if place.type == "cuda":
            torch.cuda.synchronize(place)
    except RuntimeError:
        return False
    return True


def cuda_backend(device: KernelDevice, place: torch.device) -> Backend:
    """Tactics for kernels of `device` on tensors of `place`."""
    reference = DeviceReference()
    tactics: tuple[Tactic, ...] = (
        PixelProduct(device, EARLY),
        EarlyConv(device),
        PixelProduct(device, PINGPONG),
        PingpongConv(device),
        PixelProduct(device, TMA),
        PixelProduct(device, TMA_SPLIT),
        StemPingpong(device),
        StemStrips(device),
        StemConv(device),
        ImplicitGemmConv(device),
        BackToBack(device),
        BranchesConv(device),
        TransposedConv(device),
        CudnnConv(device),
        CudnnVolumes(),
        AtenCudnnConv(),
        DepthwiseConv(device),
        PixelProduct(device, VECTOR),
        WindowPool(device),
        ImageMean(device),
        Gemm(device, EARLY),
        CublasLtGemm(),
        Gemm(device, PINGPONG),
        Gemm(device, TMA),
        Gemm(device, TMA_SPLIT),
        Gemm(device, POINTERS),
        Gemm(device, VECTOR),
        TritonAttention(device),
        CudnnAttention(),
        SdpaAttention(reference),
        TritonPointwise(device),
        TritonRows(device),
    )
    return Backend(
        "cuda",
        (*(OnDevice(t, place) for t in tactics), reference),
        exact,
        fuses_quantized=True,
        fuses_fp8=device.arch >= FP8_ARCH,
        signed_bytes=True,
        rounds_within="anywhere",
        joins_pairs=True,
        is_well=lambda: is_well(place),
    )
