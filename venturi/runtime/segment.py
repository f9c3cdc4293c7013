"""Groups neighbouring generated kernels into segments: one native call that walks all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from venturi.backends.base import Operand, Routine
from venturi.runtime.executable import Call, Executable
from venturi.runtime.watch import Watch

T = torch.Tensor


@dataclass(frozen=True)
class Patch:
    """Words to set to the address of what slot `slot` holds in this run; it must lie in `layout`."""

    slot: int
    layout: torch.memory_format
    words: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Fresh:
    """A result that leaves the engine: new memory every run."""

    slot: int
    routine: Routine
    words: tuple[tuple[int, int], ...]


@dataclass
class Segment:
    """Calls `first` to `last`, both included. Belongs to one context. `lay_out(x, y)` gives y, which lies in another
    order, x's numbers."""

    first: int
    last: int
    job: Any
    patches: tuple[Patch, ...]
    fresh: tuple[Fresh, ...]
    dead: tuple[int, ...]
    lay_out: Callable[[T, T], T]
    copies: dict[Patch, T] = field(default_factory=dict)

    def run(self, env: list[Any]) -> None:
        """Read slots from `env`, do all calls, put what leaves into `env`."""
        for patch in self.patches:
            x = env[patch.slot]
            if not x.is_contiguous(memory_format=patch.layout):
                x = self._copied(patch, x)
            self._set(patch.words, x)
        for result in self.fresh:
            out = result.routine.empty()
            env[result.slot] = out
            self._set(result.words, out)
        self.job.run()
        for slot in self.dead:
            env[slot] = None

    def _copied(self, patch: Patch, x: T) -> T:
        """`x` as it must lie, in memory that the segment keeps for it."""
        home = self.copies.get(patch)
        if home is None or home.shape != x.shape:
            home = self.copies[patch] = torch.empty(x.shape, dtype=x.dtype, memory_format=patch.layout)
        return self.lay_out(x, home)

    def _set(self, words: tuple[tuple[int, int], ...], x: T) -> None:
        address = x.data_ptr()
        for step, word in words:
            self.job.words(step)[word] = address


@dataclass(frozen=True)
class Program:
    """What a run does, in order: segments, and numbers of calls that go one by one. `fixed` are slots whose tensors are
    the same in every run: arena results and views of them."""

    items: tuple[Segment | int, ...]
    fixed: Mapping[int, T]


@dataclass
class _Draft:
    """A segment being collected."""

    first: int
    last: int = -1
    steps: list[tuple[int, list[int], int]] = field(default_factory=list)
    patches: dict[tuple[int, torch.memory_format], list[tuple[int, int]]] = field(default_factory=dict)
    fresh: dict[int, Fresh] = field(default_factory=dict)
    dead: list[int] = field(default_factory=list)

    def close(self) -> Segment:
        from venturi.backends.cpu.native.interleave import lay_out
        from venturi.backends.cpu.native.walker import Job

        patches = tuple(Patch(slot, layout, tuple(words)) for (slot, layout), words in self.patches.items())
        fresh = tuple(self.fresh.values())
        return Segment(self.first, self.last, Job(self.steps), patches, fresh, tuple(self.dead), lay_out)


def arrange(executable: Executable, watch: Watch, homes: Sequence[T | None], scratch: Mapping[int, T]) -> Program:
    """`scratch[i]` is the scratch memory of call i where its routine wants some."""
    fixed: dict[int, T] = {s: x for s, x in enumerate(executable.template) if isinstance(x, T)}
    constants = set(fixed)
    items: list[Segment | int] = []
    draft: _Draft | None = None
    for i, call in enumerate(executable.calls):
        source = watch.views.get(i)
        if source is not None and source in fixed and all(s in constants or s == source for s in call.inputs):
            view = call.kernel.run(*(fixed[s] for s in call.inputs))
            if view.untyped_storage().data_ptr() == fixed[source].untyped_storage().data_ptr():
                fixed[call.outputs[0]] = view
                continue
        routine = watch.routines.get(i)
        if routine is not None and _takes(call, routine, fixed, homes[i]):
            if draft is not None and _turned(draft, call, routine):
                items.append(draft.close())
                draft = None
            draft = draft or _Draft(i)
            _append(draft, i, call, routine, fixed, homes[i], scratch.get(i))
        else:
            if draft is not None:
                items.append(draft.close())
                draft = None
            items.append(i)
        home = homes[i]
        if home is not None:
            fixed[call.outputs[0]] = home
    if draft is not None:
        items.append(draft.close())
    return Program(tuple(items), {s: x for s, x in fixed.items() if s not in constants})


def _turned(draft: _Draft, call: Call, routine: Routine) -> bool:
    """Whether the call reads a result that leaves, made in this very segment, in another order than it lies in."""
    read = zip(call.inputs, routine.layouts)
    return any(slot in draft.fresh and draft.fresh[slot].routine.layout != layout for slot, layout in read)


def _takes(call: Call, routine: Routine, fixed: Mapping[int, T], home: T | None) -> bool:
    """Whether what never moves lies as the code reads it, and the result's place is known."""
    for slot, layout in zip(call.inputs, routine.layouts):
        x = fixed.get(slot)
        if x is not None and not x.is_contiguous(memory_format=layout):
            return False
    return home is None or home.is_contiguous(memory_format=routine.layout)


def _append(
    draft: _Draft, index: int, call: Call, routine: Routine, fixed: Mapping[int, T], home: T | None,
    scratch: T | None,
) -> None:  # fmt: skip
    draft.last = index
    draft.dead += call.dead
    made = draft.fresh
    for phase in routine.phases:
        step, words = len(draft.steps), []
        for w, word in enumerate(phase.words):
            if not isinstance(word, Operand):
                words.append(word)
                continue
            place = (step, w)
            if word.is_scratch:
                assert scratch is not None
                words.append(scratch.data_ptr())
            elif word.is_out:
                words.append(0 if home is None else home.data_ptr())
                if home is None:
                    slot = call.outputs[0]
                    old = made[slot].words if slot in made else ()
                    made[slot] = Fresh(slot, routine, (*old, place))
            else:
                slot = call.inputs[word.index]
                words.append(fixed[slot].data_ptr() if slot in fixed else 0)
                if slot in made:
                    made[slot] = Fresh(slot, made[slot].routine, (*made[slot].words, place))
                elif slot not in fixed:
                    draft.patches.setdefault((slot, routine.layouts[word.index]), []).append(place)
        draft.steps.append((phase.address, words, phase.tasks))
