"""What is being tried, so that the next build passes over a candidate that took its process with it.

A kernel that faults makes a GPU unusable for its process, one that hangs has to be killed with it, and machine code of
the CPU may crash. While a candidate is bound, verified and timed, a locked file beside the timing cache names it. A
file that nobody has locked any more was left by a process that is gone: what it names is blocked, in the cache. A
process that another one watches over ends itself when a candidate takes too long.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from venturi.core.errors import LostDeviceError
from venturi.core.knobs import CANDIDATE_S, SUPERVISED
from venturi.core.log import logger
from venturi.tuning.cache import TimingCache

_SUFFIX = ".attempt"
REFERENCE = "reference"
BLOCKED = "blocked:"
ENDED = f"{BLOCKED} the process that tried it ended"


class Attempts:
    """Of tuners that share `cache`'s file; a cache without one keeps no record."""

    def __init__(self, cache: TimingCache) -> None:
        self._cache = cache
        self._collect()

    @contextlib.contextmanager
    def of(self, problem: str, tactic: str, config: Mapping[str, Any]) -> Iterator[None]:
        """Around everything that runs a candidate's code."""
        with contextlib.ExitStack() as left:
            record = None
            try:
                record = self._write(left, {"problem": problem, "tactic": tactic, "config": dict(config)})
            except OSError as exc:  # a folder that cannot be written keeps no cache either, some know no locks
                logger.debug("no record of attempts: %s", exc)
            if SUPERVISED.get() and tactic != REFERENCE:
                limit = CANDIDATE_S.get()
                watch = threading.Timer(limit, self._give_up, (record, limit, problem, tactic, config))
                watch.daemon = True
                watch.start()
                left.callback(watch.cancel)
            yield

    def _give_up(self, record: Path | None, limit: int, problem: str, tactic: str, config: Mapping[str, Any]) -> None:
        """Ends the process: what hangs on a GPU cannot be stopped otherwise."""
        try:
            logger.error("%s %s has not ended after %d s: it is not tried again", tactic, dict(config), limit)
            self._cache.block(problem, tactic, config, f"{BLOCKED} it had not ended after {limit} s")
            self._cache.save()
            if record is not None:
                record.unlink(missing_ok=True)
        finally:
            os._exit(LostDeviceError.status)

    def _write(self, left: contextlib.ExitStack, what: dict[str, Any]) -> Path | None:
        path = self._cache.path
        if path is None:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=_SUFFIX, prefix=path.stem + ".", dir=path.parent)
        left.callback(os.close, handle)
        left.callback(Path(name).unlink, missing_ok=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.write(handle, json.dumps(what).encode())
        return Path(name)

    def _collect(self) -> None:
        path = self._cache.path
        for file in [] if path is None else path.parent.glob(f"{path.stem}.*{_SUFFIX}"):
            with contextlib.suppress(OSError):
                self._settle(file)

    def _settle(self, file: Path) -> None:
        with file.open("r+b") as left:
            try:
                fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            try:
                found = json.loads(left.read())
                self._cache.block(found["problem"], found["tactic"], found["config"], ENDED)
                logger.warning("%s %s is not tried again: its process ended", found["tactic"], found["config"])
            except (ValueError, KeyError, TypeError):
                logger.debug("%s says nothing", file)
            file.unlink()
