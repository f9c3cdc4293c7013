"""The server without a protocol: what HTTP, gRPC and in-process callers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import venturi as vt
from venturi.serve.config import config_from_json, message_json
from venturi.serve.custom_metrics import CustomMetrics
from venturi.serve.errors import invalid, unavailable
from venturi.serve.logs import ServerLog
from venturi.serve.on_demand import OnDemand
from venturi.serve.repository import Mode, Repository
from venturi.serve.served import ServedVersion
from venturi.serve.shared_memory import Regions
from venturi.serve.tracing import Tracer

EXTENSIONS = (
    "classification", "model_repository", "model_configuration", "system_shared_memory", "cuda_shared_memory",
    "binary_tensor_data", "parameters", "statistics", "schedule_policy", "sequence", "trace", "logging",
    "model_repository(unload_dependents)",
)  # fmt: skip


class Core:
    """`load` and `unload` run on the event loop, the rest anywhere. `exiting` refuses new work. Without
    `strict_readiness` the server is ready although a model is not."""

    def __init__(
        self, repository: Repository, name: str = "venturi", *, allow_shared_memory: bool = False,
        tracer: Tracer | None = None, log: ServerLog | None = None, custom_metrics: CustomMetrics | None = None,
        strict_readiness: bool = True,
    ) -> None:  # fmt: skip
        self.repository = repository
        self._strict_readiness = strict_readiness
        self.tracer, self.log = tracer or Tracer(), log or ServerLog()
        self.regions = Regions(allow_shared_memory)
        self.custom_metrics = custom_metrics or CustomMetrics()
        self.name = name
        self.on_demand: OnDemand | None = None
        self.exiting = False
        self.started = False

    @property
    def is_ready(self) -> bool:
        return self.started and not self.exiting and (self.repository.is_ready or not self._strict_readiness)

    def metadata(self) -> dict[str, Any]:
        return {"name": self.name, "version": vt.__version__, "extensions": list(EXTENSIONS)}

    async def prepare(self, name: str) -> None:
        """Loads the model where models are loaded on demand; `find` right after it, before anything is awaited."""
        if self.on_demand is not None and not self.exiting:
            await self.on_demand.prepare(name)

    def find(self, name: str, version: str = "") -> ServedVersion:
        if self.exiting:
            raise unavailable("Server is shutting down and has stopped accepting new requests")
        return self.repository.find(name, version)

    def model_metadata(self, name: str, version: str = "") -> dict[str, Any]:
        served = self.find(name, version)
        versions = [version] if version else [str(v) for v in self.repository.ready_versions(name)]
        return served.metadata(versions)

    def model_config(self, name: str, version: str = "") -> dict[str, Any]:
        return message_json(self.find(name, version).config)

    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Of one version, of all ready versions of a model, or of everything."""
        if not name:
            found = list(self.repository.served())
        else:
            numbers = self.repository.ready_versions(name)
            if not numbers or (version and not (version.isdigit() and int(version) in numbers)):
                raise invalid(f"requested model '{name}' is not available")
            found = [self.repository.find(name, str(v)) for v in numbers if not version or v == int(version)]
        return {"model_stats": [v.statistics.to_json(v.name, str(v.version), v.responses.to_json()) for v in found]}

    async def load(self, name: str, config: object = None, files: Mapping[str, bytes] | None = None) -> None:
        """`config`: a configuration as JSON data that replaces the one on disk, or None. `files`: see `Repository`."""
        self._check_explicit()
        if files and config is None:
            raise invalid(f"failed to load '{name}': files are given, but no 'config' to read them with")
        given = None if config is None else config_from_json(config, f"the configuration given for '{name}'")
        await self.repository.load(name, given, files or None)

    async def unload(self, name: str, *, dependents: bool = False) -> None:
        self._check_explicit()
        await self.repository.unload(name, dependents=dependents)

    def trace_settings(self, model: str = "", given: dict[str, Any] | None = None) -> dict[str, Any]:
        """The settings in force, after `given` has changed them; of one model or, with "", of all."""
        if model:
            self.find(model)
        if given:
            self.tracer.update(given, model)
        return self.tracer.settings_of(model).to_json()

    def _check_explicit(self) -> None:
        if self.repository.mode != Mode.EXPLICIT:
            raise unavailable("explicit model load / unload is not allowed if polling is enabled "
                              "(start the server with --model-control-mode=explicit)")  # fmt: skip
