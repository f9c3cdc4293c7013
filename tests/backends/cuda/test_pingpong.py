"""Two warpgroups taking turns, simulated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import venturi as vt
from tests.backends.cuda.simulated import Fault, Memory, View, simulate
from tests.backends.cuda.test_early import matched, product, weight
from venturi.backends.cuda.codegen.compile import MAX_SHARED
from venturi.backends.cuda.codegen.pingpong import PingpongTile, conv_source, product_source
from venturi.backends.cuda.codegen.reader import Box, conv_reader
from venturi.backends.cuda.codegen.sums import shuffled
from venturi.backends.cuda.device import OfflineDevice
from venturi.backends.cuda.tactics.conv import read_convolution
from venturi.backends.cuda.tactics.early import pixels_of
from venturi.backends.cuda.tactics.gemm import Gemm, read_linear
from venturi.backends.cuda.tactics.pingpong import PINGPONG, PingpongConv, num_programs


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
    tiles, skip = ([Memory(other)], []) if not size.ahead else ([], [View(other, (size.rows, size.columns))])
    extra = [Memory(bias) for _ in p.tile.columns] + tiles
    stored = shuffled(torch.from_numpy(b), p.tile, size.columns).numpy()
    views = View(a, (size.rows, 64)), View(stored, (size.columns, 64))
    simulate("gemm_pingpong", text, programs, [*views, *skip, Memory(out), *extra, rows, n, k, size.rows, size.columns])
    return out, np.maximum(a @ b.T + bias + other, 0)


@pytest.mark.parametrize(
    "rows, n, k, programs",
    [(512, 256, 576, 3), (200, 136, 64, 2), (130, 72, 200, 1), (64, 64, 1024, 4), (640, 64, 128, 5)],
)
@pytest.mark.parametrize("stages, groups", [(2, 2), (3, 2), (4, 2), (2, 3), (4, 3)])
def test_the_text_computes_the_product(rows, n, k, programs, stages, groups):
    got, want = run(rows, n, k, PingpongTile(64, 64, stages, groups), programs)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows, n, k, programs", [(512, 256, 576, 4), (200, 136, 64, 3), (640, 64, 128, 5)])
@pytest.mark.parametrize("stages, groups, ahead", [(3, 2, 3), (4, 2, 5), (3, 3, 4), (4, 2, 0)])
@pytest.mark.parametrize("stays", [False, True])
def test_residuals_are_requested_ahead_and_weights_stay(rows, n, k, programs, stages, groups, ahead, stays):
    got, want = run(rows, n, k, PingpongTile(64, 64, stages, groups, ahead, stays), programs)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_programs_keep_to_the_weights_that_stay():
    """Two programs of four tiles of columns would multiply by those of others."""
    assert num_programs(PingpongTile(64, 64, 4, stays=True), 1000, 256, 132) == 132
    assert num_programs(PingpongTile(64, 64, 4, stays=True), 1000, 512, 132) == 128
    assert num_programs(PingpongTile(64, 64, 4, stays=True), 40, 512, 132) == 40
    assert num_programs(PingpongTile(64, 64, 4), 1000, 512, 132) == 132
    with pytest.raises(Fault, match="written twice"):
        run(512, 256, 128, PingpongTile(64, 64, 4, stays=True), 2)


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
    flat = shuffled(torch.from_numpy(w.transpose(0, 2, 3, 1).reshape(k, -1)), conv.tile, size.columns).numpy()
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
        assert shared_bytes(c, c["step"] * 2, shape[1] * 9 // c["step"]) <= MAX_SHARED


def shared_bytes(c, row, count):
    """Of halves: steps of `row` bytes, `count` of which are all weights."""
    weights = count if c["stays"] else c["stages"]
    residuals = 2 * c["rows"] * c["columns"] * c["ahead"]
    return (c["rows"] * c["stages"] + c["columns"] * weights) * row + residuals + 1024


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
    for c in found:
        assert shared_bytes(c, 128, -(-k // 64)) <= MAX_SHARED
        assert c["columns"] <= 256


def test_what_it_leaves_to_others():
    def declined(rows, n, k, arch=90):
        return Gemm(OfflineDevice(arch), PINGPONG).match(product(rows, n, k)[0])

    assert declined(128, 768, 768) == "not more tiles than multiprocessors"
    assert declined(8192, 132, 768) == "N=132 and K=768 must be multiples of 8 and 8"
    assert declined(8192, 768, 768, 100) == "written for Hopper's warpgroup products"
