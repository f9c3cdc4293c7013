"""Runs a list of parallel loops on all threads with one call: threads walk the list together, a barrier between loops.

The walker is generated code, so that between two kernels there is no Python, only an atomic counter. It runs on the
OpenMP threads that torch's own operators use: both kinds of kernel share one pool and never fight over a core.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from venturi.backends.cpu.codegen.emit import I32, I64, PTR
from venturi.backends.cpu.codegen.isa import Isa, host
from venturi.backends.cpu.native.jit import host_jit
from venturi.backends.cpu.native.openmp import max_threads, openmp

HEADER_WORDS = 16
STEP_WORDS = 4
THREADS, STEPS, ARRIVED = 0, 1, 8
TASKS = 2
SPINS = 4000


def walker_ir(isa: Isa) -> str:
    """`kernel(job)`, run by every thread. A job is 64-bit words: threads, steps; at 8 the barrier's counter, 0 at the
    start; from 16 on, four words a step: function, arguments, tasks, unused. Threads take equal parts of a step's
    tasks, in order."""
    module = ir.Module()
    module.triple = isa.triple
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [PTR]), "kernel")
    job = function.args[0]
    thread_number = ir.Function(module, ir.FunctionType(I32, []), "omp_get_thread_num")
    entry, head, work, call, meet = (function.append_basic_block(n) for n in ("entry", "head", "work", "call", "meet"))
    done = function.append_basic_block("done")
    b = ir.IRBuilder(entry)

    def word(at: Any) -> Any:
        return b.gep(job, [I64(at) if isinstance(at, int) else at], source_etype=I64)

    threads, steps = b.load(word(THREADS), typ=I64), b.load(word(STEPS), typ=I64)
    thread = b.sext(b.call(thread_number, []), I64)
    b.branch(head)
    b.position_at_end(head)
    step = b.phi(I64)
    step.add_incoming(I64(0), entry)
    b.cbranch(b.icmp_signed("<", step, steps), work, done)
    b.position_at_end(work)
    record = b.add(b.mul(step, I64(STEP_WORDS)), I64(HEADER_WORDS))
    tasks = b.load(word(b.add(record, I64(TASKS))), typ=I64)
    begin = b.udiv(b.mul(tasks, thread), threads)
    end = b.udiv(b.mul(tasks, b.add(thread, I64(1))), threads)
    following = b.add(step, I64(1))
    target = b.mul(following, threads)
    b.cbranch(b.icmp_signed("<", begin, end), call, meet)
    b.position_at_end(call)
    kernel = b.load(word(record), typ=ir.FunctionType(ir.VoidType(), [PTR, I64, I64]).as_pointer())
    b.call(kernel, [b.load(word(b.add(record, I64(1))), typ=PTR), begin, end])
    b.branch(meet)
    b.position_at_end(meet)
    b.atomic_rmw("add", word(ARRIVED), I64(1), "acq_rel")
    step.add_incoming(following, _wait(b, isa, word(ARRIVED), target, head))
    b.position_at_end(done)
    b.ret_void()
    return str(module)


def _wait(b: Any, isa: Isa, counter: Any, target: Any, then: Any) -> Any:
    """Spin until the counter reaches `target`, after a while giving way to other threads; the block that goes on."""
    function, module, before = b.function, b.module, b.block
    spin, rest, pause, sleep = (function.append_basic_block(n) for n in ("spin", "rest", "pause", "sleep"))
    give_way = ir.Function(module, ir.FunctionType(I32, []), "sched_yield")
    b.branch(spin)
    b.position_at_end(spin)
    tries = b.phi(I64)
    tries.add_incoming(I64(0), before)
    arrived = b.load_atomic(counter, "acquire", 8, typ=I64)
    b.cbranch(b.icmp_signed(">=", arrived, target), then, rest)
    b.position_at_end(rest)
    more = b.add(tries, I64(1))
    b.cbranch(b.icmp_signed("<", more, I64(SPINS)), pause, sleep)
    for block, callee in ((pause, _pause(module, isa)), (sleep, give_way)):
        b.position_at_end(block)
        if callee is not None:
            b.call(callee, [])
        tries.add_incoming(more, block)
        b.branch(spin)
    return spin


def _pause(module: Any, isa: Isa) -> Any:
    if not isa.triple.startswith("x86_64"):
        return None
    return ir.Function(module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause")


@functools.cache
def _walker(isa: Isa) -> int:
    library = openmp()
    number = ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p).value if library else _zero_address()
    assert number is not None
    return host_jit(isa).address("walker", lambda: walker_ir(isa), {"omp_get_thread_num": number})


_zero = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)


def _zero_address() -> int:
    found = ctypes.cast(_zero, ctypes.c_void_p).value
    assert found is not None
    return found


class Job:
    """Steps that run one after the other. Not thread-safe: a job belongs to one caller.

    `steps` are (address, argument words, tasks). Argument words can be changed between runs through `words(i)`.
    """

    def __init__(self, steps: Sequence[tuple[int, list[int], int]]) -> None:
        isa = host()
        assert isinstance(isa, Isa)
        self._arguments = [(ctypes.c_int64 * max(1, len(words)))(*words) for _, words, _ in steps]
        header = [0] * HEADER_WORDS
        header[STEPS] = len(steps)
        records = [
            x
            for (address, _, tasks), a in zip(steps, self._arguments)
            for x in (address, ctypes.addressof(a), tasks, 0)
        ]
        self._block = (ctypes.c_int64 * (len(header) + len(records)))(*header, *records)
        self._address = ctypes.addressof(self._block)
        self._walk = _walker(isa)
        self._serial = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._walk)

    def words(self, step: int) -> Any:
        """The argument words of a step; assign to them to change them."""
        return self._arguments[step]

    def set_tasks(self, step: int, tasks: int) -> None:
        """How many tasks a step has from now on."""
        self._block[HEADER_WORDS + step * STEP_WORDS + TASKS] = tasks

    def run(self) -> None:
        """Do all steps. The interpreter lock is released meanwhile."""
        threads = max_threads()
        self._block[THREADS], self._block[ARRIVED] = threads, 0
        library = openmp()
        if threads == 1 or library is None:
            self._block[THREADS] = 1
            self._serial(self._address)
        else:
            library.GOMP_parallel(self._walk, self._address, threads, 0)
