"""Two convolutions that are added, in one kernel, simulated."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.backends.cuda.pairs import branches_region, pair_region
from tests.backends.cuda.simulated import Memory, View, simulate
from venturi.backends.cuda.codegen.pingpong import PingpongTile, branches_source
from venturi.backends.cuda.codegen.reader import Box, branches_reader
from venturi.backends.cuda.device import OfflineDevice
from venturi.backends.cuda.tactics.branches import BranchesConv, read_branches
from venturi.backends.cuda.tactics.early import pixels_of


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    "size, here, there, out, stride, box",
    [((3, 7, 9), 64, 128, 72, 1, Box(2, 8, 4)), ((2, 5, 6), 128, 64, 40, 2, Box(1, 8, 8))],
    ids=["stride 1", "stride 2"],
)
def test_the_text_computes_their_sum(size, here, there, out, stride, box, bias):
    region = branches_region(size, here, there, out, stride=stride, bias=bias)
    found, tile = read_branches(region), PingpongTile(64, 32, 3)
    assert not isinstance(found, str), found
    text = branches_source(region, found.tile, found.here[1].element, tile, *found.geometries, box, 64, 90).text
    reader, rng, (images, p, q) = branches_reader(*found.geometries, box, 64), np.random.default_rng(2), size
    steps = [g.strides[0] for g in found.geometries]
    assert sorted(steps) == [1, stride]
    x, z = (
        rng.standard_normal((images, g.channels, p * step, q * step), np.float32)
        for g, step in zip(found.geometries, steps)
    )
    views = [
        View(pixels_of(torch.from_numpy(a).contiguous(memory_format=torch.channels_last), geometry).numpy(), block)
        for a, geometry, block in zip((x, z), found.geometries, (reader.block, reader.other.block))
    ]
    w, v = (c.packed(part).float() for part, c in (found.here, found.there))
    flat, biases = found.weight(tile.columns).float().numpy(), [t.float().numpy() for t in found.biases]
    assert len(biases) == 1 + bias
    got = np.full((images, p, q, out), np.nan, np.float32)
    args = [*views, View(flat, (32, 64)), Memory(got), *map(Memory, biases), images, p, q, out, 64, 32]
    simulate("branches_pingpong", text, 3, args)
    want = np.einsum("bchw,oc->bhwo", x, w.numpy()) + np.einsum("bchw,oc->bhwo", z[..., ::stride, ::stride], v.numpy())
    np.testing.assert_allclose(got, np.maximum(want + sum(biases), 0), rtol=1e-4, atol=1e-3)


def test_what_it_leaves_to_others():
    def reason(*args, arch=90, **options):
        return BranchesConv(OfflineDevice(arch)).match(branches_region(*args, **options))

    assert not isinstance(reason((128, 28, 28), 128, 256, 512, stride=2), str)
    assert not isinstance(reason((128, 56, 56), 64, 64, 256, activation=False), str)
    assert reason((128, 56, 56), 64, 64, 256, arch=100) == "written for Hopper's warpgroup products"
    assert reason((128, 28, 28), 72, 64, 256).startswith("not 1x1 on multiples of 64 channels")
    assert reason((128, 28, 28), 64, 64, 256, stride=3).startswith("not 1x1 on multiples of 64 channels")
    assert reason((1, 7, 7), 64, 64, 64) == "not more tiles than multiprocessors"
    one_after_the_other = pair_region((128, 28, 28), 64, 256, 64, residual=False, both=False)
    assert BranchesConv(OfflineDevice(90)).match(one_after_the_other) == "not two convolutions that are added"
