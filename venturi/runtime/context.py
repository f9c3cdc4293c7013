"""All state of one caller: bound shapes, the arena, the profiler. One context serves one thread at a time."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from venturi.backends.cpu.native.memory import empty_bytes
from venturi.backends.cpu.native.openmp import team_of
from venturi.backends.reference.program import OPERATOR_ERRORS
from venturi.core.errors import RequestError, VenturiError
from venturi.engine.memory_plan import Lifetime, join_lifetimes, plan_memory
from venturi.runtime.executable import Call, Executable
from venturi.runtime.held import Held, hold_on_host
from venturi.runtime.profiler import Profiler
from venturi.runtime.segment import Program, arrange
from venturi.runtime.watch import Watch

MAX_BINDINGS = 16


@dataclass(frozen=True)
class Binding:
    """What is fixed once the input shapes are: where arena results go, which outputs must be copied out.

    `homes[i]` is the arena view that call i writes, or None when the library allocates. `program` is what a run does.
    """

    homes: tuple[torch.Tensor | None, ...]
    program: Program
    copies: tuple[bool, ...]
    arena_bytes: int
    library_bytes: int


class Context:
    """Not thread-safe by itself; contexts of one engine share weights and run side by side, each on at most `threads`
    threads."""

    def __init__(self, executable: Executable, threads: int) -> None:
        self._executable, self._threads = executable, threads
        self._bindings: OrderedDict[tuple[Any, ...], Binding] = OrderedDict()
        self._arena: torch.Tensor | None = None
        self.profiler: Profiler | None = None

    def run(self, args: Sequence[Any]) -> list[Any]:
        """Stored inputs in, stored outputs out. The first run of a set of shapes binds them (allocates the arena);
        later ones allocate only what libraries insist on. Raises RequestError naming the failing step."""
        with torch.inference_mode(), team_of(self._threads):
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

    def hold(self, args: Sequence[Any]) -> Held:
        """Copies of `args`, and outputs, at fixed places. Raises RequestError."""
        return hold_on_host(self.run, args)

    def _environment(self, args: Sequence[Any]) -> list[Any]:
        env = list(self._executable.template)
        for slot, arg in zip(self._executable.inputs, args):
            env[slot] = arg
        return env

    def _replay(self, args: Sequence[Any], binding: Binding) -> list[Any]:
        env = self._environment(args)
        for slot, tensor in binding.program.fixed.items():
            env[slot] = tensor
        calls, homes = self._executable.calls, binding.homes
        call = None
        try:
            for item in binding.program.items:
                if not isinstance(item, int):
                    item.run(env)
                    continue
                call, home = calls[item], homes[item]
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
        watch = Watch(self._executable)
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

    def _lay_out(self, watch: Watch) -> Binding:
        alone, kinds = watch.lifetimes()
        lifetimes, inside = join_lifetimes(alone, watch.joins(kinds))
        own = [Lifetime(-1 - i, r.scratch, i, i) for i, r in watch.routines.items() if r.scratch]
        plan = plan_memory([*lifetimes, *own])
        if self._arena is None or self._arena.numel() < plan.total:
            self._arena = empty_bytes(plan.total)
            self._bindings.clear()
        homes: list[torch.Tensor | None] = [None] * len(self._executable.calls)
        for item in alone:
            holder, offset = inside.get(item.key, (item.key, 0))
            homes[item.key] = kinds[item.key].view(self._arena, plan.offsets[holder] + offset)
        placed = {self._executable.calls[item.key].outputs[0] for item in alone}
        copies = tuple(
            slot in watch.tensors and (slot in watch.borrowed or watch.root(slot) in {watch.root(p) for p in placed})
            for slot in self._executable.outputs
        )
        scratch = {-1 - x.key: self._arena[plan.offsets[x.key] : plan.offsets[x.key] + x.size] for x in own}
        program = arrange(self._executable, watch, homes, scratch)
        return Binding(tuple(homes), program, copies, plan.total, watch.total_bytes - sum(x.size for x in alone))


def place(call: Call | None) -> str:
    return "" if call is None else f"step {call.step.name!r} ({'+'.join(call.step.ops)}, {call.step.tactic})"


def failure(call: Call | None, exc: BaseException) -> RequestError:
    text = str(exc).splitlines()[0] if str(exc) else ""
    return RequestError(f"{type(exc).__name__}: {text}", where=place(call))
