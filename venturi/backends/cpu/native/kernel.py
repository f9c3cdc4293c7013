"""A generated kernel as data, and as something to call with tensors."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from venturi.backends.base import Kernel, Operand, Routine
from venturi.backends.cpu.native.interleave import laid_out
from venturi.backends.cpu.native.walker import Job

T = torch.Tensor
Shapes = tuple[tuple[int, ...], ...]
MAX_SHAPES = 64


class NativeKernel:
    """Thread-safe. `plan` gives the routine for input shapes, or None where `other` must serve (empty tensors, sizes
    that the code cannot take). Inputs that do not lie as the routine reads them are copied. `keep` is memory that
    routines read."""

    def __init__(self, plan: Callable[[Shapes], Routine | None], other: Callable[..., Any], keep: Any = None) -> None:
        self._plan, self._other, self._keep = plan, other, keep
        self._routines: OrderedDict[Shapes, Routine | None] = OrderedDict()
        self._lock = threading.Lock()
        self._jobs: dict[int, tuple[Routine, Job]] = {}

    def as_kernel(self) -> Kernel:
        return Kernel(self.run, self.run_out, parallel=self)

    def routine(self, shapes: Shapes) -> Routine | None:
        """Compiled at first use of these shapes."""
        with self._lock:
            if shapes not in self._routines:
                self._routines[shapes] = self._plan(shapes)
                while len(self._routines) > MAX_SHAPES:
                    self._jobs.pop(id(self._routines.popitem(last=False)[1]), None)
            return self._routines[shapes]

    def run(self, *inputs: T) -> Any:
        routine = self.routine(tuple(tuple(x.shape) for x in inputs))
        if routine is None:
            return self._other(*inputs)
        return self._execute(routine, inputs, routine.empty())

    def run_out(self, *inputs: T, out: T) -> None:
        routine = self.routine(tuple(tuple(x.shape) for x in inputs))
        if routine is None or not out.is_contiguous(memory_format=routine.layout):
            out.copy_(self.run(*inputs))
        else:
            self._execute(routine, inputs, out)

    def prepared(self, inputs: Sequence[T]) -> Callable[[], object] | None:
        routine = self.routine(tuple(tuple(x.shape) for x in inputs))
        if routine is None or any(not x.is_contiguous(memory_format=f) for x, f in zip(inputs, routine.layouts)):
            return None
        out = routine.empty()
        scratch = torch.empty(routine.scratch, dtype=torch.uint8)
        addresses = [*(x.data_ptr() for x in inputs), scratch.data_ptr(), out.data_ptr()]
        steps = [
            (p.address, [addresses[w.index] if isinstance(w, Operand) else w for w in p.words], p.tasks)
            for p in routine.phases
        ]
        job = Job(steps)

        def call(held: object = (inputs, out, scratch)) -> None:
            job.run()

        return call

    def _execute(self, routine: Routine, inputs: Sequence[T], out: T) -> T:
        placed = [laid_out(x, f) for x, f in zip(inputs, routine.layouts)]
        scratch = torch.empty(routine.scratch, dtype=torch.uint8)
        addresses = [*(x.data_ptr() for x in placed), scratch.data_ptr(), out.data_ptr()]
        _, job = self._jobs.pop(id(routine), (routine, None))
        job = job or Job(
            [(p.address, [w if isinstance(w, int) else 0 for w in p.words], p.tasks) for p in routine.phases]
        )
        for i, phase in enumerate(routine.phases):
            words = job.words(i)
            for at, word in enumerate(phase.words):
                if isinstance(word, Operand):
                    words[at] = addresses[word.index]
        job.run()
        self._jobs[id(routine)] = (routine, job)
        return out
