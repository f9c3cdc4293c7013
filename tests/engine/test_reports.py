"""What an engine tells of itself: debug output, reports, rates, rooflines, traces."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import venturi as vt
from tests.engine.models import conv_net, x_of
from venturi.engine.peaks import Peaks, product_type


def test_debug_levels_explain_the_plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for level in ("0", "1", "2", "3"):
        monkeypatch.setenv("VENTURI_DEBUG", level)
        vt.build(conv_net(), opt_level=1)
        texts.append(capsys.readouterr().err)
    assert texts[0] == ""
    assert "steps on cpu" in texts[1]
    assert "Conv+Relu" in texts[2]
    assert "<--" in texts[3]
    assert len(texts[1]) < len(texts[2]) < len(texts[3])


def test_the_report_covers_every_source_node() -> None:
    net = conv_net()
    engine = vt.build(net)
    report = engine.profile({"x": x_of(2, 8, 10, 10)}, runs=3)
    assert len(report.layers) == len(engine.plan.steps)
    assert report.total_us > 0
    assert report.arena_bytes is not None
    named = {s for layer in report.layers for s in layer.sources}
    convs = {n.name for n in net.to_model().graph if n.op_type == "Conv"}
    assert convs <= named
    assert "Conv" in str(report)
    json.dumps(engine.inspect().to_json())


def test_rates_and_the_roofline_follow_from_the_times() -> None:
    engine = vt.build(conv_net())
    report = engine.profile({"x": x_of(2, 8, 10, 10)}, runs=3, roofline=True)
    steps = engine.plan.steps
    assert any(s.flops for s in steps)
    for step, layer in zip(steps, report.layers):
        assert layer.time_us is not None
        assert layer.gflops == (pytest.approx(step.flops / layer.time_us / 1e3) if step.flops else None)
        assert layer.gbytes == pytest.approx(step.bytes / layer.time_us / 1e3)
        assert layer.roofline is not None
        assert layer.roofline > 0
    assert all(layer.roofline is None for layer in engine.inspect().layers)
    assert "roof %" in str(report)


def test_the_roofline_is_the_larger_of_both_bounds() -> None:
    peaks = Peaks(flops=100e9, bytes=10e9)
    assert peaks.least_us(2e6, 100) == pytest.approx(20.0)
    assert peaks.least_us(2e6, 1_000_000) == pytest.approx(100.0)


def test_the_trace_lays_the_layers_end_to_end() -> None:
    engine = vt.build(conv_net())
    report = engine.profile({"x": x_of(2, 8, 10, 10)}, runs=3)
    events = json.loads(json.dumps(report.trace()))["traceEvents"]
    assert events[0]["ph"] == "M"
    bars = events[1:]
    assert [b["name"] for b in bars] == [layer.name for layer in report.layers]
    assert [b["ts"] for b in bars[1:]] == pytest.approx([b["ts"] + b["dur"] for b in bars[:-1]])
    assert bars[-1]["ts"] + bars[-1]["dur"] == pytest.approx(report.total_us)
    assert all(b["args"]["tactic"] and b["args"]["source nodes"] for b in bars)


@pytest.mark.parametrize("precision", ["model", "bf16", "tf32"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_roofline_is_of_the_type_that_is_multiplied(precision: str, dtype: type) -> None:
    net = vt.Network("typed")
    x = net.input("x", (8, 64), dtype)
    y = net.matmul(x, np.ones((64, 64), dtype))
    net.output("y", net.cast(net.relu(y), to=np.float32))
    engine = vt.build(net, opt_level=1, precision=precision)
    wanted = {"model": {np.float32: torch.float32, np.float16: torch.float16}[dtype], "bf16": torch.bfloat16}
    assert product_type(engine.plan, engine._built.model.graph) == wanted.get(precision, torch.float32)
