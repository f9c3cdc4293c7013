"""Settles close choices by timing whole engines: there kernels overlap, wait for each other and share the caches.

Coordinate descent: for every problem of the engine, the most expensive first, each candidate that was close when timed
alone takes the place of the current one in all its Regions; it stays when the engine becomes faster, twice in a row.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch

from venturi.backends.base import Backend, Kernel, RegionView
from venturi.core.errors import TuningError, VenturiError
from venturi.core.log import logger
from venturi.core.progress import ProgressCallback, report
from venturi.engine.plan import Step
from venturi.engine.target import EngineTimer
from venturi.runtime.executable import link
from venturi.tuning.cache import Measurement, TimingCache

PASSES = {0: 0, 1: 0, 2: 1, 3: 2, 4: 3, 5: 4}
_CLOSE, _CLOSE_US = 2.0, 3.0
_PER_TACTIC, _PER_PROBLEM = 3, 8
_GAIN, _HOPELESS = 0.999, 1.01


@dataclass
class Settled:
    """Steps in the order of the graph's nodes with their kernels, and the problem each step solves ("" if none).

    `complete`: the example inputs went through all of them.
    """

    steps: list[Step]
    kernels: list[Kernel]
    problems: list[str]
    complete: bool = True


@dataclass
class InPlace:
    """`measure` is a Target's engine timer. `pinned`: what the cache does not know is an error."""

    graph: ir.Graph
    weights: Mapping[str, Any]
    backend: Backend
    measure: EngineTimer
    cache: TimingCache
    deadline: float = float("inf")
    pinned: bool = False

    def settle(self, plan: Settled, passes: int, progress: ProgressCallback | None = None) -> None:
        """Replaces steps and kernels of `plan` in place."""
        problems = [p for p in dict.fromkeys(plan.problems) if p and len(_close(self._step(plan, p))) > 1]
        if not problems or not passes:
            return
        key = "in place@" + hashlib.sha256("\n".join(plan.problems).encode()).hexdigest()[:24]
        known = self.cache.get(key)
        if known is not None and self._recall(plan, known):
            return
        with torch.inference_mode():
            current = self._time(plan, {})
            if current is None:
                return
            if self.pinned:
                raise TuningError(
                    f"deterministic build: the timing cache {self.cache.path} does not know this engine's choices in "
                    "place; build once without deterministic and keep that cache"
                )
            problems.sort(key=lambda p: -plan.problems.count(p) * (self._step(plan, p).time_us or 0.0))
            first = current
            for turn in range(passes):
                before = current
                for i, problem in enumerate(problems):
                    report(progress, "in place", turn * len(problems) + i, passes * len(problems), problem[:60])
                    current = self._improve(plan, problem, current)
                if current > before * 0.998 or time.perf_counter() > self.deadline:
                    break
        logger.info("timed in place: %.1f us a run, %.1f before", current, first)
        if time.perf_counter() <= self.deadline:
            chosen = {p: self._step(plan, p) for p in problems}
            self.cache.put(key, [Measurement(s.tactic, s.config, reason=p) for p, s in chosen.items()])

    @staticmethod
    def _step(plan: Settled, problem: str) -> Step:
        return plan.steps[plan.problems.index(problem)]

    def _improve(self, plan: Settled, problem: str, current: float) -> float:
        step = self._step(plan, problem)
        for m in _close(step):
            if (m.tactic, m.config) == (step.tactic, step.config) or time.perf_counter() > self.deadline:
                continue
            trial = self._bound(plan, problem, m)
            took = self._time(plan, trial, current * _HOPELESS) if trial else None
            if took is None or took > current * _GAIN:
                continue
            again, now = self._time(plan, {}), self._time(plan, trial)
            if again is not None and now is not None and now < again * _GAIN:
                self._adopt(plan, trial, m)
                step, current = self._step(plan, problem), now
        return current

    def _bound(self, plan: Settled, problem: str, m: Measurement) -> dict[int, Kernel]:
        """Kernels of the candidate by position; empty when one cannot be bound."""
        tactic = self.backend.tactic(m.tactic)
        nodes = list(self.graph)
        if tactic is None:
            return {}
        try:
            return {
                i: tactic.bind(RegionView(nodes[i], self.weights), m.config)
                for i, p in enumerate(plan.problems)
                if p == problem
            }
        except (RuntimeError, VenturiError) as exc:
            logger.debug("%s cannot be bound in place: %s", m.tactic, exc)
            return {}

    def _time(self, plan: Settled, trial: Mapping[int, Kernel], hopeless: float = float("inf")) -> float | None:
        kernels = [trial.get(i, k) for i, k in enumerate(plan.kernels)]
        try:
            return self.measure(link(self.graph, plan.steps, kernels, self.weights), hopeless)
        except (RuntimeError, VenturiError) as exc:
            logger.debug("a candidate fails in place: %s", exc)
            return None

    @staticmethod
    def _adopt(plan: Settled, trial: Mapping[int, Kernel], m: Measurement) -> None:
        for i, kernel in trial.items():
            plan.kernels[i] = kernel
            plan.steps[i] = replace(plan.steps[i], tactic=m.tactic, config=dict(m.config))

    def _recall(self, plan: Settled, known: Sequence[Measurement]) -> bool:
        """Take over what an earlier build of the same engine settled; False when it does not fit any more."""
        for m in known:
            if m.reason not in plan.problems:
                return False
            step = self._step(plan, m.reason)
            if (m.tactic, m.config) == (step.tactic, step.config):
                continue
            trial = self._bound(plan, m.reason, m)
            if not trial:
                return False
            self._adopt(plan, trial, m)
        return True


def _close(step: Step) -> list[Measurement]:
    """The candidates worth trying: near the fastest, not all of one kind."""
    timed = sorted((m for m in step.measurements if m.median_us is not None), key=lambda m: m.median_us or 0.0)
    if not timed:
        return []
    fastest = timed[0].median_us or 0.0
    found: list[Measurement] = []
    for m in timed:
        near = (m.median_us or 0.0) <= max(_CLOSE * fastest, fastest + _CLOSE_US)
        if near and len(found) < _PER_PROBLEM and sum(f.tactic == m.tactic for f in found) < _PER_TACTIC:
            found.append(m)
    return found
