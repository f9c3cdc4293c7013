"""The ordered tactics of the CPU: generated code first, then oneDNN and ATen. The reference is last and takes all."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from venturi.backends.base import Backend, Config, Kernel, RegionView, Tactic
from venturi.backends.cpu.codegen.isa import host
from venturi.backends.cpu.tactics.concat import JoinConcat
from venturi.backends.cpu.tactics.conv import AtenConv, OneDnnConv
from venturi.backends.cpu.tactics.gemm import AtenLinear, AtenMatMul, OneDnnLinear
from venturi.backends.cpu.tactics.pointwise import InPlaceBody, OutPointwise
from venturi.backends.cpu.tactics.reference import Reference
from venturi.backends.sdpa import SdpaAttention

NATIVE_NAMES = (
    "native-matrix-conv", "native-matrix-linear", "native-quantized", "native-quantized-depthwise", "native-dynamic",
    "native-conv", "native-winograd", "native-depthwise", "native-linear", "native-pool", "native-rows",
    "native-pointwise", "native-attention",
)  # fmt: skip


class Missing:
    """A tactic that this installation lacks: plans may name it, nothing matches it and so nothing binds it."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self._reason = name, reason

    def match(self, region: RegionView) -> list[Config] | str:
        return self._reason

    def bind(self, region: RegionView, config: Config) -> Kernel:
        raise NotImplementedError(self._reason)


@contextmanager
def _plain() -> Iterator[None]:
    """Without oneDNN, whose convolutions in bf16 spread a NaN beyond its window, and with attention spelled out: the
    tiled kernel makes other NaN of infinite scores than the definition."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of flags for devices that are not there
        with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield


def _multiplies_bytes() -> bool:
    """Whether quantized Regions have a kernel on this CPU."""
    isa = host()
    return not isinstance(isa, str) and bool(isa.unit(quantized=True))


def native_tactics() -> tuple[Tactic, ...]:
    """Tactics that generate code with LLVM."""
    try:
        import llvmlite  # noqa: F401
    except ImportError:
        return tuple(Missing(name, "llvmlite is not installed") for name in NATIVE_NAMES)
    from venturi.backends.cpu.tactics.native_attention import NativeAttention
    from venturi.backends.cpu.tactics.native_cluster import NativePointwise, NativeRows
    from venturi.backends.cpu.tactics.native_conv import NativeConv, NativeWinograd
    from venturi.backends.cpu.tactics.native_depthwise import NativeDepthwise, NativeQuantizedDepthwise
    from venturi.backends.cpu.tactics.native_dynamic import NativeDynamic
    from venturi.backends.cpu.tactics.native_linear import NativeLinear
    from venturi.backends.cpu.tactics.native_matrix import NativeMatrixConv, NativeMatrixLinear
    from venturi.backends.cpu.tactics.native_pool import NativePool
    from venturi.backends.cpu.tactics.native_quantized import NativeQuantized
    from venturi.backends.cpu.tactics.native_transposed import NativeTransposed

    return (
        NativeMatrixConv(), NativeMatrixLinear(), NativeQuantized(), NativeQuantizedDepthwise(), NativeDynamic(),
        NativeConv(), NativeWinograd(), NativeDepthwise(), NativeLinear(), NativePool(), NativeRows(),
        NativePointwise(), NativeAttention(), NativeTransposed(),
    )  # fmt: skip


CPU = Backend(
    "cpu",
    (
        *native_tactics(),
        OneDnnConv(),
        AtenConv(channels_last=True),
        AtenConv(channels_last=False),
        OneDnnLinear(),
        AtenLinear(),
        AtenMatMul(),
        SdpaAttention(Reference(), guarded=True),
        InPlaceBody(),
        OutPointwise(),
        JoinConcat(),
        Reference(),
    ),
    plain=_plain,
    fuses_quantized=_multiplies_bytes(),
    rounds_within="sums",
    fuses_dynamic=_multiplies_bytes(),
    flat_attention=True,
    packed_attention=True,
)
