"""Devices: what a spec means, what an engine for a GPU says on a machine without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import venturi as vt
from tests.engine.models import mlp
from venturi.core.errors import EngineError
from venturi.engine.opening import _check_device
from venturi.engine.target import CpuTarget, open_target, resolve_device


def test_auto_is_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    assert isinstance(open_target("auto"), CpuTarget)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == "cuda:0"


@pytest.mark.parametrize("spec", ["gpu", "cuda0", "CUDA", ""])
def test_unknown_devices(spec: str) -> None:
    with pytest.raises(vt.DeviceError, match="known: auto, cpu, cuda"):
        resolve_device(spec)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(vt.DeviceError, match="use device='cpu'"):
        vt.build(mlp(), device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(vt.DeviceError, match="has 2 GPUs"):
        vt.build(mlp(), device="cuda:7")
    with pytest.raises(vt.DeviceError, match="unknown device"):
        vt.build(mlp(), device="cuda:x")


def test_a_gpu_engine_on_a_machine_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    engine = vt.build(mlp(), device="cpu")
    object.__setattr__(engine.plan, "target", "cuda")
    engine.save(tmp_path / "m.vt")
    with pytest.raises(vt.DeviceError, match="device 'cuda'"):
        vt.load(tmp_path / "m.vt")


def test_fingerprints() -> None:
    here = {"arch": "sm_90", "gpu": "a", "libraries": "x"}
    _check_device(dict(here), here)
    _check_device({**here, "gpu": "b"}, here)
    for built in (None, {}, {**here, "arch": "sm_80"}):
        with pytest.raises(EngineError, match="sm_90"):
            _check_device(built, here)


def test_an_engine_is_not_loaded_for_another_kind_of_device(tmp_path: Path) -> None:
    net = vt.Network()
    net.output("y", net.input("x", (2, 3)) * 2.0)
    vt.build(net, opt_level=0, device="cpu").save(tmp_path / "a.vt")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(vt.DeviceError, match=f"built for 'cpu', got device='{device}'"):
            vt.load(tmp_path / "a.vt", device=device)
    with pytest.raises(vt.DeviceError, match="unknown device 'tpu'"):
        vt.load(tmp_path / "a.vt", device="tpu")
    for device in ("cpu", "auto", None):
        assert vt.load(tmp_path / "a.vt", device=device).plan.target == "cpu"
