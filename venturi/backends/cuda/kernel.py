"""A device kernel as data: the source it is compiled from, and the cubin that comes out."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class KernelSource:
    """Triton source text and everything else that decides the machine code.

    `text` is a module that defines the jit function `name`. `signature` lists every argument in order with its
    Triton type ("*bf16", "i32", "tensordesc<fp16[128,64]>", or "constexpr" for those in `constants`).
    `divisible` names arguments that are always multiples of 16 (pointers: 16-byte aligned). `cluster` programs along
    the grid's second axis read each other's shared memory, of which they need at least `peer_shared` bytes.
    """

    name: str
    text: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...] = ()
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    arch: int = 90
    cluster: int = 1
    peer_shared: int = 0

    @property
    def overlaps(self) -> bool:
        """Whether the kernel may start before the one in front of it has finished (it waits for it itself)."""
        return "gdc_wait()" in self.text

    @cached_property
    def key(self) -> str:
        """Identifies the machine code up to the compiler's version: 24 hex digits. Comments do not count."""
        code = re.sub(r"\s*#.*", "", self.text)
        data = asdict(self) | {"text": code}
        if self.cluster == 1:
            del data["cluster"], data["peer_shared"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:24]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> KernelSource:
        pairs = {k: tuple(tuple(p) for p in data[k]) for k in ("signature", "constants")}
        return KernelSource(**{**data, **pairs, "divisible": tuple(data["divisible"])})


@dataclass(frozen=True)
class Parameter:
    """One slot of the cubin's parameter list: kind "ptr", "i32", "i64", "fp32" or "tmap" (a TMA descriptor)."""

    name: str
    kind: str
    block: tuple[int, ...] = ()
    swizzle: int = 0
    element_type: int = 0
    element_bytes: int = 0


@dataclass(frozen=True)
class Cubin:
    """Machine code with its calling convention. `spills` is bytes of local memory a thread, `shared` bytes a block
    (those that its cluster reads included)."""

    key: str
    entry: str
    image: bytes
    num_warps: int
    shared: int
    parameters: tuple[Parameter, ...]
    overlaps: bool = False
    registers: int = 0
    spills: int = 0
    compiler: str = ""
    cluster: int = 1

    def meta(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "image"}

    @staticmethod
    def from_meta(meta: dict[str, Any], image: bytes) -> Cubin:
        parameters = tuple(Parameter(**{**p, "block": tuple(p["block"])}) for p in meta["parameters"])
        return Cubin(**{**meta, "parameters": parameters, "image": image})
