"""The ordered tactics of the CPU. The reference is last and takes everything."""

from __future__ import annotations

from venturi.backends.base import Backend
from venturi.backends.cpu.tactics.concat import JoinConcat
from venturi.backends.cpu.tactics.conv import AtenConv, OneDnnConv
from venturi.backends.cpu.tactics.gemm import AtenLinear, AtenMatMul, OneDnnLinear
from venturi.backends.cpu.tactics.native_cluster import NativePointwise, NativeRows
from venturi.backends.cpu.tactics.native_conv import NativeConv, NativeWinograd
from venturi.backends.cpu.tactics.native_depthwise import NativeDepthwise
from venturi.backends.cpu.tactics.native_linear import NativeLinear
from venturi.backends.cpu.tactics.native_pool import NativePool
from venturi.backends.cpu.tactics.pointwise import InPlaceBody, OutPointwise
from venturi.backends.cpu.tactics.reference import Reference
from venturi.backends.sdpa import SdpaAttention

CPU = Backend(
    "cpu",
    (
        NativeConv(),
        NativeWinograd(),
        NativeDepthwise(),
        OneDnnConv(),
        AtenConv(channels_last=True),
        AtenConv(channels_last=False),
        NativeLinear(),
        OneDnnLinear(),
        AtenLinear(),
        AtenMatMul(),
        SdpaAttention(Reference()),
        NativePool(),
        NativeRows(),
        NativePointwise(),
        InPlaceBody(),
        OutPointwise(),
        JoinConcat(),
        Reference(),
    ),
)
