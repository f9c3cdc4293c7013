"""Kernels with all operands in flight: Gluon has no interpreter, so the index arithmetic of the generated text is run
here as Python, every candidate is checked against the machine's limits, and the machine code on a GPU (tests/gpu)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import venturi as vt
from tests.passes.harness import optimize
from venturi.backends.base import RegionView
from venturi.backends.cuda.codegen.compile import MAX_SHARED
from venturi.backends.cuda.codegen.conv import ConvGeometry
from venturi.backends.cuda.codegen.early import ACCESS, EarlyConfig
from venturi.backends.cuda.codegen.element import Element
from venturi.backends.cuda.codegen.reader import Box, conv_reader
from venturi.backends.cuda.device import OfflineDevice
from venturi.backends.cuda.store import KernelStore
from venturi.backends.cuda.tactics.early import EARLY, EarlyConv, step_bytes
from venturi.backends.cuda.tactics.gemm import Gemm
from venturi.engine.builder import stored_weights
from venturi.ir.dtypes import DT

STEP = 64
HALF = Element(DT.FLOAT16)


def weight(*shape):
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def matched(net, tactic):
    """(region, candidates or the reason) of the only Region with an anchor."""
    model = optimize(net, "fp16")
    regions = [RegionView(n, stored_weights(model.graph)) for n in model.graph]
    (region,) = [r for r in regions if r.anchor.op_type in ("Conv", "MatMul", "Gemm")]
    return region, tactic.match(region)


def product(rows, n, k):
    net = vt.Network()
    net.output("y", net.relu(net.input("x", (rows, k)) @ weight(k, n) + weight(n)))
    return matched(net, Gemm(OfflineDevice(90), EARLY))


def convolution(size, c, k, r, arch=90, **attrs):
    net = vt.Network()
    x = net.input("x", (size[0], c, *size[1:]))
    net.output("y", net.relu(net.conv(x, weight(k, c // attrs.get("group", 1), r, r), weight(k), **attrs)))
    return matched(net, EarlyConv(OfflineDevice(arch)))


GEOMETRIES = [
    ((2, 9, 7), ConvGeometry(64, 8, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1), (1, 8, 8)),
    ((5, 7, 7), ConvGeometry(128, 8, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1), (2, 8, 8)),
    ((3, 8, 10), ConvGeometry(64, 8, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1), (4, 4, 4)),
    ((1, 12, 12), ConvGeometry(64, 8, (3, 3), (1, 1), (2, 0, 1, 3), (2, 1), 1), (1, 4, 16)),
    ((2, 6, 6), ConvGeometry(128, 8, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 1), (1, 4, 16)),
    ((1, 10, 6), ConvGeometry(64, 8, (5, 2), (2, 2), (2, 1, 1, 0), (1, 3), 1), (1, 16, 4)),
]


@pytest.mark.parametrize("size, g, box", GEOMETRIES, ids=lambda v: str(v)[:60])
def test_boxes_and_addresses_make_a_convolution(size, g, box):
    """The text's own lines, run for every tile and step; reads outside the view are zero, as the hardware's are."""
    rng = np.random.default_rng(1)
    images, height, width = size
    x = rng.standard_normal((images, height, width, g.channels)).astype(np.float32)
    w = rng.standard_normal((g.outputs, g.kernel[0] * g.kernel[1] * g.channels)).astype(np.float32)
    view = x if g.strides == (1, 1) else x.reshape(images, height // 2, 2, width // 2, 2 * g.channels)
    rows = box[0] * box[1] * box[2]
    reader = conv_reader(g, Box(*box), STEP)
    p, q = g.output_size(height, width)
    out = np.full((images * p * q, g.outputs), np.nan, np.float32)
    names = {"tl": _Triton, "images": images, "P": p, "Q": q, "N": g.outputs, "n": np.arange(g.outputs)}
    for pm in range(eval(reader.tiles, names)):
        run = names | {"pm": pm, "m": np.arange(rows)}
        exec("\n".join(reader.locate), run)
        sums = np.zeros((rows, g.outputs), np.float32)
        for k in range(eval(reader.steps, names)):
            run["k"] = k
            exec("\n".join(reader.step_lines), run)
            tile = box_of(view, eval(reader.coordinates, run), reader.block).reshape(rows, STEP)
            sums += tile @ w[:, k * STEP : (k + 1) * STEP].T
        exec("\n".join(reader.address).replace(".to(tl.int64)", ""), run)
        at, mask = np.broadcast_arrays(run["at"], eval(reader.mask(3), run))
        assert np.isnan(out.reshape(-1)[at[mask]]).all(), "an element is written twice"
        out.reshape(-1)[at[mask]] = sums[mask]
    top, left, bottom, right = g.pads
    padded = F.pad(torch.from_numpy(x).permute(0, 3, 1, 2), [left, right, top, bottom])
    taps = torch.from_numpy(w).reshape(g.outputs, *g.kernel, g.channels).permute(0, 3, 1, 2)
    want = F.conv2d(padded.double(), taps.double(), stride=g.strides, dilation=g.dilations).permute(0, 2, 3, 1)
    np.testing.assert_allclose(out, want.reshape(out.shape).numpy(), rtol=1e-4, atol=1e-3)


class _Triton:
    @staticmethod
    def cdiv(a, b):
        return -(-a // b)


def box_of(view, start, block):
    """The block of `view` that begins at `start`; zeros outside."""
    out = np.zeros(block, np.float32)
    source = [slice(max(s, 0), min(s + b, n)) for s, b, n in zip(start, block, view.shape)]
    if all(s.start < s.stop for s in source):
        target = [slice(r.start - s, r.stop - s) for r, s in zip(source, start)]
        out[tuple(target)] = view[tuple(source)]
    return out


@pytest.mark.parametrize(
    "rows, n, k", [(128, 768, 3072), (16, 8, 8), (1000, 40, 200), (25088, 64, 64), (49, 2048, 512)]
)
def test_candidates_of_products_fit_the_machine(rows, n, k):
    _, found = product(rows, n, k)
    assert found
    for c in (EarlyConfig(**f) for f in found):
        check_limits(c, -(-k // STEP))


@pytest.mark.parametrize("size, c, k", [((1, 14, 14), 256, 256), ((8, 7, 7), 512, 512), ((1, 5, 3), 64, 8)])
def test_candidates_of_convolutions_fit_the_machine(size, c, k):
    _, found = convolution(size, c, k, 3, pads=[1, 1, 1, 1])
    assert found
    for config in (EarlyConfig(**f) for f in found):
        assert config.images * config.height * config.width == config.bm
        assert max(config.height, config.images) <= 256, "the longest side of a box"
        check_limits(config, 9 * c // STEP)


def check_limits(c, steps):
    share = -(-steps // c.split)
    assert -(-steps // share) == c.split, "a program without steps"
    assert 1 <= c.depth <= share
    assert c.depth >= min(2, share), "a ring of one slot waits for itself"
    assert c.shared_bytes(HALF) <= MAX_SHARED
    assert c.shared_bytes(HALF) >= c.depth * step_bytes(c, HALF) + 1024
    assert c.rows * c.split == c.bm
    assert c.rows * c.bn >= 32 * c.warps * ACCESS[c.split > 1], "threads without elements of their own"
    assert c.split <= 8, "the largest portable cluster"


def test_what_they_leave_to_others():
    assert "more than 16 programs" in product(1 << 20, 256, 64)[1]
    assert "more than 16 programs" in convolution((512, 56, 56), 64, 64, 3, pads=[1, 1, 1, 1])[1]
    assert product(128, 12, 64)[1] == "N=12 and K=64 must be multiples of 8 and 8"
    assert product("n", 64, 64)[1] == "the number of rows is not fixed"
    assert product(4, 64, 64)[1] == "4 rows"
    assert "strides" in convolution((1, 9, 9), 64, 64, 3, strides=[3, 3])[1]
    assert "odd" in convolution((1, 9, 9), 64, 64, 3, strides=[2, 2])[1]
    assert "taps" in convolution((1, 9, 9), 24, 64, 3)[1].replace("tap ", "taps ")
    assert "one tap" in convolution((1, 9, 9), 128, 64, 3, group=2)[1]
    assert "Hopper" in convolution((1, 9, 9), 64, 64, 3, arch=100)[1]


@pytest.mark.parametrize("m, n, k", [(128, 768, 3072), (128, 2304, 768), (64, 512, 2048)])
def test_sums_that_programs_leave_do_not_touch_barriers(m, n, k, tmp_path):
    """In the machine's text: barriers lie behind the ring, sums within it or behind the barriers."""
    region, found = product(m, n, k)
    shared = [c for c in (EarlyConfig(**f) for f in found) if c.split > 1]
    assert shared
    for c in shared[:2]:
        (source,) = Gemm(OfflineDevice(90), EARLY).sources(region, asdict(c))
        barriers = [int(b) for b in barrier_offsets(source, tmp_path)]
        start, end = c.peer_start(HALF), c.peer_start(HALF) + c.peer_bytes
        assert len(barriers) == c.depth
        assert not any(start <= b + byte < end for b in barriers for byte in (0, 7)), (barriers, start, end)
        assert KernelStore(folder=tmp_path).get(source).shared >= max(end, max(barriers) + 8)


LOWER = """
import json, sys
from pathlib import Path
from venturi.backends.cuda.codegen.compile import lower
from venturi.backends.cuda.kernel import KernelSource
print(lower(KernelSource.from_json(json.load(sys.stdin)), Path(sys.argv[1])).asm["ptx"])
"""


def barrier_offsets(source, folder):
    """Of every mbarrier.init, in bytes from the start of a program's shared memory."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", LOWER, str(folder)]
    given = json.dumps(source.to_json())
    text = subprocess.run(command, input=given, env=environment, capture_output=True, text=True, check=True).stdout
    adds = re.findall(r"(?:add\.s32|mov\.(?:b32|u32))\s+(%r\d+), (?:%r\d+, (\d+)|global_smem);", text)
    base = {register: offset or "0" for register, offset in reversed(adds)}
    return [base[r] for r in re.findall(r"mbarrier\.init\.shared::cta\.b64 \[(%r\d+)\]", text)]
