"""Joins two Regions into one kernel where the whole engine becomes faster by it.

The second reads what the first one computes, and nothing else that comes from there. Which of such pairs are worth it
only time can tell: a kernel for both saves writing or reading a tensor, and gives up what either does best alone. Pairs
that solve the same problem are joined together, in a copy of the graph, those that save the most first; they stay
joined when the engine becomes faster.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir
import torch

from venturi.backends.base import Kernel, RegionView
from venturi.backends.part_view import PAIR
from venturi.core.errors import TuningError, VenturiError
from venturi.core.log import logger
from venturi.core.progress import ProgressCallback, report
from venturi.engine.in_place import Settled
from venturi.engine.plan import Step
from venturi.engine.target import EngineTimer, Target
from venturi.ir.build import static_shape
from venturi.ir.marks import LAYOUT, NHWC
from venturi.ir.region import dissolve, form_region, is_region
from venturi.ir.verify import sort_topologically
from venturi.ops.tensors import STORAGE
from venturi.passes import naming
from venturi.passes.rewriting import PassContext
from venturi.runtime.executable import link, reads_of
from venturi.tuning.attempts import REFERENCE
from venturi.tuning.cache import Measurement
from venturi.tuning.tuner import Choice, Tuner

_GAIN, _CONFIGS = 0.999, 3
_APART = Measurement("apart", {})
# Positions of the two Regions in a graph where nothing is joined.
Place = tuple[int, int]


@dataclass(frozen=True)
class Joined:
    """A pair with its kernel."""

    place: Place
    step: Step
    kernel: Kernel


@dataclass
class Pairing:
    """`measure` is the Target's engine timer; `pinned`: what the cache does not know is an error."""

    graph: ir.Graph
    weights: Mapping[str, Any]
    target: Target
    tuner: Tuner
    measure: EngineTimer
    pinned: bool = False
    _choices: dict[Place, Choice] = field(default_factory=dict)

    def settle(self, plan: Settled, progress: ProgressCallback | None = None) -> None:
        """Joins Regions of the graph, with their steps and kernels in `plan`."""
        groups = self._groups(plan)
        if not groups:
            return
        cache = self.tuner.cache
        key = "pairs@" + hashlib.sha256("\n".join(plan.problems).encode()).hexdigest()[:24]
        chosen = cache.get(key)
        if chosen is None:
            if self.pinned:
                raise TuningError(
                    f"deterministic build: the timing cache {cache.path} does not know this engine's pairs; build once "
                    "without deterministic and keep that cache"
                )
            chosen = self._measured(plan, groups, progress)
            if time.perf_counter() <= self.tuner.deadline:
                cache.put(key, chosen or [_APART])
        joined = [j for m in chosen if m != _APART for j in self._bound(plan, _places(m), m, self._choice(_places(m)))]
        if joined:
            settled = _join_all(self.graph, plan, joined)
            naming.run(self.graph, PassContext())
            plan.steps[:] = [replace(s, name=n.name or "") for s, n in zip(settled.steps, self.graph)]
            plan.kernels[:], plan.problems[:] = settled.kernels, settled.problems

    def _groups(self, plan: Settled) -> list[list[Place]]:
        """Pairs that some tactic takes, those that are alike together, those that move the most less first."""
        nodes = list(self.graph)
        found: dict[tuple[str, str, bool], list[Place]] = {}
        takes: dict[tuple[str, str, bool], bool] = {}
        for i, j in _neighbours(nodes, self.weights):
            first = nodes[i]
            key = (plan.problems[i], plan.problems[j], len(list(first.outputs[0].uses())) == 1)
            if key not in takes:
                takes[key] = bool(plan.problems[i] and plan.problems[j]) and self._has_tactic((i, j))
            if takes[key]:
                found.setdefault(key, []).append((i, j))
        return sorted(found.values(), key=lambda places: -_saved(nodes[places[0][0]]))

    def _has_tactic(self, place: Place) -> bool:
        (region,) = self._regions([place])
        return any(t.name != REFERENCE and not isinstance(t.match(region), str) for t in self.tuner.backend.tactics)

    def _regions(self, places: Sequence[Place]) -> list[RegionView]:
        """The pairs as Regions of a copy of the graph."""
        nodes = list(self.graph.clone())
        return [RegionView(_join(nodes[i], nodes[j]), self.weights) for i, j in places]

    def _choice(self, places: Sequence[Place]) -> Choice:
        """How the first of some pairs that are alike is best computed."""
        found = self._choices.get(places[0])
        if found is None:
            (region,) = self._regions(places[:1])
            found = self._choices[places[0]] = self.tuner.choose(region, self._examples(region))
        return found

    def _examples(self, region: RegionView) -> list[torch.Tensor]:
        """Random values of the Region's inputs, where and as they lie in the engine."""
        device = self.target.device
        generator = torch.Generator(device).manual_seed(0)
        found = []
        for value in region.dynamic:
            x = torch.randn(static_shape(value) or [], generator=generator, device=device)
            x = x.to(STORAGE[value.dtype])  # type: ignore[index]
            found.append(x.contiguous(memory_format=torch.channels_last) if region.layout == NHWC else x)
        return found

    def _measured(
        self, plan: Settled, groups: list[list[Place]], progress: ProgressCallback | None
    ) -> list[Measurement]:
        """For every group that makes the engine faster how its pairs are computed; the reason says which they are."""
        regions = [r for places in groups for r in self._regions(places[:1])]
        self.target.prepare(((t, r, c) for r in regions for t, c in self.tuner.expected(r)), progress)
        chosen: list[Measurement] = []
        joined: list[Joined] = []
        with torch.inference_mode():
            current = first = self._time(plan, [])
            for turn, places in enumerate(groups):
                report(progress, "pairs", turn, len(groups))
                free = _free(places, {i for j in joined for i in j.place})
                if current is None or not free or time.perf_counter() > self.tuner.deadline:
                    continue
                choice = self._choice(free)
                best: tuple[Measurement, list[Joined]] | None = None
                for m in [m for m in choice.measurements if m.median_us and m.tactic != REFERENCE][:_CONFIGS]:
                    trial = self._bound(plan, free, m, choice)
                    took = self._time(plan, [*joined, *trial]) if trial else None
                    if took is not None and took < _GAIN * current:
                        best, current = (m, trial), took
                if best is not None:
                    chosen.append(replace(best[0], reason=" ".join(f"{i}:{j}" for i, j in free)))
                    joined += best[1]
        logger.info("%d pairs joined: %s us a run, %s before", len(joined), current, first)
        return chosen

    def _bound(self, plan: Settled, places: Sequence[Place], m: Measurement, choice: Choice) -> list[Joined]:
        """Every pair with its own weights; nothing when a kernel cannot be bound."""
        tactic = self.tuner.backend.tactic(m.tactic)
        if tactic is None:
            return []
        found, nodes = [], list(self.graph)
        for place, region in zip(places, self._regions(places)):
            a, b = (plan.steps[i] for i in place)
            step = Step(
                region.name, PAIR, tuple(n.op_type for n in region.nodes), m.tactic, dict(m.config),
                tuple(region.sources), choice.measurements, a.flops + b.flops,
                a.bytes + b.bytes - _saved(nodes[place[0]]), region.layout,
            )  # fmt: skip
            try:
                found.append(Joined(place, step, tactic.bind(region, m.config)))
            except (RuntimeError, VenturiError) as exc:
                logger.debug("%s cannot be bound for a pair: %s", m.tactic, exc)
                return []
        return found

    def _time(self, plan: Settled, joined: Sequence[Joined]) -> float | None:
        copy = self.graph.clone()
        settled = _join_all(copy, plan, joined)
        try:
            return self.measure(link(copy, settled.steps, settled.kernels, self.weights), float("inf"))
        except (RuntimeError, VenturiError) as exc:
            logger.debug("a pair fails in the engine: %s", exc)
            return None


def rejoin(graph: ir.Graph, steps: Sequence[Step]) -> None:
    """Join the Regions of a freshly optimized graph that are one step in a plan of it; those that are not there any
    more are passed over."""
    named = {n.name: n for n in graph}
    joined = False
    for name in [s.name for s in steps if s.kind == PAIR]:
        at = next((i for i, c in enumerate(name) if c == "+" and name[:i] in named and name[i + 1 :] in named), None)
        if at is not None:
            _join(named.pop(name[:at]), named.pop(name[at + 1 :]))
            joined = True
    if joined:
        sort_topologically(graph)
        naming.run(graph, PassContext())


def _join(first: ir.Node, second: ir.Node) -> ir.Node:
    """One Region that computes both, in the graph of both."""
    name, layout = f"{first.name}+{second.name}", second.metadata_props.get(LAYOUT)
    pair = form_region(PAIR, [m for n in (first, second) for m in (dissolve(n) if is_region(n) else [n])])
    pair.name = name
    if layout is not None:
        pair.metadata_props[LAYOUT] = layout
    return pair


def _join_all(graph: ir.Graph, plan: Settled, joined: Sequence[Joined]) -> Settled:
    """Join the Regions of `graph`, the one that `plan` is for; what the plan is then."""
    nodes = list(graph)
    entries = dict(zip(nodes, zip(plan.steps, plan.kernels, plan.problems)))
    for j in joined:
        entries[_join(*(nodes[i] for i in j.place))] = (j.step, j.kernel, "")
    sort_topologically(graph)
    found = [entries[n] for n in graph]
    return Settled([s for s, _, _ in found], [k for _, k, _ in found], [p for _, _, p in found], plan.complete)


def _free(places: Sequence[Place], used: set[int]) -> list[Place]:
    """Those whose Regions are in no other pair."""
    free: list[Place] = []
    for place in places:
        if not used & set(place):
            free.append(place)
            used = used | set(place)
    return free


def _places(m: Measurement) -> list[Place]:
    return [(int(i), int(j)) for i, _, j in (text.partition(":") for text in m.reason.split())]


def _neighbours(nodes: Sequence[ir.Node], weights: Mapping[str, Any]) -> Iterator[Place]:
    """Nodes and Regions that read them, where nothing else that a Region reads comes from what it is joined with."""
    at = {node: i for i, node in enumerate(nodes)}
    behind: list[int] = []  # bit i: node i comes before
    for j, second in enumerate(nodes):
        reads = [at[p] for v in dict.fromkeys(reads_of(second, weights)) if (p := v.producer()) is not None and p in at]
        behind.append(functools.reduce(lambda found, i: found | behind[i] | 1 << i, reads, 0))
        for i in reads if is_region(second) else ():
            if not any(behind[k] >> i & 1 for k in reads):
                yield i, j


def _saved(first: ir.Node) -> int:
    """Bytes of what lies between: not read again, and not written if nobody else reads it."""
    value = first.outputs[0]
    alone = len(list(value.uses())) == 1 and not value.is_graph_output()
    return _nbytes(value) * (2 if alone else 1)


def _nbytes(value: ir.Value) -> int:
    shape = static_shape(value)
    return 0 if shape is None or value.dtype not in STORAGE else math.prod(shape) * STORAGE[value.dtype].itemsize
