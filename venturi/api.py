"""`vt.build` and `vt.load`: the two functions most users need."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from venturi.core.knobs import DEBUG, check_environment
from venturi.core.log import CallbackHandler, LogCallback, logger
from venturi.core.progress import ProgressCallback, report
from venturi.engine.builder import compile_model
from venturi.engine.config import BuildConfig, Profile
from venturi.engine.engine import Engine
from venturi.engine.inspector import make_report
from venturi.engine.opening import load_engine, tune_engine
from venturi.engine.plan import Plan
from venturi.engine.target import resolve_device
from venturi.frontends.sources import import_model
from venturi.runtime.streams import Threads


def build(
    source: Any,
    example: Any = None,
    *,
    device: str | None = None,
    target: str | None = None,
    precision: str | None = None,
    profiles: Sequence[Profile] | Profile | None = None,
    budget: float | None = None,
    opt_level: int | None = None,
    timing_cache: str | Path | None = None,
    strict: bool | None = None,
    deterministic: bool | None = None,
    refit: bool | None = None,
    strip: bool | None = None,
    config: BuildConfig | None = None,
    dynamic_shapes: Any = None,
    intra_threads: int | None = None,
    streams: int | str | None = None,
    progress: ProgressCallback | None = None,
    logger: LogCallback | None = None,
) -> Engine:
    """Compile a model into an engine for this machine.

    Args:
        source: ONNX path, bytes or proto, onnx_ir.Model, vt.Network, nn.Module or ExportedProgram.
        example: inputs for torch modules: a tensor, a tuple, or a mapping of keyword inputs.
        device: "cpu", "cuda", "cuda:1"; "auto" is the first GPU, else the CPU.
        target: "sm_90": build for a GPU that is not here, by heuristics (needs opt_level=0); save the engine, load the
            file on the GPU, and choose its kernels by timing there with `vt.tune`.
        precision: "model" (as typed), "fp32", "tf32" (GPU: products of fp32 may round their operands to 11 bits),
            "fp16", "bf16". Inputs and outputs keep the model's types.
        profiles: shape ranges of dynamic inputs; the first one's optimum is tuned for.
        budget: seconds of tuning; without one, every candidate is timed.
        opt_level: 0 (first tactic that matches, no timing) to 5 (longest timing); default 3.
        timing_cache: JSON file; default ~/.cache/venturi/timing.json.
        strict: refuse Regions that only the reference can compute.
        deterministic: time nothing, take every choice from the timing cache, and leave times of the build out: the
            same model gives the same file, byte for byte. A choice that the cache does not know is a TuningError.
        refit: keep the source model inside the engine, so that weights can be replaced later.
        strip: the saved file carries no weights; they are given at load.
        config: defaults for all of the above.
        dynamic_shapes: as torch.export takes it.
        intra_threads, streams: as `load` takes them; kernels are chosen by timing on all cores.
        progress: called with ProgressEvents; returning False cancels.
        logger: called with (level, message) for every log record of this build.

    Raises:
        ModelError, ShapeError, TuningError, DeviceError, or VenturiError (code CONFIG) for bad options.
    """
    check_environment()
    given: dict[str, Any] = {
        "device": device, "target": target, "precision": precision, "budget": budget, "opt_level": opt_level,
        "timing_cache": timing_cache, "strict": strict, "deterministic": deterministic,
        "refit": refit, "strip": strip,
    }  # fmt: skip
    changes = {k: v for k, v in given.items() if v is not None}
    if profiles is not None:
        changes["profiles"] = (profiles,) if isinstance(profiles, Profile) else tuple(profiles)
    settings = BuildConfig.create(config, **changes)
    threads = Threads.of(intra_threads, streams)
    resolve_device(settings.device)
    with _logging_to(logger):
        report(progress, "import", 0, 1)
        model = import_model(source, example, dynamic_shapes)
        report(progress, "import", 1, 1)
        kept = model.clone() if settings.refit or settings.strip else None
        engine = Engine(compile_model(model, settings, progress), settings, kept, threads)
    explain(engine.plan, DEBUG.get())
    return engine


def load(
    path: str | Path,
    *,
    weights: Mapping[str, Any] | str | Path | None = None,
    verify: bool = True,
    device: str | None = None,
    intra_threads: int | None = None,
    streams: int | str | None = None,
) -> Engine:
    """Open an engine file. Raises EngineError when it is damaged or of another format, DeviceError when the GPU it
    was built for is not there.

    `weights` (a dict of arrays by source name, or the ONNX file) fills a stripped engine. `verify=False` skips the
    checksum of the whole file. `device` picks a GPU ("cuda:1") for an engine built for GPUs; of another kind it is a
    DeviceError.

    On the CPU a run uses at most `intra_threads` threads, by default all cores that the process may use. `streams` is
    for throughput: as many runs side by side ("auto": one for each core), each on cores of its own; calls from several
    threads and `submit` share them, one caller alone is slower.
    """
    check_environment()
    threads = Threads.of(intra_threads, streams)
    return load_engine(path, weights=weights, verify=verify, device=device, threads=threads)


def tune(
    path: str | Path,
    *,
    device: str | None = None,
    budget: float | None = None,
    opt_level: int = 3,
    timing_cache: str | Path | None = None,
    progress: ProgressCallback | None = None,
) -> Engine:
    """Choose the tactics of an engine file anew, by timing on this machine; the file stays as it is until you save.

    For engines built elsewhere, without timing, or by an older version. `device` is by default the kind of device the
    file was built for. Raises EngineError for damaged or stripped files, DeviceError when the device is not there.
    """
    check_environment()
    engine = tune_engine(
        path, device=device, budget=budget, opt_level=opt_level, timing_cache=timing_cache, progress=progress
    )
    explain(engine.plan, DEBUG.get())
    return engine


def explain(plan: Plan, level: int) -> None:
    """VENTURI_DEBUG on stderr: 1 a summary, 2 time by Region, 3 every candidate with the chosen one marked."""
    if level < 1:
        return
    print(
        f"venturi: {len(plan.steps)} steps on {plan.target}, {plan.timings_ms} ms, passes {plan.passes}",
        file=sys.stderr,
    )
    if level >= 2:
        print(make_report(plan), file=sys.stderr)
    for step in plan.steps if level >= 3 else ():
        for m in step.measurements:
            time = "-" if m.median_us is None else f"{m.median_us:.1f} us"
            mark = " <--" if m.tactic == step.tactic and m.config == step.config else ""
            print(f"  {step.name}: {m.tactic} {time} {m.reason}{mark}", file=sys.stderr)


class _logging_to:
    """Adds a callback to the venturi logger for the length of a build."""

    def __init__(self, callback: LogCallback | None) -> None:
        self._handler = None if callback is None else CallbackHandler(callback)
        self._level = logger.level

    def __enter__(self) -> None:
        if self._handler is not None:
            logger.addHandler(self._handler)
            logger.setLevel(logging.DEBUG)

    def __exit__(self, *exc: object) -> None:
        if self._handler is not None:
            logger.removeHandler(self._handler)
            logger.setLevel(self._level)
