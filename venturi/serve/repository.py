"""The models in service: loads, reloads and unloads them without dropping a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from venturi.core.errors import VenturiError
from venturi.core.log import logger
from venturi.core.registry import nearest
from venturi.serve.config import ModelConfig
from venturi.serve.errors import ServeError, as_serve_error, invalid, not_found, unavailable
from venturi.serve.folders import Source, chosen_versions, find_sources, read_labels, resolved_config, stamp_of
from venturi.serve.models.base import LoadedModel, ModelKind
from venturi.serve.models.ensemble import step_models
from venturi.serve.models.sequenced import SequencedModel
from venturi.serve.request import InferRequest
from venturi.serve.response_cache import Cache
from venturi.serve.schedulers.driver import Done
from venturi.serve.schedulers.rate_limit import RateLimiter
from venturi.serve.served import ServedVersion
from venturi.serve.tracing import Tracer
from venturi.serve.uploads import Uploads
from venturi.serve.warmup import warm_up

RETRY_S = 0.5  # before a model that could not be opened is tried again


class Mode(Enum):
    """none: all models at the start, then nothing changes; poll: as files change; explicit: by requests."""

    NONE = "none"
    POLL = "poll"
    EXPLICIT = "explicit"


class State(Enum):
    READY = "READY"
    UNAVAILABLE = "UNAVAILABLE"
    LOADING = "LOADING"
    UNLOADING = "UNLOADING"


@dataclass(frozen=True)
class Opened:
    """A version that is ready to serve. `stamp` changes with its files and configuration."""

    model: LoadedModel
    stamp: str


@dataclass
class Version:
    state: State
    reason: str = ""
    served: ServedVersion | None = None


@dataclass
class Model:
    versions: dict[int, Version] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


# By version; the configuration as completed; labels of classes by output.
OpenedModel = tuple[dict[int, Opened], ModelConfig, dict[str, tuple[str, ...]]]


class Repository:
    """Changed on the event loop only, read from anywhere; models are opened on worker threads. A model that cannot be
    opened is tried `retries` times more."""

    def __init__(
        self, roots: Sequence[Path], kinds: dict[str, ModelKind], mode: Mode = Mode.NONE, *,
        complete: bool = True, default_max_batch: int = 4, cache: Cache | None = None,
        tracer: Tracer | None = None, limiter: RateLimiter | None = None, retries: int = 0,
    ) -> None:  # fmt: skip
        self.mode, self._retries = mode, retries
        self._roots = list(roots)
        self._kinds = kinds
        self._complete = complete
        self._cache, self._tracer, self._limiter = cache, tracer, limiter
        self._uploads = Uploads()
        self._default_max_batch = default_max_batch
        self._models: dict[str, Model] = {}
        self._known: set[str] = set()
        self._changed: dict[str, int] = {}
        self._retiring: set[asyncio.Task[None]] = set()

    def find(self, name: str, version: str = "") -> ServedVersion:
        """The named version, or the newest ready one. Raises ServeError NOT_FOUND or UNAVAILABLE."""
        model = self._models.get(name)
        if model is None:
            raise not_found(f"Request for unknown model: '{name}' is not found")
        if version:
            if not (version.isascii() and version.isdigit()) or int(version) not in model.versions:
                raise not_found(f"Request for unknown model: '{name}' version {version} is not found")
            entry = model.versions[int(version)]
            if entry.state != State.READY or entry.served is None:
                raise unavailable(f"Request for unknown model: '{name}' version {version} is not at ready state")
            return entry.served
        ready = [v for v, e in list(model.versions.items()) if e.state == State.READY]
        if not ready:
            raise not_found(f"Request for unknown model: '{name}' has no available versions")
        served = model.versions[max(ready)].served
        assert served is not None, "ready versions are served"
        return served

    def submit(self, request: InferRequest, done: Done) -> None:
        """To the model that the request names; as `ServedVersion.submit`."""
        self.find(request.model, request.version).submit(request, done)

    def ready_versions(self, name: str) -> list[int]:
        model = self._models.get(name)
        return sorted(v for v, e in list(model.versions.items()) if e.state == State.READY) if model else []

    def served(self) -> Iterator[ServedVersion]:
        """Every ready version, by name and number."""
        for name in sorted(self._models):
            for version in self.ready_versions(name):
                yield self.find(name, str(version))

    @property
    def is_ready(self) -> bool:
        """Every version that should be there is."""
        entries = [e for m in list(self._models.values()) for e in list(m.versions.values())]
        return all(e.state == State.READY or e.reason == "unloaded" for e in entries)

    def index(self, ready_only: bool = False) -> list[dict[str, str]]:
        out: list[dict[str, str]] = []
        for name in sorted(self._known | set(self._models)):
            versions = self._models[name].versions if name in self._models else {}
            if not versions and not ready_only:
                out.append({"name": name})
            for number, entry in sorted(versions.items()):
                if entry.state == State.READY or not ready_only:
                    row = {"name": name, "version": str(number), "state": entry.state.value, "reason": entry.reason}
                    out.append(row)
        return out

    def scan(self) -> dict[str, Source]:
        """What lies in the repositories now."""
        sources = find_sources(self._roots)
        self._known = set(sources)
        return sources | self._uploads.sources()

    async def load_all(self, names: Sequence[str] | None = None) -> list[str]:
        """Load everything, or the named models; returns what failed, in words."""
        sources = await asyncio.to_thread(self.scan)
        wanted = list(sources) if names is None else list(names)
        loading: dict[str, asyncio.Task[None]] = {}

        async def after_steps(name: str) -> None:
            steps = await asyncio.to_thread(_steps_of, sources, name)
            await asyncio.gather(*(loading[s] for s in steps if s in loading and s != name), return_exceptions=True)
            await self.load(name)

        cycles = await asyncio.to_thread(_in_cycles, sources)
        for name in wanted:
            loading[name] = asyncio.ensure_future(self.load(name) if name in cycles else after_steps(name))
        results = await asyncio.gather(*loading.values(), return_exceptions=True)
        return [str(r) for r in results if isinstance(r, BaseException)]

    async def load(
        self, name: str, config: ModelConfig | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        """Load or reload; the versions in service stay until the new ones are ready. Raises ServeError.

        `files` ("<version>/<file>" -> content) take the place of the model's folder until it is unloaded.
        """
        if files is not None:
            uploaded = await asyncio.to_thread(self._uploads.write, name, files)
            try:
                await self._load(name, config, {name: uploaded})
            except BaseException:
                self._uploads.drop(uploaded)
                raise
            self._uploads.keep(uploaded)
            return
        await self._load(name, config, {})

    async def _load(self, name: str, config: ModelConfig | None, uploaded: dict[str, Source]) -> None:
        sources = await asyncio.to_thread(self.scan) | uploaded
        if name not in sources:
            raise not_found(f"failed to load '{name}', failed to poll from model repository: no such model."
                            f"{nearest(name, sorted(sources))}")  # fmt: skip
        source = sources[name]
        await self._load_steps(sources, name)
        model = self._models.setdefault(name, Model())
        async with model.lock:
            waiting = [v for v in source.versions() if v not in model.versions]
            for v in waiting:
                model.versions[v] = Version(State.LOADING)
            start = time.perf_counter()
            try:
                self._changed[name] = await asyncio.to_thread(source.changed_ns)
                opened, settings, labels = await self._open_again(source, config)
            except VenturiError as exc:
                for v in waiting:
                    model.versions[v] = Version(State.UNAVAILABLE, str(exc))
                error = as_serve_error(exc)
                raise ServeError(error.status, f"failed to load '{name}': {exc}") from exc
            for v in waiting:
                del model.versions[v]
            self._switch(model, settings, opened, labels, time.perf_counter() - start)
        logger.info("model %s is ready: versions %s", name, sorted(opened))

    async def _open_again(self, source: Source, config: ModelConfig | None) -> OpenedModel:
        for attempt in range(self._retries):
            try:
                return await asyncio.to_thread(self._open, source, config)
            except VenturiError as exc:
                logger.warning("model %s cannot be loaded (attempt %d): %s", source.name, attempt + 1, exc)
                await asyncio.sleep(RETRY_S)
        return await asyncio.to_thread(self._open, source, config)

    async def _load_steps(self, sources: dict[str, Source], name: str) -> None:
        """An ensemble brings the models that it is made of. Raises ServeError for cycles."""
        if name in await asyncio.to_thread(_in_cycles, sources):
            raise invalid(f"failed to load '{name}': circular dependency between ensembles")
        for step in await asyncio.to_thread(_steps_of, sources, name):
            if step in sources and not self.ready_versions(step):
                await self.load(step)

    async def unload(self, name: str, *, dependents: bool = False) -> None:
        """New requests are refused from now on; those in service are answered. Unknown names are no error.

        `dependents`: an ensemble takes its step models with it.
        """
        model = self._models.get(name)
        if model is None:
            return
        if dependents:
            sources = await asyncio.to_thread(self.scan)
            for step in await asyncio.to_thread(_steps_of, sources, name):
                await self.unload(step, dependents=True)
        self._uploads.forget(name)
        async with model.lock:
            for entry in model.versions.values():
                if entry.served is not None:
                    self._retire(entry)
                else:
                    entry.state, entry.reason = State.UNAVAILABLE, "unloaded"

    async def poll(self) -> None:
        """Load what is new or changed, unload what is gone."""
        sources = await asyncio.to_thread(self.scan)
        for name, source in sources.items():
            if await asyncio.to_thread(source.changed_ns) != self._changed.get(name):
                try:
                    await self.load(name)
                except ServeError as exc:
                    logger.error("%s; what was in service stays", exc)
        for name in [n for n in self._models if n not in sources]:
            await self.unload(name)
            self._changed.pop(name, None)

    async def close(self) -> None:
        """Unload everything and wait until it is gone."""
        for name in list(self._models):
            await self.unload(name)
        await asyncio.gather(*self._retiring)
        self._uploads.close()
        if self._cache is not None:
            await asyncio.to_thread(self._cache.close)

    def _open(self, source: Source, given: ModelConfig | None) -> OpenedModel:
        config, kind = resolved_config(
            source, self._kinds, given, complete=self._complete, default_max_batch=self._default_max_batch
        )
        labels = read_labels(source, config)
        opened: dict[int, Opened] = {}
        try:
            for version, folder in chosen_versions(config, source.versions()).items():
                stamp = "" if source.is_bare else stamp_of(folder, config)
                opened[version] = Opened(_load(kind, config, folder), stamp or str(source.changed_ns()))
        except BaseException:
            for one in opened.values():
                one.model.close()
            raise
        return opened, config, labels

    def _switch(
        self, model: Model, config: ModelConfig, opened: dict[int, Opened], labels: dict[str, tuple[str, ...]],
        seconds: float,
    ) -> None:  # fmt: skip
        """From one moment to the next, requests meet the new versions; the old ones finish their work."""
        old = dict(model.versions)
        for version, one in opened.items():
            served = ServedVersion(
                config, version, one.model, labels, self._cache, self._tracer, self._limiter, one.stamp
            )
            served.statistics.load_s = seconds
            model.versions[version] = Version(State.READY, served=served)
        for version, entry in old.items():
            if version not in opened or entry.served is not None:
                self._retire(entry)

    def _retire(self, entry: Version) -> None:
        served, entry.served = entry.served, None
        entry.state, entry.reason = State.UNLOADING, ""
        if served is None:
            entry.state, entry.reason = State.UNAVAILABLE, entry.reason or "unloaded"
            return

        async def finish() -> None:
            await served.retire()
            entry.state, entry.reason = State.UNAVAILABLE, "unloaded"

        task = asyncio.get_running_loop().create_task(finish())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)


def _load(kind: ModelKind, config: ModelConfig, folder: Path) -> LoadedModel:
    loaded = kind.load(config, folder)
    try:
        model = SequencedModel(loaded, config, folder) if config.HasField("sequence_batching") else loaded
        warm_up(model, config, folder)
        return model
    except BaseException:
        loaded.close()
        raise


def _steps_of(sources: dict[str, Source], name: str) -> list[str]:
    """The step models of an ensemble; none for other models and for what cannot be read."""
    try:
        return step_models(sources[name].config()) if name in sources else []
    except ServeError:
        return []


def _in_cycles(sources: dict[str, Source]) -> set[str]:
    """Ensembles that lead back to themselves."""
    steps = {name: _steps_of(sources, name) for name in sources}
    found = set()
    for name in steps:
        seen: set[str] = set()
        ahead = list(steps[name])
        while ahead:
            step = ahead.pop()
            if step not in seen:
                seen.add(step)
                ahead += steps.get(step, [])
        if name in seen:
            found.add(name)
    return found
