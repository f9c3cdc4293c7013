"""What generated code may assume of a CPU: vector length, registers, LLVM's names for it."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Isa:
    """`lanes` fp32 numbers a vector register, `registers` of them. `triple`, `cpu` and `features` are LLVM's.
    `rounds_bf16`: instructions make bf16 of fp32 and multiply pairs of them; `vnni`: others multiply fours of bytes;
    `tiles`: a matrix unit (AMX) multiplies both."""

    name: str
    lanes: int
    registers: int
    triple: str
    cpu: str
    features: str
    rounds_bf16: bool = False
    tiles: bool = False
    vnni: bool = False

    def unit(self, quantized: bool) -> str:
        """What multiplies bf16, or bytes: "tiles" of a matrix unit, "dots" in vector registers; empty: nothing does."""
        if self.tiles:
            return "tiles"
        return "dots" if (self.vnni if quantized else self.rounds_bf16) else ""

    @property
    def accumulators(self) -> int:
        """Registers that a kernel may hold results in: what loads and broadcasts need is left free."""
        return self.registers - 4


AVX512 = Isa("avx512", 16, 32, "x86_64-unknown-linux-gnu", "skylake-avx512", "-prefer-256-bit")
AVX2 = Isa("avx2", 8, 16, "x86_64-unknown-linux-gnu", "haswell", "")
AMX = Isa("avx512", 16, 32, AVX512.triple, "sapphirerapids", "-prefer-256-bit", rounds_bf16=True, tiles=True)
DOTS = Isa("avx512", 16, 32, AVX512.triple, "znver4", "-prefer-256-bit", rounds_bf16=True, vnni=True)
NEON = Isa("neon", 4, 32, "aarch64-unknown-linux-gnu", "neoverse-n1", "")


def _may_use_tiles() -> bool:
    """Linux lends the matrix unit's registers to processes that ask (arch_prctl, ARCH_REQ_XCOMP_PERM)."""
    try:
        return bool(ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0)
    except (OSError, AttributeError):
        return False


@functools.cache
def host() -> Isa | str:
    """The widest Isa of this machine, or why no code can be generated for it."""
    try:
        from llvmlite import binding as llvm
    except ImportError:
        return "llvmlite is not installed"
    triple = llvm.get_process_triple()
    cpu, found = llvm.get_host_cpu_name(), llvm.get_host_cpu_features()
    features = found.flatten()
    if triple.startswith("x86_64"):
        if all(found.get(f) for f in ("avx512f", "avx512vl", "avx512dq", "avx512bw")):
            tiles = found.get("amx-bf16", False) and found.get("amx-int8", False) and _may_use_tiles()
            return Isa(
                "avx512", 16, 32, triple, cpu, f"{features},-prefer-256-bit", found.get("avx512bf16", False), tiles,
                found.get("avx512vnni", False),
            )  # fmt: skip
        if found.get("avx2") and found.get("fma"):
            return Isa("avx2", 8, 16, triple, cpu, features)
        return f"{cpu} has neither AVX2 with FMA nor AVX-512"
    if triple.startswith(("aarch64", "arm64")):
        return Isa("neon", 4, 32, triple, cpu, features)
    return f"no code is generated for {triple}"
