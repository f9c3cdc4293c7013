"""Two warpgroups taking turns: Gluon has no interpreter, so the generated text runs here as Python, a thread for every
group of warps, with barriers that fault where the machine's do and products that read their operands when waited for."""

from __future__ import annotations

import re
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import venturi as vt
from tests.backends.cuda.test_early import box_of, matched, product, weight
from venturi.backends.cuda.codegen.compile import MAX_SHARED
from venturi.backends.cuda.codegen.gemm import GemmConfig
from venturi.backends.cuda.codegen.pingpong import PingpongTile, conv_source, product_source, shuffled
from venturi.backends.cuda.codegen.reader import Box, conv_reader
from venturi.backends.cuda.device import OfflineDevice
from venturi.backends.cuda.tactics.conv import read_convolution
from venturi.backends.cuda.tactics.early import pixels_of
from venturi.backends.cuda.tactics.gemm import Gemm, read_linear
from venturi.backends.cuda.tactics.pingpong import PINGPONG, PingpongConv

PATIENCE = 10.0


class Fault(Exception):
    pass


class Barrier:
    """An mbarrier for one arrival. A wait returns when the phase of that parity is over, as the hardware tells it."""

    def __init__(self, world):
        self.world, self.phase, self.pending, self.bytes = world, 0, 1, 0

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
            self.phase, self.pending = self.phase + 1, 1
            self.world.notify_all()


class Ring:
    def __init__(self, shape):
        self.data = np.full(shape, np.nan, np.float32)

    def index(self, slot):
        return Slot(self.data[slot])


class Slot:
    def __init__(self, data):
        self.data = data

    def _reinterpret(self, dtype, shape, layout):
        return Slot(self.data.reshape(shape))

    def permute(self, order):
        return Slot(self.data.transpose(order))


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
    queued.queue = [*getattr(acc, "queue", []), (a, b)]
    return queued


def wait_for_products(left, deps):
    (acc,) = deps
    queue = acc.queue
    done = queue[: len(queue) - left]
    out = (np.asarray(acc) + sum((a.data @ b.data for a, b in done), np.float32(0))).view(Sums)
    out.queue = queue[len(done) :]
    return out if left else np.asarray(out)


class Memory:
    def __init__(self, data):
        self.data = data.reshape(-1)

    def __add__(self, at):
        return self, at


def load(pointer, mask, other):
    memory, at = pointer
    at, mask = np.broadcast_arrays(at, mask)
    return np.where(mask, memory.data[np.where(mask, at, 0)], other)


def store(pointer, value, mask):
    memory, at = pointer
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
        return Barriers([Barrier(world) for _ in range(shape[0])]) if shape[1:] == [1] else Ring(shape)

    for program in range(programs):
        gl = SimpleNamespace(
            allocate_shared_memory=allocate, int64=None, float32=None, static_range=range, constexpr=None,
            warp_specialize=specialize, zeros=lambda shape, *_: np.zeros(shape, np.float32),
            arange=lambda start, stop, _: np.arange(start, stop), convert_layout=lambda x, _: np.asarray(x),
            NVMMADistributedLayout=layout, BlockedLayout=layout, SliceLayout=layout, NVMMASharedLayout=layout,
            DistributedLinearLayout=layout, reshape=lambda x, shape: np.asarray(x).reshape(shape), permute=np.transpose,
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
                MBarrierLayout=layout, init=lambda b, count: None, wait=Barrier.wait, expect=Barrier.expect,
                arrive=Barrier.arrive,
            ),
        }  # fmt: skip
        exec(body, names)
        names[name](*args)


class Barriers(list):
    index = list.__getitem__


def layout(*_, **__):
    return None


def run(rows, n, k, size, programs, change=lambda text: text):
    """(what the text computes, what it should)."""
    net = vt.Network()
    x = net.input("x", (rows, k))
    net.output("y", net.relu(net.input("z", (rows, n)) + (x @ weight(k, n) + weight(n))))
    region, _ = matched(net, Gemm(OfflineDevice(90), PINGPONG))
    p = read_linear(region).product
    text = change(product_source(region, p.tile, p.element, size, n, k, 90).text)
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((rows, k), np.float32), rng.standard_normal((n, k), np.float32)
    bias, other = rng.standard_normal(n, np.float32), rng.standard_normal((rows, n), np.float32)
    out = np.full((rows, n), np.nan, np.float32)
    extra = [Memory(other if name.startswith("tile") else bias) for name in p.tile.arguments]
    stored = shuffled(torch.from_numpy(b), p.tile, size).numpy()
    views = View(a, (size.rows, 64)), View(stored, (size.columns, 64))
    simulate("gemm_pingpong", text, programs, [*views, Memory(out), *extra, rows, n, k, size.rows, size.columns])
    return out, np.maximum(a @ b.T + bias + other, 0)


def simulate(name, text, programs, args):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        execute(name, text, programs, args)
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize(
    "rows, n, k, programs",
    [(512, 256, 576, 3), (200, 136, 64, 2), (130, 72, 200, 1), (64, 64, 1024, 4), (640, 64, 128, 5)],
)
@pytest.mark.parametrize("stages, groups", [(2, 2), (3, 2), (4, 2), (2, 3), (4, 3)])
def test_the_text_computes_the_product(rows, n, k, programs, stages, groups):
    got, want = run(rows, n, k, PingpongTile(64, 64, stages, groups), programs)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "shape, k, box, attrs",
    [
        ((3, 64, 9, 7), 40, Box(2, 8, 4), dict(pads=[1, 1, 1, 1])),
        ((2, 128, 6, 10), 72, Box(1, 8, 8), dict(pads=[1, 0, 1, 2], strides=[2, 2])),
    ],
    ids=["stride 1", "stride 2"],
)
def test_the_text_computes_the_convolution(shape, k, box, attrs):
    net = vt.Network()
    w = weight(k, shape[1], 3, 3)
    net.output("y", net.relu(net.conv(net.input("x", shape), w, weight(k), **attrs)))
    region, _ = matched(net, PingpongConv(OfflineDevice(90)))
    conv, size = read_convolution(region), PingpongTile(64, 32, 3)
    g = conv.geometry
    text = conv_source(region, conv.tile, conv.element, size, g, box, 64, 90).text
    x = np.random.default_rng(2).standard_normal(shape, np.float32)
    pixels = torch.from_numpy(x).contiguous(memory_format=torch.channels_last)
    image, reader = pixels_of(pixels, g).numpy(), conv_reader(g, box, 64)
    p, q = g.output_size(*shape[2:])
    out = np.full((shape[0], p, q, k), np.nan, np.float32)
    flat = shuffled(torch.from_numpy(w.transpose(0, 2, 3, 1).reshape(k, -1)), conv.tile, size).numpy()
    args = [View(image, reader.block), View(flat, (32, 64)), Memory(out), Memory(weight(k)), shape[0], p, q, k, 64, 32]
    simulate("conv_pingpong", text, 3, args)
    pad = F.pad(torch.from_numpy(x), [g.pads[1], g.pads[3], g.pads[0], g.pads[2]])
    want = F.conv2d(pad, torch.from_numpy(w), torch.from_numpy(weight(k)), stride=g.strides).relu()
    np.testing.assert_allclose(out, want.permute(0, 2, 3, 1).numpy(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape, k", [((128, 64, 56, 56), 64), ((64, 512, 14, 14), 512), ((100, 128, 28, 28), 128)])
def test_candidates_of_convolutions_fit_the_machine(shape, k):
    net = vt.Network()
    net.output("y", net.conv(net.input("x", shape), weight(k, shape[1], 3, 3), pads=[1] * 4))
    region, found = matched(net, PingpongConv(OfflineDevice(90)))
    assert not isinstance(found, str)
    for c in found:
        assert np.prod(c["box"]) == c["rows"]
        assert max(c["box"]) <= 256, "the longest side of a box"
        assert (c["rows"] + c["columns"]) * 128 * c["stages"] + c["rows"] * c["columns"] + 1024 <= MAX_SHARED


def test_without_turns_a_barrier_faults():
    """The simulation can fail: parity alone does not keep the second warpgroup from running ahead."""

    def race(text):
        return text.replace("mbarrier.wait(turns.index(TURN), lap & 1)", "pass")

    try:
        got, want = run(512, 256, 576, PingpongTile(64, 64, 4), 3, race)
    except Fault:
        return
    assert not np.allclose(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows, n, k", [(4096, 3072, 768), (6304, 768, 768), (401408, 128, 256), ("m", 512, 512)])
def test_candidates_fit_the_machine(rows, n, k):
    region, _ = product(rows, n, k)
    found = Gemm(OfflineDevice(90), PINGPONG).match(region)
    assert found
    for c in (GemmConfig(**f) for f in found):
        assert (c.bm + c.bn) * 64 * 2 * c.stages + c.bm * c.bn + 1024 <= MAX_SHARED
        assert c.bn <= 256


def test_what_it_leaves_to_others():
    def declined(rows, n, k, arch=90):
        return Gemm(OfflineDevice(arch), PINGPONG).match(product(rows, n, k)[0])

    assert declined(128, 768, 768) == "not more tiles than multiprocessors"
    assert declined(8192, 132, 768) == "N=132 and K=768 must be multiples of 8"
    assert declined(8192, 768, 768, 100) == "written for Hopper's warpgroup products"
