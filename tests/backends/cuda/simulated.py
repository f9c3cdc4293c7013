"""Warpgroups taking turns, without a GPU: Gluon has no interpreter, so generated text runs here as Python, a thread for
every group of warps, with barriers that fault where the machine's do and products that read their operands when waited
for."""

from __future__ import annotations

import re
import sys
import threading
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from tests.backends.cuda.test_early import box_of

PATIENCE = 10.0


class Fault(Exception):
    pass


class Barrier:
    """An mbarrier. A wait returns when the phase of that parity is over, as the hardware tells it."""

    def __init__(self, world):
        self.world, self.phase, self.count, self.pending, self.bytes = world, 0, 1, 1, 0

    def init(self, count):
        self.count = self.pending = count

    def arrive(self, count=1, pred=True):
        with self.world:
            if pred:
                if self.pending < count:
                    raise Fault("an arrival that nobody expects")
                self.pending -= count
                self._settle()

    def expect(self, size):
        with self.world:
            if self.pending < 1:
                raise Fault("an arrival that nobody expects")
            self.pending, self.bytes = self.pending - 1, self.bytes + size
            self._settle()

    def deliver(self, size):
        with self.world:
            self.bytes -= size
            self._settle()

    def wait(self, parity):
        with self.world:
            if not self.world.wait_for(lambda: self.phase & 1 != parity, PATIENCE):
                raise Fault("nobody arrives")

    def _settle(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count
            self.world.notify_all()


class Shared:
    """A view of shared memory; what it is reinterpreted as may reach beyond its own end."""

    def __init__(self, memory, start, shape, order=None):
        self.memory, self.start, self.shape, self.order = memory, start, shape, order

    @property
    def data(self):
        found = self.memory[self.start : self.start + int(np.prod(self.shape))].reshape(self.shape)
        return found if self.order is None else found.transpose(self.order)

    def index(self, i):
        return Shared(self.memory, self.start + i * int(np.prod(self.shape[1:])), self.shape[1:])

    def _reinterpret(self, dtype, shape, layout):
        return Shared(self.memory, self.start, shape)

    def permute(self, order):
        return Shared(self.memory, self.start, self.shape, order)

    def load(self, layout):
        return self.data.copy()


class Registers:
    def __init__(self, data):
        self.data = data


class View:
    """A matrix behind a tensor map."""

    def __init__(self, data, block):
        self.data, self.dtype, self.layout = data, None, None
        self.block_type = SimpleNamespace(shape=list(block), nbytes=int(np.prod(block)))


class Sums(np.ndarray):
    pass


def copy_in(view, start, barrier, slot):
    slot.data[:] = box_of(view.data, start, view.block_type.shape)
    barrier.deliver(view.block_type.nbytes)


def multiply(a, b, acc, is_async):
    queued = acc.view(Sums)
    a = Registers(a) if isinstance(a, np.ndarray) else a
    queued.queue = [*getattr(acc, "queue", []), (a, b)]
    return queued


def where(mask, x, other):
    return np.where(mask, x, other)


def wait_for_products(left, deps):
    """Of all sums among `deps`; what else is there are operands that registers hold until then."""
    assert not left or sum(isinstance(d, Sums) for d in deps) == 1
    found = tuple(_waited(left, d) if isinstance(d, Sums) else d for d in deps)
    return found if len(found) > 1 else found[0]


def _waited(left, acc):
    done = acc.queue[: len(acc.queue) - left]
    out = (np.asarray(acc) + sum((a.data @ b.data for a, b in done), np.float32(0))).view(Sums)
    out.queue = acc.queue[len(done) :]
    return out if left else np.asarray(out)


class Memory:
    def __init__(self, data):
        self.data = data.reshape(-1)

    def __add__(self, at):
        return Pointer(self, at)


class Pointer(NamedTuple):
    memory: Memory
    at: np.ndarray

    def __add__(self, more):
        return Pointer(self.memory, self.at + more)


def load(pointer, mask=True, other=0.0):
    memory, at = pointer
    at, mask = np.broadcast_arrays(at, mask)
    return np.where(mask, memory.data[np.where(mask, at, 0)], other)


def store(pointer, value, mask):
    memory, at = pointer
    at, mask = np.broadcast_arrays(at, mask)
    if not np.isnan(memory.data[at[mask]]).all():
        raise Fault("an element is written twice")
    memory.data[at[mask]] = value[mask]


def specialize(parts, warps, registers):
    faults = []

    def run(function, args):
        try:
            function(*args)
        except Exception as exc:
            faults.append(exc)

    threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    if faults:
        raise faults[0]


def execute(name, text, programs, args):
    """Run the kernel of the text for every program."""
    body = re.sub(r"\.to\([\w.]+\)", "", text[text.index("@gluon.jit") :])
    world = threading.Condition()

    def allocate(dtype, shape, layout):
        return (
            Barriers([Barrier(world) for _ in range(shape[0])])
            if shape[1:] == [1]
            else Shared(np.full(int(np.prod(shape)), np.nan, np.float32), 0, list(shape))
        )

    for program in range(programs):
        gl = SimpleNamespace(
            allocate_shared_memory=allocate, int64=None, float32=None, static_range=range, constexpr=None,
            warp_specialize=specialize, zeros=lambda shape, *_: np.zeros(shape, np.float32),
            arange=lambda start, stop, _: np.arange(start, stop), convert_layout=lambda x, _: np.asarray(x),
            NVMMADistributedLayout=layout, BlockedLayout=layout, SliceLayout=layout, NVMMASharedLayout=layout,
            DistributedLinearLayout=layout, DotOperandLayout=layout, where=where, reshape=lambda x, shape: np.asarray(x).reshape(shape), permute=np.transpose,
        )  # fmt: skip
        tl = SimpleNamespace(
            constexpr=None, float32=None, cdiv=lambda a, b: -(-a // b), minimum=min, load=load, store=store,
            maximum=lambda a, b, propagate_nan: np.maximum(a, b), PropagateNan=SimpleNamespace(ALL=None),
            program_id=lambda _, i=program: i, num_programs=lambda _: programs,
        )  # fmt: skip
        names = {
            "gl": gl, "tl": tl, "gluon": SimpleNamespace(jit=lambda f: f), "gdc_wait": int,
            "gdc_launch_dependents": int, "fence_async_shared": int, "warpgroup_mma": multiply,
            "warpgroup_mma_wait": wait_for_products,
            "tma": SimpleNamespace(async_copy_global_to_shared=copy_in),
            "mbarrier": SimpleNamespace(
                MBarrierLayout=layout, init=Barrier.init, wait=Barrier.wait, expect=Barrier.expect,
                arrive=Barrier.arrive,
            ),
        }  # fmt: skip
        exec(body, names)
        names[name](*args)


class Barriers(list):
    index = list.__getitem__


def layout(*_, **__):
    return None


def simulate(name, text, programs, args):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        execute(name, text, programs, args)
    finally:
        sys.setswitchinterval(interval)
