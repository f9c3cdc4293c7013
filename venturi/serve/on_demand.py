"""Models loaded by the first request that names them; beyond a budget, those that were asked for longest ago leave."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

from venturi.core.log import logger
from venturi.serve.errors import unavailable
from venturi.serve.models.ensemble import step_models
from venturi.serve.repository import Repository

_TRIES = 5


class OnDemand:
    """Used on the event loop only. `budget_bytes` bounds the files of the models in service, 0 for no bound.

    A model larger than the budget is served alone. Models that a loaded ensemble is made of stay while it does.
    """

    def __init__(self, repository: Repository, budget_bytes: int = 0) -> None:
        self._repository = repository
        self._budget = budget_bytes
        self._clock = itertools.count()
        self._used: dict[str, int] = {}
        self._bytes: dict[str, int] = {}
        self._loading: dict[str, asyncio.Lock] = {}

    async def prepare(self, name: str) -> None:
        """Returns with the model in service, or when no repository has it. Raises ServeError when it does not load."""
        self._used[name] = next(self._clock)
        if self._repository.ready_versions(name):
            return
        sources = await asyncio.to_thread(self._repository.scan)
        if name not in sources:
            del self._used[name]
            return
        lock = self._loading.setdefault(name, asyncio.Lock())
        for _ in range(_TRIES):
            async with lock:
                if not self._repository.ready_versions(name):
                    await self._repository.load(name)
                    self._bytes |= await asyncio.to_thread(lambda: {n: _size(s.path) for n, s in sources.items()})
                    await self._shrink(name)
            if self._repository.ready_versions(name):
                return
        raise unavailable(f"model '{name}' was loaded and displaced by others {_TRIES} times: the memory budget of "
                          f"{self._budget} bytes is too small for the models in use")  # fmt: skip

    async def _shrink(self, keep: str) -> None:
        """Unload what was used longest ago until the rest fits."""
        while self._budget:
            loaded = sorted({s.name for s in self._repository.served()})
            needed = {keep} | {s for n in loaded for s in step_models(self._repository.find(n).config)}
            total = sum(self._bytes.get(n, 0) for n in loaded)
            others = [n for n in loaded if n not in needed]
            if total <= self._budget or not others:
                return
            oldest = min(others, key=lambda n: self._used.get(n, -1))
            logger.info("model %s leaves: %d bytes are loaded, the budget is %d", oldest, total, self._budget)
            self._used.pop(oldest, None)
            await self._repository.unload(oldest)


def _size(path: Path) -> int:
    """Bytes of a model's files."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)
