"""How many threads a run of an engine on the CPU takes: small ones are faster on fewer than all."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from venturi.core.errors import TuningError
from venturi.core.fingerprint import num_physical_threads
from venturi.core.log import logger
from venturi.runtime.context import Context
from venturi.runtime.executable import Executable
from venturi.tuning.cache import Measurement, TimingCache

_LONG_US = 5000.0
_ROUNDS, _ROUND_US = 7, 2000.0
_GAIN = 0.95


def choose_threads(
    executable: Executable, args: Sequence[Any], problems: Sequence[str], cache: TimingCache, pinned: bool = False
) -> int | None:
    """The number that makes a run on `args` clearly faster than all threads do; None where none does.

    Runs of more than 5 ms are not tried. What the cache knows of an engine of these `problems` is not timed again;
    where choices are `pinned`, not to know is a TuningError.
    """
    cores = num_physical_threads()
    counts = [cores >> i for i in range(cores.bit_length())]
    if len(counts) < 2:
        return None
    key = "threads@" + hashlib.sha256("\n".join(problems).encode()).hexdigest()[:24]
    found = _times(cache.get(key) or [])
    if cores not in found:
        if pinned:
            raise TuningError(
                f"deterministic build: the timing cache {cache.path} does not know how many threads this engine takes; "
                "build once without deterministic and keep that cache"
            )
        measured = _measured(executable, args, counts)
        cache.put(key, measured)
        found = _times(measured)
    best = min(found, key=lambda n: found[n])
    logger.info("threads of a run: %s", {n: round(us, 1) for n, us in found.items()})
    return best if best != cores and found[best] < _GAIN * found[cores] else None


def _times(known: Sequence[Measurement]) -> dict[int, float]:
    """Microseconds by number of threads."""
    return {int(m.config["threads"]): m.median_us for m in known if m.tactic == "threads" and m.median_us is not None}


def _measured(executable: Executable, args: Sequence[Any], counts: Sequence[int]) -> list[Measurement]:
    """Of each count in turn, the whole again and again, so that a busy moment meets all of them."""
    contexts = {n: Context(executable, n) for n in counts}
    times: dict[int, list[float]] = {n: [] for n in counts}
    with torch.inference_mode():
        first = _us(contexts[counts[0]], args, 3)
        if first > _LONG_US:
            return [Measurement("threads", {"threads": counts[0]}, first)]
        runs = max(3, int(_ROUND_US / first))
        for _ in range(_ROUNDS):
            for n, context in contexts.items():
                times[n].append(_us(context, args, runs))
    return [Measurement("threads", {"threads": n}, statistics.median(t), max(t) - min(t)) for n, t in times.items()]


def _us(context: Context, args: Sequence[Any], runs: int) -> float:
    """Of a run, after one that does not count."""
    context.run(args)
    start = time.perf_counter()
    for _ in range(runs):
        context.run(args)
    return (time.perf_counter() - start) / runs * 1e6
