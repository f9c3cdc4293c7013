"""Images laid out anew: the same numbers, nothing beside them touched, and torch where the code does not serve."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

pytest.importorskip("llvmlite")

import venturi as vt
from tests.backends.cpu.harness import isas, run
from venturi.backends.cpu.codegen.element import OF_TORCH
from venturi.backends.cpu.codegen.interleave import InterleaveSpec, emit_interleave
from venturi.backends.cpu.native import interleave

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.int8]
SIZES = [(1, 1, 1), (2, 7, 9), (1, 33, 31), (3, 5, 103), (2, 64, 64), (1, 1000, 3), (1, 224, 224)]


def images(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern may occur, NaNs that signal included."""
    raw = torch.randint(0, 256, (n * c * h * w * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).view(n, c, h, w)


def raw(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("isa", isas(), ids=lambda i: getattr(i, "name", "none"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_planes_become_pixels(size: tuple[int, int, int], channels: int, dtype: torch.dtype, isa) -> None:
    n, h, w = size
    x = images(n, channels, h, w, dtype)
    spec = InterleaveSpec(channels, h * w, OF_TORCH[dtype])
    around = torch.full((x.numel() + 256,), 77, dtype=torch.uint8 if dtype.itemsize == 1 else dtype).view(dtype)
    before = around.clone()
    out = around[128 : 128 + x.numel()]
    run(isa, f"{isa} {spec}", emit_interleave(isa, spec), [x.data_ptr(), out.data_ptr()], n * spec.tasks(isa))
    assert torch.equal(raw(out.view(n, h, w, channels)), raw(x.permute(0, 2, 3, 1)))
    assert torch.equal(around[:128], before[:128])
    assert torch.equal(around[-128:], before[-128:])


@pytest.mark.parametrize(
    ("x", "serves"),
    [
        (torch.randn(2, 3, 5, 7), True),
        (torch.randn(2, 1, 5, 7), False),
        (torch.randn(2, 5, 5, 7), False),
        (torch.randn(2, 3, 7, 5).transpose(2, 3), False),
        (torch.randn(4, 3, 5, 7)[::2], False),
        (torch.randn(2, 3, 5, 7).double(), False),
        (torch.randn(2, 3, 5, 7).half(), False),
        (torch.randn(0, 3, 5, 7), False),
    ],
    ids=lambda v: str(tuple(v.stride())) if isinstance(v, torch.Tensor) else "",
)
def test_who_serves(x: torch.Tensor, serves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = interleave._job
    monkeypatch.setattr(interleave, "_job", lambda a, b: seen.append(real(a, b)) or seen[-1])
    out = torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last)
    assert interleave.lay_out(x, out) is out
    assert torch.equal(out, x)
    assert (seen[0] is not None) == serves


def test_what_lies_right_is_left_alone() -> None:
    x = torch.randn(1, 3, 4, 4)
    assert interleave.laid_out(x, torch.contiguous_format) is x
    last = interleave.laid_out(x, torch.channels_last)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, x)
    assert interleave.laid_out(last, torch.channels_last) is last
    assert torch.equal(interleave.laid_out(last, torch.contiguous_format), x)


def test_many_threads_and_more_sizes_than_are_kept() -> None:
    def check(seed: int) -> bool:
        for h in range(1, 2 * interleave.MOST_JOBS):
            x = torch.full((2, 3, h, 17), float(seed + h))
            if not torch.equal(interleave.laid_out(x, torch.channels_last), x):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, range(8)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_engines_take_images_in_any_order(precision: str) -> None:
    rng = np.random.default_rng(0)
    net = vt.Network("two")
    x = net.input("x", (2, 3, 19, 23))
    y = net.relu(net.conv(x, rng.standard_normal((16, 3, 3, 3)).astype(np.float32)))
    net.output("y", net.conv(y, rng.standard_normal((8, 16, 3, 3)).astype(np.float32)))
    engine = vt.build(net, opt_level=0, precision=precision)
    image = torch.randn(2, 3, 19, 23)
    wanted = engine(image).clone()
    for _ in range(3):
        assert torch.equal(engine(image), wanted)
        assert torch.equal(engine(image.contiguous(memory_format=torch.channels_last)), wanted)
        assert torch.equal(engine(image.transpose(2, 3).contiguous().transpose(2, 3)), wanted)
