"""Convolutions whose lines are read once, simulated: the text of every shape computes the stem's convolution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import venturi as vt
from tests.backends.cuda.simulated import Memory, View, simulate
from tests.backends.cuda.test_early import matched, weight
from venturi.backends.cuda.codegen.compile import MAX_SHARED
from venturi.backends.cuda.codegen.strips import ACROSS, PIECE, Strip, strips_source
from venturi.backends.cuda.codegen.sums import shuffled
from venturi.backends.cuda.device import OfflineDevice
from venturi.backends.cuda.tactics.stem import blocked_weights, read_stem
from venturi.backends.cuda.tactics.stem_strips import StemStrips

STEMS = [
    ((3, 3, 37, 43), 24, 7, {"pads": [3, 3, 3, 3], "strides": [2, 2]}),
    ((2, 3, 20, 38), 32, 3, {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    ((2, 8, 21, 19), 8, 3, {"pads": [1, 0, 1, 1], "strides": [2, 2]}),
]


def stem(shape, k, r, attrs, device=None):
    net = vt.Network()
    net.output("y", net.relu(net.conv(net.input("x", shape), weight(k, shape[1], r, r), weight(k), **attrs)))
    return matched(net, StemStrips(device or OfflineDevice(90)))


def blocked(x, g):
    """The image as `codegen.stem.blocks_source` leaves it; what no tap reads is NaN."""
    images, channels, height, width = x.shape
    (s, t), (up, left) = g.source.strides, g.before
    p, q = g.source.output_size(height, width)
    bp, bq = p + g.taps[0] - 1, q + g.taps[1] - 1
    padded = np.zeros((images, channels, bp * s, bq * t), np.float32)
    h, w = min(height, bp * s - up), min(width, bq * t - left)
    padded[:, :, up : up + h, left : left + w] = x[:, :, :h, :w]
    blocks = padded.reshape(images, channels, bp, s, bq, t).transpose(0, 2, 4, 3, 5, 1)
    out = np.full((images, bp, bq, g.width), 0.0, np.float32)
    out[..., : s * t * channels] = blocks.reshape(images, bp, bq, -1)
    return out


def run(shape, k, r, attrs, strip, change=lambda text: text):
    """(what the text computes, what it should) where two pixels are not finite."""
    region, _ = stem(shape, k, r, attrs)
    conv, g = read_stem(region)
    text = change(strips_source(region, conv.tile, conv.element, strip, g, 90).text)
    x = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    x[0, 0, 0, 2], x[1, -1, -1, -1] = np.nan, np.inf
    w, bias = torch.from_numpy(weight(k, shape[1], r, r)), weight(k)
    blocks = blocked(x, g)
    images, p, q = shape[0], *g.source.output_size(*shape[2:])
    lines = np.lib.stride_tricks.as_strided(blocks, (images, p + g.taps[0] - 1, q, g.row), blocks.strides)
    flat = shuffled(blocked_weights(w, g), conv.tile, strip.columns).numpy()
    out = Memory(np.full((images, p, q, k), np.nan, np.float32))
    views = View(lines, (1, PIECE, ACROSS, g.row)), View(flat, (strip.columns, g.row))
    simulate("strips", text, 3, [*views, out, Memory(bias), images, p, q, k, strip.rows, strip.columns])
    top, left, bottom, right = attrs["pads"]
    padded = F.pad(torch.from_numpy(x), [left, right, top, bottom])
    want = F.conv2d(padded, w, torch.from_numpy(bias), stride=attrs["strides"]).relu()
    return out.data.reshape(images, p, q, k), want.permute(0, 2, 3, 1).numpy()


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("shape, k, r, attrs", STEMS, ids=str)
@pytest.mark.parametrize("strip", [Strip(8, 32, 3, 2), Strip(16, 32, 3, 3), Strip(8, 32, 5, 3)], ids=str)
def test_the_text_computes_the_stem(shape, k, r, attrs, strip):
    got, want = run(shape, k, r, attrs, strip)
    assert np.isnan(want).any()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_elements_that_no_tap_reads_must_be_cleared():
    """The simulation can fail: without the masks a NaN reaches sums whose windows end before it."""
    got, want = run(*STEMS[0], Strip(8, 32, 3, 2), lambda text: text.replace("gl.where(real", "gl.where(True | real"))
    assert np.isnan(got).sum() > np.isnan(want).sum()


def test_candidates_fit_the_machine():
    _, found = stem((128, 3, 224, 224), 64, 7, {"pads": [3] * 4, "strides": [2, 2]})
    assert not isinstance(found, str), found
    for strip in (Strip(**c) for c in found):
        assert strip.shared_bytes(4, 128) + 1024 <= MAX_SHARED
        assert strip.stages >= strip.groups, "a barrier would be two phases behind"


def test_what_it_leaves_to_others():
    attrs = {"pads": [3] * 4, "strides": [2, 2]}
    assert stem((1, 3, 32, 32), 64, 7, attrs)[1] == "not more tiles than multiprocessors"
    assert stem((64, 3, 224, 224), 200, 7, attrs)[1].startswith("200 outputs")
    assert stem((64, 3, 224, 224), 64, 7, attrs, OfflineDevice(100))[1] == "written for Hopper's warpgroup products"
    assert stem((64, 64, 56, 56), 64, 3, {"pads": [1] * 4})[1].startswith("not a strided convolution")
