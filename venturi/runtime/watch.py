"""Sees one run of an executable: who shares storage with whom, how large each result is and how it lies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from venturi.backends.base import Routine
from venturi.engine.memory_plan import Join, Lifetime
from venturi.runtime.executable import Call, Executable


@dataclass(frozen=True)
class Made:
    """A result with memory of its own: the call that made it, its type, shape, size and order in memory (None where
    it is in no known order)."""

    index: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: torch.memory_format | None
    nbytes: int

    @property
    def plain(self) -> bool:
        return self.layout == torch.contiguous_format

    def view(self, memory: torch.Tensor, offset: int) -> torch.Tensor:
        """The result inside a byte tensor."""
        flat = memory[offset : offset + self.nbytes].view(self.dtype)
        if self.plain:
            return flat.view(self.shape)
        n, c, h, w = self.shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def layout_of(x: torch.Tensor) -> torch.memory_format | None:
    """Row-major where it is that, channels last where it is only that, None where it is neither."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None


class Watch:
    """Sees one run: who shares storage with whom, and how large every result is."""

    def __init__(self, executable: Executable) -> None:
        self._executable = executable
        self._parent: dict[int, int] = {}
        self._made: dict[int, Made] = {}
        self.borrowed: set[int] = set()
        self.tensors: set[int] = set()
        self.total_bytes = 0
        self.views: dict[int, int] = {}
        self.routines: dict[int, Routine] = {}
        self._nbytes: dict[int, int] = {}

    def start(self, env: list[Any]) -> None:
        """Inputs and constants are somebody else's memory; outputs that alias them must be copied."""
        for slot, value in enumerate(env):
            if isinstance(value, torch.Tensor):
                self.borrowed.add(slot)
                self.tensors.add(slot)
                self._nbytes[slot] = value.nbytes

    def root(self, slot: int) -> int:
        while self._parent.get(slot, slot) != slot:
            slot = self._parent[slot]
        return slot

    def saw(self, index: int, call: Call, inputs: list[Any], outputs: Sequence[Any]) -> None:
        if call.kernel.parallel is not None:
            routine = call.kernel.parallel.routine(tuple(tuple(x.shape) for x in inputs))
            if routine is not None:
                self.routines[index] = routine
        for slot, value in zip(call.outputs, outputs):
            if not isinstance(value, torch.Tensor):
                continue
            self.tensors.add(slot)
            self._nbytes[slot] = value.nbytes
            pointer = value.untyped_storage().data_ptr()
            for source, given in zip(call.inputs, inputs):
                if isinstance(given, torch.Tensor) and given.untyped_storage().data_ptr() == pointer and pointer:
                    self._parent[self.root(slot)] = self.root(source)
                    if len(call.outputs) == 1:
                        self.views[index] = source
                    if source in self.borrowed:
                        self.borrowed.add(slot)
            if self.root(slot) == slot:
                self._made[slot] = Made(index, value.dtype, tuple(value.shape), layout_of(value), value.nbytes)
                self.total_bytes += value.nbytes

    def lifetimes(self) -> tuple[list[Lifetime], dict[int, Made]]:
        """Results that may live in the arena, keyed by call index."""
        ends: dict[int, int] = {}
        for slot, last in self._executable.last_use.items():
            root = self.root(slot)
            ends[root] = max(ends.get(root, 0), last)
        leaving = {self.root(s) for s in self._executable.outputs}
        found, kinds = [], {}
        for slot, made in self._made.items():
            call = self._executable.calls[made.index]
            if (
                call.kernel.run_out is None
                or not call.stable
                or slot in leaving
                or made.layout is None
                or not made.nbytes
            ):
                continue
            found.append(Lifetime(made.index, made.nbytes, made.index, ends.get(slot, made.index)))
            kinds[made.index] = made
        return found, kinds

    def joins(self, kinds: Mapping[int, Made]) -> list[Join]:
        """Outputs that can hold arena results inside them, one piece of memory each; a result joins one output only."""
        maker = {call.outputs[0]: i for i, call in enumerate(self._executable.calls) if i in kinds}
        found, taken = [], set[int]()
        for i, call in enumerate(self._executable.calls):
            axis = call.kernel.joins
            if axis is None or i not in kinds or math.prod(kinds[i].shape[:axis]) != 1 or not kinds[i].plain:
                continue
            parts, offset = [], 0
            for slot in call.inputs:
                made = maker.get(slot)
                free = made is not None and made not in taken and kinds[made].plain
                if made is not None and free and self._executable.calls[made].kernel.joins is None:
                    parts.append((made, offset))
                    taken.add(made)
                offset += self._nbytes[slot]
            found.append(Join(i, tuple(parts)))
        return found
