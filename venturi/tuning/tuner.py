"""Chooses a tactic for every Region: candidates are bound, verified against the reference, timed, remembered."""

from __future__ import annotations

import contextlib
import functools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from venturi.backends.base import (
    Backend,
    Config,
    Kernel,
    RegionView,
    Tactic,
    disagreement,
    masks_operands,
    region_slack,
    region_ulps,
)
from venturi.core.errors import LostDeviceError, TuningError, VenturiError
from venturi.core.log import logger
from venturi.tuning.attempts import BLOCKED, REFERENCE, Attempts
from venturi.tuning.cache import Measurement, TimingCache
from venturi.tuning.timer import CpuTimer, Timer

REPEATS = {0: 0, 1: 3, 2: 5, 3: 7, 4: 15, 5: 30}
TIE = 1.03
_SAVE_EVERY_S = 10.0


@dataclass(frozen=True)
class Choice:
    """What was chosen for a Region and what it was chosen from; `problem` names what was timed, if anything was."""

    tactic: str
    config: dict[str, Any]
    kernel: Kernel
    measurements: tuple[Measurement, ...]
    problem: str = ""


@dataclass
class Tuner:
    """Candidates within 3 % of the fastest are a tie, which the backend's order of preference decides.

    `level` 0 takes the first tactic that matches; above, candidates are timed until `budget_s` is spent. `pinned` times
    nothing: what the cache does not know is an error."""

    backend: Backend
    cache: TimingCache
    level: int = 3
    budget_s: float | None = None
    strict: bool = False
    pinned: bool = False
    timer: Timer = field(default_factory=CpuTimer)
    started: float = field(default_factory=time.perf_counter)
    _saved: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._attempts = Attempts(self.cache)

    def choose(self, region: RegionView, args: Sequence[Any] | None) -> Choice:
        """`args` are the Region's dynamic inputs at the tuned shape; None tunes by preference alone."""
        candidates, rejected = self._candidates(region)
        if not candidates:
            raise TuningError(
                "no tactic accepts this Region: " + "; ".join(f"{m.tactic}: {m.reason}" for m in rejected),
                where=region.name,
            )
        names = {t.name for t, _ in candidates}
        if self.strict and names == {REFERENCE}:
            raise TuningError(
                "strict mode: only the reference can compute this Region; "
                + "; ".join(f"{m.tactic}: {m.reason}" for m in rejected),
                where=region.name,
            )
        if self.level == 0 or args is None or len(candidates) == 1:
            return self._first(region, candidates, rejected)
        problem = region.signature() + "@" + ",".join(_describe(a) for a in args)
        known = self.cache.get(problem)
        if known is not None:
            choice = None if self._allowed_again(problem, known) else self._from_cache(region, candidates, known)
            if choice is not None:
                return replace(choice, problem=problem)
        if self.pinned:
            raise TuningError(
                f"deterministic build: the timing cache {self.cache.path} does not know {problem!r} with today's "
                "candidates on this machine; build once without deterministic and keep that cache",
                where=region.name,
            )
        return replace(self._measure(region, args, candidates, rejected, problem), problem=problem)

    def expected(self, region: RegionView) -> list[tuple[Tactic, Config]]:
        """What `choose` may bind for the Region: winners the cache knows at any shape, else every candidate."""
        winners: list[tuple[Tactic, Config]] = []
        for known in self.cache.starting_with(region.signature() + "@"):
            timed = [m for m in known if m.median_us is not None]
            best = self._winner(timed) if timed else None
            tactic = self.backend.tactic(best.tactic) if best is not None else None
            if best is not None and tactic is not None:
                winners.append((tactic, best.config))
        candidates, _ = self._candidates(region)
        return winners or candidates[: 1 if self.level == 0 else None]

    def _winner(self, timed: Sequence[Measurement]) -> Measurement:
        """The preferred tactic's fastest configuration among those within a tie of the fastest of all."""
        fastest = min(m.median_us or 0.0 for m in timed)
        order = {t.name: i for i, t in enumerate(self.backend.tactics)}
        tied = [m for m in timed if (m.median_us or 0.0) <= TIE * fastest]
        return min(tied, key=lambda m: (order.get(m.tactic, len(order)), m.median_us))

    def _candidates(self, region: RegionView) -> tuple[list[tuple[Tactic, Config]], list[Measurement]]:
        candidates: list[tuple[Tactic, Config]] = []
        rejected = []
        for tactic in self.backend.tactics:
            found = tactic.match(region)
            if isinstance(found, str):
                rejected.append(Measurement(tactic.name, {}, reason=found))
            else:
                candidates.extend((tactic, c) for c in found)
        return candidates, rejected

    def _first(
        self, region: RegionView, candidates: list[tuple[Tactic, Config]], rejected: list[Measurement]
    ) -> Choice:
        """The first candidate that can be prepared. Raises what the last one raises when none can."""
        failed: list[Measurement] = []
        for i, (tactic, config) in enumerate(candidates):
            try:
                kernel = tactic.bind(region, config)
            except TuningError as exc:
                if i + 1 == len(candidates):
                    raise
                failed.append(Measurement(tactic.name, dict(config), reason=f"failed: {exc}"))
                continue
            others = [Measurement(t.name, dict(c), reason="not timed") for t, c in candidates[i + 1 :]]
            chosen = Measurement(tactic.name, dict(config), reason="first match" if others else "only match")
            return Choice(tactic.name, dict(config), kernel, (chosen, *others, *failed, *rejected))
        raise AssertionError("there is at least one candidate")

    def _allowed_again(self, problem: str, known: list[Measurement]) -> bool:
        """Whether what was passed over as blocked is not blocked any more."""
        blocked = {_candidate(m.tactic, m.config) for m in self.cache.blocked(problem)}
        return any(m.reason.startswith(BLOCKED) and _candidate(m.tactic, m.config) not in blocked for m in known)

    def _from_cache(
        self, region: RegionView, candidates: list[tuple[Tactic, Config]], known: list[Measurement]
    ) -> Choice | None:
        """None when the cache lacks a candidate that there is now. What was timed then and cannot run now is passed
        over: a container may refuse what the same CPU has elsewhere."""
        now = {_candidate(t.name, c) for t, c in candidates}
        seen = {_candidate(m.tactic, m.config): m for m in known}
        timed = [m for k, m in seen.items() if m.median_us is not None and k in now]
        if not timed or now - set(seen):
            return None
        best = self._winner(timed)
        tactic = self.backend.tactic(best.tactic)
        if tactic is None:
            return None
        return Choice(best.tactic, best.config, tactic.bind(region, best.config), tuple(known))

    def _measure(
        self,
        region: RegionView,
        args: Sequence[Any],
        candidates: list[tuple[Tactic, Config]],
        rejected: list[Measurement],
        problem: str,
    ) -> Choice:
        reference_kernel = candidates[-1][0].bind(region, candidates[-1][1])
        poisoned = [_poison(a) for a in args]
        with self.backend.exact():
            want = reference_kernel.run(*args)
            want_poisoned = reference_kernel.run(*poisoned)
        ulps, slack, hides = region_ulps(region), region_slack(region), masks_operands(region)

        @functools.cache
        def defined() -> Any:
            assert self.backend.plain is not None
            with self.backend.plain():
                return reference_kernel.run(*poisoned)

        def wrong(kernel: Kernel) -> str | None:
            reason = disagreement(kernel.run(*args), want, ulps, slack=slack)
            if reason:
                return reason
            got = kernel.run(*poisoned)
            reason = disagreement(got, want_poisoned, ulps, may_hide=hides, slack=slack)
            if reason and self.backend.plain is not None:
                reason = disagreement(got, defined(), ulps, may_hide=hides, slack=slack)
            return reason

        measured: list[tuple[Measurement, Kernel]] = []
        blocked = {_candidate(m.tactic, m.config): m.reason for m in self.cache.blocked(problem)}
        out_of_time = False
        for tactic, config in candidates:
            reason = blocked.get(_candidate(tactic.name, config), "")
            if measured and self._spent():
                reason, out_of_time = "budget spent", True
            if reason:
                rejected.append(Measurement(tactic.name, dict(config), reason=reason))
                continue
            beat = min((m.median_us or 0.0 for m, _ in measured), default=None)
            known = reference_kernel if tactic.name == REFERENCE else None
            with self._attempts.of(problem, tactic.name, config):
                found, kernel = self._tried(region, args, tactic, config, known, wrong, beat, problem)
            if kernel is not None:
                measured.append((found, kernel))
            else:
                logger.debug("%s: %s rejected: %s", region.name, tactic.name, found.reason)
                rejected.append(found)
        measured.sort(key=lambda m: m[0].median_us or 0.0)
        best = self._winner([m for m, _ in measured])
        kernel = next(k for m, k in measured if m is best)
        measurements = [m for m, _ in measured] + rejected
        if not out_of_time:
            self.cache.put(problem, measurements)
            if time.perf_counter() - self._saved > _SAVE_EVERY_S:
                self._save()
        return Choice(best.tactic, best.config, kernel, tuple(measurements))

    def _tried(
        self, region: RegionView, args: Sequence[Any], tactic: Tactic, config: Config, reference: Kernel | None,
        wrong: Callable[[Kernel], str | None], beat: float | None, problem: str,
    ) -> tuple[Measurement, Kernel | None]:  # fmt: skip
        """The candidate's time and kernel, or why there is none. Raises LostDeviceError when it loses the device."""
        try:
            kernel = tactic.bind(region, config) if reference is None else reference
            reason = None if reference is not None else wrong(kernel)
            if not reason:
                call = kernel.parallel.prepared(args) if kernel.parallel is not None else None
                call = call or (lambda: kernel.run(*args))
                timing = self.timer.time(call, REPEATS[self.level], self.deadline, beat)
                times = round(timing.median_us, 2), round(timing.spread_us, 2)
                return Measurement(tactic.name, dict(config), *times), kernel
        except (RuntimeError, ValueError, TypeError, IndexError, VenturiError) as exc:
            said = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
            reason = f"failed: {said}"
            if not self.backend.is_well():
                self.cache.block(problem, tactic.name, config, f"{BLOCKED} it faulted: {said}")
                self._save()
                raise LostDeviceError(
                    f"{tactic.name} {dict(config)} faulted and the device is lost to this process: {said}. Build again "
                    f"in a new one: the timing cache {self.cache.path} knows what to pass over",
                    where=region.name,
                ) from exc
        return Measurement(tactic.name, dict(config), reason=reason or ""), None

    def _save(self) -> None:
        """So that a build that is stopped goes on where it was."""
        with contextlib.suppress(OSError):  # told once, when the build ends
            self.cache.save()
        self._saved = time.perf_counter()

    def _spent(self) -> bool:
        return self.budget_s is not None and time.perf_counter() - self.started > self.budget_s

    @property
    def deadline(self) -> float:
        """When the budget is spent, on time.perf_counter's clock."""
        return float("inf") if self.budget_s is None else self.started + self.budget_s


def _candidate(tactic: str, config: Config) -> tuple[str, str]:
    return tactic, repr(sorted(config.items()))


def _poison(x: Any) -> Any:
    """A copy of a floating tensor with a NaN and both infinities: tactics must treat them as the reference does."""
    if not isinstance(x, torch.Tensor) or not x.dtype.is_floating_point or x.dtype.itemsize == 1 or x.numel() < 8:
        return x
    out = x.clone(memory_format=torch.preserve_format)
    flat = random.Random(x.numel()).sample(range(x.numel()), 3)
    for value, at in zip((float("nan"), float("inf"), -float("inf")), flat):
        out[tuple(int(i) for i in np.unravel_index(at, x.shape))] = value
    return out


def _describe(x: Any) -> str:
    """Type, shape and layout of an argument: what its speed may depend on."""
    if not isinstance(x, torch.Tensor):
        return type(x).__name__
    if x.is_contiguous():
        layout = ""
    elif x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        layout = "nhwc"
    else:
        layout = f"{tuple(x.stride())}"
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}{layout}"
