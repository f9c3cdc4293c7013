"""Kernels of every tactic compile ahead of time for three architectures, without a GPU; compiling fails politely."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import venturi as vt
from tests.backends.cuda.test_contractions import weight
from tests.passes.harness import optimize
from venturi.backends.base import RegionView
from venturi.backends.cuda.backend import cuda_backend
from venturi.backends.cuda.device import OfflineDevice
from venturi.backends.cuda.kernel import Cubin, KernelSource
from venturi.backends.cuda.store import KernelStore, kernels_of_engine
from venturi.core.errors import EngineError, TuningError
from venturi.engine.builder import stored_weights


def network():
    """One Region for every tactic that generates code."""
    net = vt.Network()
    x, skip = net.input("x", (8, 3, 32, 32)), net.input("skip", (8, 128, 16, 16))
    y = net.relu(net.conv(x, weight(64, 3, 7, 7), weight(64), pads=[3, 3, 3, 3], strides=[2, 2]))
    y = net.max_pool(y, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    y = net.relu(net.conv(y, weight(64, 64, 3, 3), weight(64), pads=[1, 1, 1, 1]))
    y = net.relu(net.conv(y, weight(128, 64, 1, 1), weight(128)) + skip)
    y = net.hard_swish(net.conv(y, weight(128, 1, 5, 5), weight(128), group=128, pads=[2, 2, 2, 2]))
    gate = net.sigmoid(net.conv(net.global_average_pool(y), weight(128, 128, 1, 1)))
    net.output("y", y * gate)
    t = net.input("t", (4, 128, 768))
    h = net.gelu(t @ weight(768, 3072) + weight(3072)) @ weight(3072, 768) + weight(768) + t
    h = net.layer_normalization(h, weight(768), weight(768))
    net.output("h", net.softmax(net.attention(h, h, h, q_num_heads=12, kv_num_heads=12) * 0.5))
    return net


def sources_of(arch):
    """The first candidate of every tactic on every Region, by tactic."""
    model = optimize(network(), "fp16")
    weights = stored_weights(model.graph)
    found = {}
    for node in model.graph:
        region = RegionView(node, weights)
        for tactic in cuda_backend(OfflineDevice(arch), torch.device("cpu")).tactics[:-1]:
            configs = tactic.match(region)
            if not isinstance(configs, str):
                for source in tactic.sources(region, configs[0]):
                    found.setdefault((tactic.name, source.name), source)
    return found


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_without_spilling(arch, tmp_path):
    sources = sources_of(arch)
    expected = {"conv", "stem", "blocks", "depthwise", "gemv", "pool", "mean", "gemm", "attention", "pointwise", "rows"}
    expected |= {"gemm_tma", "gemm_tma_split"} if arch >= 90 else set()
    expected |= {"gemm_early", "conv_early"} if arch == 90 else set()
    assert {name for _, name in sources} >= expected
    store = KernelStore(folder=tmp_path)
    store.compile(sources.values())
    for source in sources.values():
        cubin = store.get(source)
        assert cubin.image[:4] == b"\x7fELF"
        assert cubin.shared <= 232448
        assert cubin.overlaps == (arch >= 90)
    again = KernelStore(folder=tmp_path)
    assert again.get(source).image == cubin.image


def test_names_of_the_model_cannot_become_code():
    net = vt.Network()
    x = net.input("x", (4, 8))
    evil = net.op("Relu", x, name="a\nimport os\n#")
    net.output("y", net.sigmoid(evil))
    model = optimize(net)
    weights = stored_weights(model.graph)
    backend = cuda_backend(OfflineDevice(90), torch.device("cpu"))
    texts = []
    for node in model.graph:
        region = RegionView(node, weights)
        tactic = backend.tactic("triton-pointwise")
        if not isinstance(configs := tactic.match(region), str):
            texts += [s.text for s in tactic.sources(region, configs[0])]
    assert any("import os" in t for t in texts)
    assert not any(line.strip().startswith("import os") for t in texts for line in t.splitlines())


def source(**changes):
    text = "import triton\nimport triton.language as tl\n\n@triton.jit\ndef f(x, n, B: tl.constexpr):\n    tl.store(x, n)\n"
    base = KernelSource("f", text, (("x", "*i32"), ("n", "i32"), ("B", "constexpr")), (("B", 16),))
    return replace(base, **changes)


def test_comments_do_not_change_the_key_but_code_does():
    named = source().text.replace("tl.store(x, n)", "tl.store(x, n)  # a name")
    assert source(text=named).key == source().key
    assert source().key != source(num_warps=8).key
    assert KernelSource.from_json(source().to_json()) == source()


def test_broken_kernels_are_reported_and_not_compiled_twice(tmp_path):
    store = KernelStore(folder=tmp_path)
    broken = source(text=source().text.replace("tl.store(x, n)", "tl.store(x, missing)"))
    store.compile([broken, source()])
    assert store.get(source()).entry == "f"
    with pytest.raises(TuningError, match="missing"):
        store.get(broken)


def test_an_engine_without_its_kernel_is_refused():
    with pytest.raises(EngineError, match="lacks kernel f"):
        KernelStore({}, compiles=False).get(source())


@pytest.mark.parametrize("index", [{}, [1], [{"key": "a"}], [{"key": "a", "entry": 3, "parameters": [{}]}]])
def test_damaged_kernel_indexes_are_refused(index):
    with pytest.raises(EngineError, match="damaged"):
        kernels_of_engine(lambda name: b"", index)


def test_cubins_survive_the_round_trip(tmp_path):
    store = KernelStore(folder=tmp_path)
    made = store.get(source())
    assert kernels_of_engine(lambda name: made.image, [made.meta()])[made.key] == made
    assert isinstance(made, Cubin)
