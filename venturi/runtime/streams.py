"""Which cores the runs of an engine on the CPU use: all of them for one run after the other, or a share for each of
several that run side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from venturi.core.errors import RequestError
from venturi.core.fingerprint import num_physical_threads
from venturi.core.log import logger


@dataclass(frozen=True)
class Threads:
    """`intra`: the most threads of one run, None for all cores. `streams`: runs side by side, each on cores of its own
    by a thread of its own; 0 runs in the caller's thread."""

    intra: int | None = None
    streams: int = 0

    @staticmethod
    def of(intra: int | None, streams: int | str | None) -> Threads:
        """`streams` may be "auto": one for each core. More than there are cores of either is cut, with a warning.
        Raises RequestError for what is no positive number."""
        cores = num_physical_threads()
        count = cores if streams == "auto" else streams
        for name, given in (("intra_threads", intra), ("streams", count)):
            if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
                known = ", 'auto'" if name == "streams" else ""
                raise RequestError(f"{name} must be a number from 1 on{known} or None, got {given!r}")
            if given is not None and given > cores:
                logger.warning("%s=%d: this process has %d cores, so it is %d", name, given, cores, cores)
        assert not isinstance(count, str)
        return Threads(None if intra is None else min(intra, cores), 0 if count is None else min(count, cores))

    def of_a_run(self, planned: int | None = None) -> int:
        """The most threads of one run, whose plan asks for `planned` at most."""
        share = num_physical_threads() // max(1, self.streams)
        return max(1, min(n for n in (share, self.intra, planned) if n is not None))


ALL_CORES = Threads()


def shares(cores: Sequence[int], streams: int) -> list[list[int]]:
    """Cores of each stream, neighbours together.

    >>> shares([0, 1, 2, 3, 4], 2)
    [[0, 1], [2, 3, 4]]
    """
    n = len(cores)
    return [list(cores[i * n // streams : (i + 1) * n // streams]) for i in range(streams)]


def pin(stream: int, streams: int) -> None:
    """Keep the calling thread, and the threads it will start, on its share of the process's cores. Where the system
    cannot, or a quota rather than cores is the limit, it moves freely."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if num_physical_threads() >= len(cores):
        os.sched_setaffinity(0, shares(cores, streams)[stream])
