"""Segments of generated kernels inside an engine: addresses that change, results that must not, callers side by side."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import venturi as vt
from venturi.backends.cpu.codegen.isa import host

pytestmark = pytest.mark.skipif(isinstance(host(), str), reason=str(host()))


class Net(nn.Module):
    """Convolutions of every kind with a residual, a pool, a product that is not generated, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 19, 3, 2, 1)
        self.wide = nn.Conv2d(19, 33, 1)
        self.deep = nn.Conv2d(33, 33, 3, 1, 1, groups=33)
        self.narrow = nn.Conv2d(33, 19, 1)
        self.same = nn.Conv2d(19, 19, 3, 1, 1)
        self.norm = nn.LayerNorm(19)
        self.out = nn.Linear(19, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = x + self.narrow(F.hardswish(self.deep(F.relu(self.wide(x)))))
        x = F.max_pool2d(F.relu(self.same(x) + x), 3, 2, 1)
        rows = self.norm(x.flatten(2).transpose(1, 2))
        return self.out(torch.sin(rows).mean(1))


@pytest.fixture(scope="module")
def net() -> tuple[nn.Module, vt.Engine]:
    torch.manual_seed(0)
    module = Net().eval()
    example = torch.randn(2, 3, 21, 17)
    batch = torch.export.Dim("n", min=1, max=64)
    return module, vt.build(module, (example,), dynamic_shapes={"x": {0: batch}}, opt_level=0)


def _near(module: nn.Module, engine: vt.Engine, x: torch.Tensor) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(engine(x), module(x), rtol=1e-4, atol=1e-5)


def test_most_steps_are_generated(net: tuple[nn.Module, vt.Engine]) -> None:
    tactics = [s.tactic for s in net[1].plan.steps]
    assert sum(t.startswith("native-") for t in tactics) >= 6, tactics


def test_right_for_new_memory_batches_and_layouts(net: tuple[nn.Module, vt.Engine]) -> None:
    for batch in (2, 2, 1, 5, 2):
        x = torch.randn(batch, 3, 21, 17)
        for given in (
            x,
            x.contiguous(memory_format=torch.channels_last),
            x.flip(3).flip(3),
            x.transpose(2, 3).contiguous().transpose(2, 3),
        ):
            _near(*net, given)


def test_results_survive_the_next_run(net: tuple[nn.Module, vt.Engine]) -> None:
    module, engine = net
    x, y = torch.randn(2, 3, 21, 17), torch.randn(2, 3, 21, 17)
    engine(x)
    first = engine(x)
    kept = first.clone()
    engine(y)
    assert torch.equal(first, kept)


def test_bitwise_the_same_from_run_to_run(net: tuple[nn.Module, vt.Engine]) -> None:
    x = torch.randn(3, 3, 21, 17)
    net[1](x)
    runs = [net[1](x) for _ in range(5)]
    assert all(torch.equal(runs[0], r) for r in runs)


def test_read_only_and_misaligned_numpy(net: tuple[nn.Module, vt.Engine]) -> None:
    module, engine = net
    raw = np.zeros(2 * 3 * 21 * 17 * 4 + 4, np.uint8)[4:].view(np.float32).reshape(2, 3, 21, 17)
    raw[:] = np.random.default_rng(0).standard_normal(raw.shape)
    raw.setflags(write=False)
    with torch.inference_mode():
        np.testing.assert_allclose(engine(raw), module(torch.tensor(raw)).numpy(), rtol=1e-4, atol=1e-5)


def test_not_finite_inputs_give_the_same_answers(net: tuple[nn.Module, vt.Engine]) -> None:
    module, engine = net
    x = torch.randn(2, 3, 21, 17)
    x[1, 0, 5, 5] = float("nan")
    with torch.inference_mode():
        got, want = engine(x), module(x)
    assert torch.equal(torch.isfinite(got), torch.isfinite(want))
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)


class Readers(nn.Module):
    """One value read in two orders: a result that leaves, and the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = F.relu(self.conv(x))
        return y, torch.softmax(y, -1), torch.softmax(x, -1), torch.tanh(x) * 2


def test_values_read_in_two_orders() -> None:
    module = Readers().eval()
    engine = vt.build(module, (torch.randn(1, 3, 6, 7),), opt_level=0)
    tactics = {s.tactic for s in engine.plan.steps}
    assert {"native-conv", "native-rows"} <= tactics
    for i in range(4):
        x = torch.randn(1, 3, 6, 7)
        x = x.contiguous(memory_format=torch.channels_last) if i % 2 else x
        with torch.inference_mode():
            for got, want in zip(engine(x), module(x)):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_threads_share_the_kernels(net: tuple[nn.Module, vt.Engine]) -> None:
    module, engine = net
    wrong: list[str] = []

    def work(seed: int) -> None:
        x = torch.randn(1 + seed % 3, 3, 21, 17, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            want = module(x)
            for _ in range(20):
                if not torch.allclose(engine(x), want, rtol=1e-4, atol=1e-5):
                    wrong.append(f"thread {seed}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_works_without_llvm() -> None:
    code = """
import sys
sys.modules["llvmlite"] = None
import torch, venturi as vt
m = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
x = torch.randn(1, 3, 9, 9)
e = vt.build(m, (x,), opt_level=1)
assert not any(s.tactic.startswith("native-") for s in e.plan.steps)
assert any("llvmlite is not installed" in k.reason for s in e.plan.steps for k in s.measurements)
assert torch.allclose(e(x), m(x), atol=1e-5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


class Blocks(nn.Module):
    """Nothing but what is generated; the input lies in another order than the kernels read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.same = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.out = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        return self.out(F.relu(self.same(x) + x).mean((2, 3)))


def test_a_run_allocates_its_result_and_nothing_else() -> None:
    from torch.profiler import ProfilerActivity, profile

    x = torch.randn(2, 3, 20, 20)
    engine = vt.build(Blocks().eval(), (x,), opt_level=0)
    assert all(s.tactic.startswith("native-") or s.ops == ("Reshape",) for s in engine.plan.steps)
    for _ in range(2):
        engine(x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = [engine(x) for _ in range(3)]
    made = [e.self_cpu_memory_usage for e in seen.events() if e.self_cpu_memory_usage > 0]
    assert made == [kept[0].nbytes] * 3, "one result a run"
