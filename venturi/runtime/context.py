"""All state of one caller: bound shapes, the arena, the profiler. One context serves one thread at a time."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from venturi.backends.reference.program import OPERATOR_ERRORS
from venturi.core.errors import RequestError, VenturiError
from venturi.engine.memory_plan import Join, Lifetime, join_lifetimes, plan_memory
from venturi.runtime.executable import Call, Executable
from venturi.runtime.profiler import Profiler

MAX_BINDINGS = 16


@dataclass(frozen=True)
class Binding:
    """What is fixed once the input shapes are: where arena results go, which outputs must be copied out.

    `homes[i]` is the arena view that call i writes, or None when the library allocates.
    """

    homes: tuple[torch.Tensor | None, ...]
    copies: tuple[bool, ...]
    arena_bytes: int
    library_bytes: int


class Context:
    """Not thread-safe by itself; contexts of one engine share weights and run side by side."""

    def __init__(self, executable: Executable) -> None:
        self._executable = executable
        self._bindings: OrderedDict[tuple[Any, ...], Binding] = OrderedDict()
        self._arena: torch.Tensor | None = None
        self.profiler: Profiler | None = None

    def run(self, args: Sequence[Any]) -> list[Any]:
        """Stored inputs in, stored outputs out. The first run of a set of shapes binds them (allocates the arena);
        later ones allocate only what libraries insist on. Raises RequestError naming the failing step."""
        with torch.inference_mode():
            key = tuple(tuple(a.shape) if isinstance(a, torch.Tensor | np.ndarray) else None for a in args)
            binding = self._bindings.get(key)
            if binding is None:
                return self._bind(key, args)
            self._bindings.move_to_end(key)
            if self.profiler is not None:
                return self._profiled(args, binding)
            return self._replay(args, binding)

    @property
    def arena_bytes(self) -> int:
        return 0 if self._arena is None else self._arena.numel()

    def binding_of(self, args: Sequence[Any]) -> Binding | None:
        return self._bindings.get(tuple(tuple(a.shape) if hasattr(a, "shape") else None for a in args))

    def _environment(self, args: Sequence[Any]) -> list[Any]:
        env = list(self._executable.template)
        for slot, arg in zip(self._executable.inputs, args):
            env[slot] = arg
        return env

    def _replay(self, args: Sequence[Any], binding: Binding) -> list[Any]:
        env = self._environment(args)
        call = None
        try:
            for call, home in zip(self._executable.calls, binding.homes):
                inputs = [env[i] for i in call.inputs]
                if home is not None:
                    call.kernel.run_out(*inputs, out=home)  # type: ignore[misc]
                    env[call.outputs[0]] = home
                else:
                    result = call.kernel.run(*inputs)
                    if isinstance(result, tuple):
                        for slot, value in zip(call.outputs, result):
                            env[slot] = value
                    else:
                        env[call.outputs[0]] = result
                for slot in call.dead:
                    env[slot] = None
        except OPERATOR_ERRORS as exc:
            raise failure(call, exc) from exc
        except VenturiError as exc:
            exc.where = exc.where or place(call)
            raise
        return [
            env[slot].clone() if copy else env[slot] for slot, copy in zip(self._executable.outputs, binding.copies)
        ]

    def _profiled(self, args: Sequence[Any], binding: Binding) -> list[Any]:
        assert self.profiler is not None
        env = self._environment(args)
        for i, (call, home) in enumerate(zip(self._executable.calls, binding.homes)):
            inputs = [env[j] for j in call.inputs]
            start = time.perf_counter()
            if home is not None:
                call.kernel.run_out(*inputs, out=home)  # type: ignore[misc]
                result: Any = home
            else:
                result = call.kernel.run(*inputs)
            self.profiler.add(i, (time.perf_counter() - start) * 1e6)
            for slot, value in zip(call.outputs, result if isinstance(result, tuple) else (result,)):
                env[slot] = value
            for slot in call.dead:
                env[slot] = None
        self.profiler.runs += 1
        return [
            env[slot].clone() if copy else env[slot] for slot, copy in zip(self._executable.outputs, binding.copies)
        ]

    def _bind(self, key: tuple[Any, ...], args: Sequence[Any]) -> list[Any]:
        """Run once, watching shapes and aliases, then lay out the arena for these shapes."""
        watch = _Watch(self._executable)
        env = self._environment(args)
        watch.start(env)
        call = None
        try:
            for i, call in enumerate(self._executable.calls):
                inputs = [env[j] for j in call.inputs]
                result = call.kernel.run(*inputs)
                outputs = result if isinstance(result, tuple) else (result,)
                for slot, value in zip(call.outputs, outputs):
                    env[slot] = value
                watch.saw(i, call, inputs, outputs)
                for slot in call.dead:
                    env[slot] = None
        except OPERATOR_ERRORS as exc:
            raise failure(call, exc) from exc
        except VenturiError as exc:
            exc.where = exc.where or place(call)
            raise
        self._bindings[key] = self._lay_out(watch)
        while len(self._bindings) > MAX_BINDINGS:
            self._bindings.popitem(last=False)
        return [
            env[slot].clone() if slot in watch.borrowed and isinstance(env[slot], torch.Tensor) else env[slot]
            for slot in self._executable.outputs
        ]

    def _lay_out(self, watch: _Watch) -> Binding:
        alone, kinds = watch.lifetimes()
        lifetimes, inside = join_lifetimes(alone, watch.joins(kinds))
        plan = plan_memory(lifetimes)
        if self._arena is None or self._arena.numel() < plan.total:
            self._arena = torch.empty(plan.total, dtype=torch.uint8)
            self._bindings.clear()
        homes: list[torch.Tensor | None] = [None] * len(self._executable.calls)
        for item in alone:
            dtype, shape = kinds[item.key]
            holder, offset = inside.get(item.key, (item.key, 0))
            at = plan.offsets[holder] + offset
            homes[item.key] = self._arena[at : at + item.size].view(dtype).view(shape)
        placed = {self._executable.calls[item.key].outputs[0] for item in alone}
        copies = tuple(
            slot in watch.tensors and (slot in watch.borrowed or watch.root(slot) in {watch.root(p) for p in placed})
            for slot in self._executable.outputs
        )
        return Binding(tuple(homes), copies, plan.total, watch.total_bytes - sum(x.size for x in alone))


@dataclass(frozen=True)
class _Made:
    """A result with memory of its own: the call that made it, and its type, shape and size."""

    index: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    contiguous: bool
    nbytes: int


class _Watch:
    """Sees one run: who shares storage with whom, and how large every result is."""

    def __init__(self, executable: Executable) -> None:
        self._executable = executable
        self._parent: dict[int, int] = {}
        self._made: dict[int, _Made] = {}
        self.borrowed: set[int] = set()
        self.tensors: set[int] = set()
        self.total_bytes = 0
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
        for slot, value in zip(call.outputs, outputs):
            if not isinstance(value, torch.Tensor):
                continue
            self.tensors.add(slot)
            self._nbytes[slot] = value.nbytes
            pointer = value.untyped_storage().data_ptr()
            for source, given in zip(call.inputs, inputs):
                if isinstance(given, torch.Tensor) and given.untyped_storage().data_ptr() == pointer and pointer:
                    self._parent[self.root(slot)] = self.root(source)
                    if source in self.borrowed:
                        self.borrowed.add(slot)
            if self.root(slot) == slot:
                self._made[slot] = _Made(index, value.dtype, tuple(value.shape), value.is_contiguous(), value.nbytes)
                self.total_bytes += value.nbytes

    def lifetimes(self) -> tuple[list[Lifetime], dict[int, tuple[torch.dtype, tuple[int, ...]]]]:
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
                or not made.contiguous
                or not made.nbytes
            ):
                continue
            found.append(Lifetime(made.index, made.nbytes, made.index, ends.get(slot, made.index)))
            kinds[made.index] = (made.dtype, made.shape)
        return found, kinds

    def joins(self, kinds: Mapping[int, tuple[torch.dtype, tuple[int, ...]]]) -> list[Join]:
        """Outputs that can hold arena results inside them, one piece of memory each; a result joins one output only."""
        maker = {call.outputs[0]: i for i, call in enumerate(self._executable.calls) if i in kinds}
        found, taken = [], set[int]()
        for i, call in enumerate(self._executable.calls):
            axis = call.kernel.joins
            if axis is None or i not in kinds or math.prod(kinds[i][1][:axis]) != 1:
                continue
            parts, offset = [], 0
            for slot in call.inputs:
                made = maker.get(slot)
                if made is not None and made not in taken and self._executable.calls[made].kernel.joins is None:
                    parts.append((made, offset))
                    taken.add(made)
                offset += self._nbytes[slot]
            found.append(Join(i, tuple(parts)))
        return found


def place(call: Call | None) -> str:
    return "" if call is None else f"step {call.step.name!r} ({'+'.join(call.step.ops)}, {call.step.tactic})"


def failure(call: Call | None, exc: BaseException) -> RequestError:
    text = str(exc).splitlines()[0] if str(exc) else ""
    return RequestError(f"{type(exc).__name__}: {text}", where=place(call))
