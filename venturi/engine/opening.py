"""Opening engine files: loading them as they are, and tuning them anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from venturi.core.errors import DeviceError, EngineError, mapped
from venturi.core.log import logger
from venturi.core.progress import ProgressCallback
from venturi.engine.artifact import SOURCE_WEIGHTS, WEIGHTS, Loaded, open_artifact, read_json
from venturi.engine.builder import Built, plan_model
from venturi.engine.config import BuildConfig, Profile
from venturi.engine.engine import Engine, rebuild, weights_of
from venturi.engine.graph_file import unpack_graph
from venturi.engine.plan import Plan
from venturi.engine.target import Target, open_target, resolve_device
from venturi.runtime.executable import Executable, bind_plan
from venturi.runtime.streams import ALL_CORES, Threads


def load_engine(
    path: str | Path,
    *,
    weights: Mapping[str, Any] | str | Path | None = None,
    verify: bool = True,
    device: str | None = None,
    threads: Threads = ALL_CORES,
) -> Engine:
    """Open an engine file: checks the seal, maps the weights, binds the kernels. Raises EngineError.

    `weights` (arrays by source name, or the ONNX file) is needed for stripped engines and refits others.
    """
    loaded = open_artifact(path, verify=verify)
    container, plan = loaded.container, loaded.plan
    options = loaded.manifest.get("options", {})
    config = BuildConfig.create(None, **{k: v for k, v in options.items() if k in BuildConfig.model_fields})
    where = str(path)
    target = _target_of(loaded, device, where)
    config = config.model_copy(update={"device": plan.target if device is None else device})
    if loaded.manifest.get("stripped"):
        if weights is None:
            raise EngineError("the engine is stripped: pass weights=<the ONNX file or a dict of arrays>", where=where)
        source = _restore_source(container.entry("source.onnx"), weights, where)
        return Engine(rebuild(source, plan, config, target), config, source, threads)
    model, stored = unpack_graph(container.entry("graph.onnx"), container.entry(WEIGHTS), where)
    weights_there = target.weights(stored)
    executable = _bind(model, plan, weights_there, where, target, container.release)
    plan = replace(plan, steps=tuple(c.step for c in executable.calls))
    built = Built(model, plan, weights_there, executable, target)
    engine = Engine(built, config, _kept_source(loaded, where), threads)
    if weights is not None:
        engine.refit(weights)
    return engine


def tune_engine(
    path: str | Path,
    *,
    device: str | None = None,
    budget: float | None = None,
    opt_level: int = 3,
    timing_cache: str | Path | None = None,
    progress: ProgressCallback | None = None,
) -> Engine:
    """The engine of a file with its tactics chosen anew by timing on this machine. See `venturi.tune`."""
    loaded = open_artifact(path)
    container, plan, where = loaded.container, loaded.plan, str(path)
    if loaded.manifest.get("stripped"):
        raise EngineError("a stripped engine has no weights to time kernels with; build it again here", where=where)
    options = {k: v for k, v in loaded.manifest.get("options", {}).items() if k in BuildConfig.model_fields}
    config = BuildConfig.create(
        None,
        **options | {
            "device": device or plan.target, "opt_level": opt_level, "budget": budget, "timing_cache": timing_cache,
            "profiles": tuple(Profile.from_dict(p) for p in plan.profiles),
        },
    )  # fmt: skip
    model, stored = unpack_graph(container.entry("graph.onnx"), container.entry(WEIGHTS), where)
    built = plan_model(model, stored, config, open_target(config.device), dict(plan.passes), 0.0, progress)
    return Engine(built, config, _kept_source(loaded, where))


def _kept_source(loaded: Loaded, where: str) -> ir.Model | None:
    """The source model of a refittable engine."""
    container = loaded.container
    if "source.onnx" not in container.entries:
        return None
    return unpack_graph(container.entry("source.onnx"), container.entry(SOURCE_WEIGHTS), where)[0]


def _target_of(loaded: Loaded, device: str | None, where: str) -> Target:
    """The target the plan was made for, with the file's own kernels. Raises DeviceError for another kind of device."""
    device, built = None if device == "auto" else device, loaded.plan.target
    if device is not None and resolve_device(device).partition(":")[0] != built.partition(":")[0]:
        raise DeviceError(f"the engine was built for {built!r}, got device={device!r}; build it for that", where=where)
    if loaded.plan.target == "cpu":
        return open_target("cpu")
    from venturi.backends.cuda.store import kernels_of_engine

    listed = "kernels/index.json"
    index = read_json(loaded.container, listed) if listed in loaded.container.entries else []
    with mapped(where, EngineError):
        kernels = kernels_of_engine(lambda name: bytes(loaded.container.entry(name)), index)
        target = open_target(device or loaded.plan.target, kernels)
        _check_device(loaded.manifest.get("device"), target.fingerprint())
        return target


def _check_device(built: Any, here: Mapping[str, str]) -> None:
    """Another architecture cannot run the kernels; another GPU or library may only make the choices less good."""
    if not isinstance(built, dict) or built.get("arch") != here["arch"]:
        was = built.get("arch") if isinstance(built, dict) else "nothing known"
        raise EngineError(f"the engine's kernels are for {was}, this GPU is {here['arch']}; build it again here")
    if not built.get("gpu"):
        logger.warning("the engine was built without its GPU: its kernels are guesses until `venturi tune` times them")
        return
    for name in ("gpu", "libraries"):
        if built.get(name) != here[name]:
            logger.warning("the engine was tuned with %s %r, here is %r", name, built.get(name), here[name])


def _bind(
    model: ir.Model, plan: Plan, stored: Mapping[str, Any], where: str, target: Target, release: Callable[[], None]
) -> Executable:
    with mapped(where, EngineError):
        return bind_plan(model.graph, plan.steps, stored, target.backend, release)


def _restore_source(data: memoryview, weights: Mapping[str, Any] | str | Path, where: str) -> ir.Model:
    import onnx

    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(bytes(data)))
    given = weights if isinstance(weights, Mapping) else weights_of(weights)
    missing = []
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            if name not in given:
                missing.append(name)
                continue
            array = np.asarray(given[name])
            if list(array.shape) != list(value.const_value.shape):
                raise EngineError(
                    f"weight {name!r} has shape {list(value.const_value.shape)}, got {list(array.shape)}",
                    where=where,
                )
            value.const_value = ir.Tensor(array, dtype=value.const_value.dtype, name=name)
    if missing:
        raise EngineError(f"{len(missing)} weights are missing: {missing[:10]}", where=where)
    return model
