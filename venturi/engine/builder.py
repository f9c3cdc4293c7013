"""From an imported model to an engine: passes, then one tactic per Region, chosen on real values."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from venturi.backends.base import Backend, RegionView
from venturi.backends.cpu.native.openmp import team_of
from venturi.backends.part_view import PAIR, anchors_of
from venturi.backends.real_view import RealView
from venturi.backends.reference.program import OPERATOR_ERRORS
from venturi.core.errors import ShapeError, VenturiError
from venturi.core.fingerprint import num_physical_threads
from venturi.core.log import logger
from venturi.core.progress import ProgressCallback, report
from venturi.core.registry import nearest
from venturi.engine.config import BuildConfig, Profile
from venturi.engine.in_place import PASSES, InPlace, Settled
from venturi.engine.pairing import Pairing
from venturi.engine.plan import Plan, Step, TensorSpec
from venturi.engine.target import OfflineTarget, Target, open_target
from venturi.engine.team import choose_threads
from venturi.ir.build import static_shape, subgraphs
from venturi.ir.dtypes import dtype_name
from venturi.ir.region import is_region
from venturi.ops.table import find_op
from venturi.ops.tensors import STORAGE, to_torch
from venturi.passes.pipeline import run_pipeline
from venturi.passes.rewriting import PassContext
from venturi.runtime.executable import Executable, link, reads_of
from venturi.runtime.reorders import find_reorders
from venturi.tuning.cache import TimingCache, default_path
from venturi.tuning.tuner import Choice, Tuner


@dataclass(frozen=True)
class Built:
    """Everything an engine is made of."""

    model: ir.Model
    plan: Plan
    weights: Mapping[str, Any]
    executable: Executable
    target: Target


def pass_context(config: BuildConfig, backend: Backend) -> PassContext:
    """What the passes must know of the configuration and of the device."""
    return PassContext(
        precision=config.precision, fuses_quantized=backend.fuses_quantized, signed_bytes=backend.signed_bytes,
        rounds_within=backend.rounds_within, fuses_fp8=backend.fuses_fp8, fuses_dynamic=backend.fuses_dynamic,
        flat_attention=backend.flat_attention, packed_attention=backend.packed_attention,
    )  # fmt: skip


def compile_model(model: ir.Model, config: BuildConfig, progress: ProgressCallback | None = None) -> Built:
    """Run the passes on `model` (in place) and plan it for the configured device."""
    target = open_target(config.device) if config.target is None else OfflineTarget(config.target)
    check_profiles(model.graph, config.profiles)
    ctx = pass_context(config, target.backend)
    pass_ms = run_pipeline(model, ctx, progress=progress)
    rewrites = {k: v for k, v in ctx.rewrites.items() if v}
    return plan_model(model, stored_weights(model.graph), config, target, rewrites, sum(pass_ms.values()), progress)


def plan_model(
    model: ir.Model,
    stored: Mapping[str, Any],
    config: BuildConfig,
    target: Target,
    rewrites: dict[str, int],
    pass_ms: float = 0.0,
    progress: ProgressCallback | None = None,
) -> Built:
    """Choose a tactic for every Region of an optimized model. `rewrites` and `pass_ms` say how it became one."""
    weights = target.weights(stored)
    start = time.perf_counter()
    cache = TimingCache(config.timing_cache if config.timing_cache is not None else default_path(), target.describe())
    tuner = Tuner(
        target.backend, cache, config.opt_level, config.budget, config.strict, config.deterministic, target.timer()
    )
    profile = config.profiles[0] if config.profiles else None
    examples = None if config.opt_level == 0 else example_inputs(model.graph, profile, config.seed)
    regions = [RegionView(n, weights) for n in model.graph]
    target.prepare(((t, r, c) for r in regions for t, c in tuner.expected(r)), progress)
    placed = _placed(examples, target)
    with team_of(num_physical_threads()):
        plan = _plan_steps(model.graph, weights, tuner, placed, progress)
    if placed is not None:
        timer = target.engine_timer([placed[v.name or ""] for v in model.graph.inputs])
        in_place = InPlace(model.graph, weights, target.backend, timer, cache, tuner.deadline, config.deterministic)
        in_place.settle(plan, PASSES[config.opt_level], progress)
        if target.backend.joins_pairs and PASSES[config.opt_level]:
            Pairing(model.graph, weights, target, tuner, timer, config.deterministic).settle(plan, progress)
    executable = link(model.graph, plan.steps, plan.kernels, weights)
    threads, reorders = None, None
    if placed is not None and target.name == "cpu" and plan.complete:
        args = [placed[v.name or ""] for v in model.graph.inputs]
        reorders = find_reorders(executable, args, [v.name or "" for v in model.graph.inputs])
        threads = choose_threads(executable, args, plan.problems, cache, config.deterministic)
    try:
        cache.save()
    except OSError as exc:
        logger.warning("the timing cache %s could not be saved: %s", cache.path, exc)
    made = Plan(
        target.name,
        config.precision,
        tuple(spec_of(v) for v in model.graph.inputs),
        tuple(spec_of(v) for v in model.graph.outputs),
        tuple(plan.steps),
        tuple(p.to_json() for p in config.profiles),
        {} if examples is None else {n: list(x.shape) for n, x in examples.items() if hasattr(x, "shape")},
        rewrites,
        {} if config.deterministic else _timings(pass_ms, (time.perf_counter() - start) * 1e3),
        threads,
        reorders,
    )
    return Built(model, made, weights, executable, target)


def _timings(pass_ms: float, planning_ms: float) -> dict[str, float]:
    return {"passes": round(pass_ms, 2), "planning": round(planning_ms, 2)}


def _placed(examples: dict[str, Any] | None, target: Target) -> dict[str, Any] | None:
    return None if examples is None else {n: x.to(target.device) for n, x in examples.items()}


def stored_weights(graph: ir.Graph) -> dict[str, Any]:
    """Initializers as stored tensors by name, sharing memory with their source."""
    found = {}
    for name, value in graph.initializers.items():
        if value.const_value is not None and not value.is_graph_input():
            found[name] = to_torch(value.const_value.numpy(), value.const_value.dtype)
    return found


def spec_of(value: ir.Value) -> TensorSpec:
    kind = "tensor"
    if isinstance(value.type, ir.SequenceType):
        kind = "sequence"
    elif isinstance(value.type, ir.OptionalType):
        kind = "optional"
    shape = None
    if value.shape is not None and kind == "tensor":
        shape = tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return TensorSpec(value.name or "", dtype_name(value.dtype), shape, kind)


def check_profiles(graph: ir.Graph, profiles: tuple[Profile, ...]) -> None:
    inputs = {v.name: v for v in graph.inputs if v.name}
    for profile in profiles:
        for name, (low, _, high) in profile.shapes.items():
            if name not in inputs:
                raise ShapeError(
                    f"the profile names input {name!r}, the model has {sorted(inputs)}.{nearest(name, inputs)}"
                )
            shape = inputs[name].shape
            if shape is None:
                continue
            if len(low) != len(shape):
                raise ShapeError(f"profile of {name!r} has {len(low)} dimensions, the model's input has {len(shape)}")
            for d, a, b in zip(shape, low, high):
                if isinstance(d, int) and not a == b == d:
                    raise ShapeError(
                        f"profile of {name!r} is {list(low)}..{list(high)}, but the model fixes {list(map(str, shape))}"
                    )


def example_inputs(graph: ir.Graph, profile: Profile | None, seed: int) -> dict[str, Any] | None:
    """Random inputs at the profile's optimum; free dimensions without one are 1 (first axis) or 32.

    Floats are normal, integers 0 or 1 so that they are valid indices of anything. None when an input is no tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes: dict[str, int] = {}
    found = {}
    for value in graph.inputs:
        if not isinstance(value.type, ir.TensorType) or value.dtype not in STORAGE or value.shape is None:
            return None
        given = profile.shapes.get(value.name or "") if profile else None
        shape = []
        for i, d in enumerate(value.shape):
            if isinstance(d, int):
                shape.append(d)
            elif given is not None:
                shape.append(given[1][i])
                sizes[str(d)] = given[1][i]
            else:
                shape.append(sizes.setdefault(str(d), 1 if i == 0 else 32))
        storage = STORAGE[value.dtype]
        if storage.is_floating_point or storage.is_complex:
            found[value.name or ""] = torch.randn(shape, generator=generator).to(storage)
        else:
            found[value.name or ""] = torch.randint(0, 2, shape, generator=generator).to(storage)
    return found


def _plan_steps(
    graph: ir.Graph,
    weights: Mapping[str, Any],
    tuner: Tuner,
    examples: dict[str, Any] | None,
    progress: ProgressCallback | None,
) -> Settled:
    """Walk the graph once: choose a tactic on the values that the chosen kernels before it produced."""
    nodes = list(graph)
    env: dict[ir.Value, Any] = {}
    if examples is not None:
        env.update({v: examples[v.name or ""] for v in graph.inputs})
        env.update({v: weights[n] for n, v in graph.initializers.items() if n in weights})
    reads = [reads_of(n, weights) for n in nodes]
    last = {v: i for i, values in enumerate(reads) for v in values}
    plan = Settled([], [], [])
    live = examples is not None
    with torch.inference_mode():
        for i, node in enumerate(nodes):
            report(progress, "plan", i, len(nodes), node.name or "")
            region = RegionView(node, weights)
            args = [env.get(v) for v in reads[i]] if live else None
            choice = tuner.choose(region, args if not _has_subgraphs(node) else None)
            outputs: tuple[Any, ...] = ()
            if live:
                try:
                    result = choice.kernel.run(*args)  # type: ignore[misc]
                    outputs = result if isinstance(result, tuple) else (result,)
                    env.update(zip(node.outputs, outputs))
                except (*OPERATOR_ERRORS, VenturiError) as exc:
                    live = plan.complete = False
                    logger.warning("random inputs fail at %s (%s): the rest is planned without timing", node.name, exc)
            plan.steps.append(_step(region, choice, args, outputs))
            plan.kernels.append(choice.kernel)
            plan.problems.append(choice.problem)
            for value in [v for v in reads[i] if last[v] == i and not v.is_graph_output()]:
                env.pop(value, None)
    report(progress, "plan", len(nodes), len(nodes))
    return plan


def _has_subgraphs(node: ir.Node) -> bool:
    return not is_region(node) and bool(subgraphs(node))


def _step(region: RegionView, choice: Choice, args: list[Any] | None, outputs: tuple[Any, ...]) -> Step:
    constants = [c for v in region.formal if isinstance(c := region.constant(v), torch.Tensor)]
    moved = [t for t in (*(args or ()), *outputs, *constants) if isinstance(t, torch.Tensor)]
    return Step(
        region.name,
        region.kind,
        tuple(n.op_type for n in region.nodes),
        choice.tactic,
        choice.config,
        tuple(region.sources),
        choice.measurements,
        _flops(region, args, outputs),
        sum(t.nbytes for t in moved) if args is not None else 0,
        region.layout,
    )


def _flops(region: RegionView, args: list[Any] | None, outputs: tuple[Any, ...]) -> float:
    """Work of the first node that has some to speak of, at the tuned shapes; 0 when unknown. Of a pair both parts'."""
    if region.kind == PAIR:
        return sum(_static_flops(n, region) for n in anchors_of(region))
    seen = RealView(region) if region.kind == "quantized" else region
    counted = ((n, find_op(n.domain, n.op_type)) for n in seen.nodes)
    node, flops = next(((n, o.flops) for n, o in counted if o is not None and o.flops is not None), (None, None))
    if node is None or flops is None or not outputs or args is None or not isinstance(outputs[0], torch.Tensor):
        return 0.0
    shapes = []
    for v in node.inputs:
        at = seen.position(v)
        x = None if at is None else args[at]
        shapes.append(list(x.shape) if isinstance(x, torch.Tensor | np.ndarray) else static_shape(v) or [])
    try:
        return float(flops(shapes, [list(outputs[0].shape)], seen.attrs(node)))
    except (IndexError, KeyError):
        return 0.0


def _static_flops(node: ir.Node, region: RegionView) -> float:
    op, out = find_op(node.domain, node.op_type), static_shape(node.outputs[0])
    shapes = [static_shape(v) or [] for v in node.inputs]
    if op is None or op.flops is None or out is None:
        return 0.0
    try:
        return float(op.flops(shapes, [out], region.attrs(node)))
    except (IndexError, KeyError):
        return 0.0


def rename_steps(graph: ir.Graph, plan: Plan) -> Plan:
    """The same choices under the node names of `graph`."""
    return replace(plan, steps=tuple(replace(s, name=n.name or "") for s, n in zip(plan.steps, graph)))
