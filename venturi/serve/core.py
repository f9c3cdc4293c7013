"""The server without a protocol: what HTTP, gRPC and in-process callers share."""

from __future__ import annotations

from typing import Any

import venturi as vt
from venturi.serve.config import config_from_json, message_json
from venturi.serve.errors import invalid, unavailable
from venturi.serve.repository import Mode, Repository
from venturi.serve.served import ServedVersion
from venturi.serve.shared_memory import Regions

EXTENSIONS = (
    "classification", "model_repository", "model_configuration", "system_shared_memory", "binary_tensor_data",
    "parameters", "statistics", "schedule_policy",
)  # fmt: skip


class Core:
    """`load` and `unload` run on the event loop, the rest anywhere. `exiting` refuses new work."""

    def __init__(self, repository: Repository, name: str = "venturi", *, allow_shared_memory: bool = False) -> None:
        self.repository = repository
        self.regions = Regions(allow_shared_memory)
        self.name = name
        self.exiting = False
        self.started = False

    @property
    def is_ready(self) -> bool:
        return self.started and not self.exiting and self.repository.is_ready

    def metadata(self) -> dict[str, Any]:
        return {"name": self.name, "version": vt.__version__, "extensions": list(EXTENSIONS)}

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
        return {"model_stats": [v.statistics.to_json(v.name, str(v.version)) for v in found]}

    async def load(self, name: str, config: object = None) -> None:
        """`config`: a configuration as JSON data that replaces the one on disk, or None."""
        self._check_explicit()
        given = None if config is None else config_from_json(config, f"the configuration given for '{name}'")
        await self.repository.load(name, given)

    async def unload(self, name: str) -> None:
        self._check_explicit()
        await self.repository.unload(name)

    def _check_explicit(self) -> None:
        if self.repository.mode != Mode.EXPLICIT:
            raise unavailable("explicit model load / unload is not allowed if polling is enabled "
                              "(start the server with --model-control-mode=explicit)")  # fmt: skip
