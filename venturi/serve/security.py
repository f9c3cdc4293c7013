"""Who may ask for what: API keys for everything but health, and headers that restricted APIs expect."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from venturi.core.errors import ModelError
from venturi.serve.errors import ServeError, Status, invalid
from venturi.serve.quota import Quota

APIS = (
    "health", "metadata", "inference", "shared-memory", "model-config", "model-repository", "statistics", "trace",
    "logging",
)  # fmt: skip
GRPC_PREFIX = "triton-grpc-protocol-"
_GRPC = {
    "ServerLive": "health", "ServerReady": "health", "ModelReady": "health", "Check": "health",
    "ServerMetadata": "metadata", "ModelMetadata": "metadata", "ModelInfer": "inference",
    "ModelStreamInfer": "inference", "ModelConfig": "model-config", "ModelStatistics": "statistics",
    "RepositoryIndex": "model-repository", "RepositoryModelLoad": "model-repository",
    "RepositoryModelUnload": "model-repository", "TraceSetting": "trace", "LogSettings": "logging",
}  # fmt: skip
_HTTP_ENDS = {
    "infer": "inference", "generate": "inference", "generate_stream": "inference", "config": "model-config",
    "stats": "statistics", "ready": "health", "setting": "trace", "inspect": "metadata",
}  # fmt: skip


@dataclass(frozen=True)
class Restriction:
    """The APIs answer only requests whose header `key` is `value`."""

    apis: frozenset[str]
    key: str
    value: str


@dataclass(frozen=True)
class Gate:
    """`keys` empty: no key is asked for. Restrictions are per protocol. `quota` counts by key, else by address."""

    keys: tuple[str, ...] = ()
    http: tuple[Restriction, ...] = ()
    grpc: tuple[Restriction, ...] = ()
    quota: Quota | None = None
    _open: frozenset[str] = field(default=frozenset({"health", "page"}), init=False)

    @property
    def is_open(self) -> bool:
        return not (self.keys or self.http or self.grpc or self.quota)

    def check_http(self, parts: Sequence[str], headers: Mapping[bytes, bytes], address: str) -> None:
        """Raises ServeError: 401 without a key, 403 for a restricted API, 429 for too many requests."""
        api = http_api(parts)
        authorization, api_key = (headers.get(n, b"").decode("latin-1") for n in (b"authorization", b"x-api-key"))
        self._check_key(api, authorization, api_key)
        self._count(api, authorization, api_key, address)
        for r in self.http:
            own = headers.get(r.key.lower().encode("latin-1"), b"").decode("latin-1")
            if api in r.apis and not hmac.compare_digest(own.encode(), r.value.encode()):
                raise ServeError(Status.RESTRICTED, f"This API is restricted, expecting header '{r.key}'")

    def check_grpc(self, method: str, metadata: Mapping[str, str]) -> None:
        """`method` is the whole path. Raises ServeError UNAUTHENTICATED or UNAVAILABLE."""
        name = method.rpartition("/")[2]
        api = _GRPC.get(name, "shared-memory")
        self._check_key(api, metadata.get("authorization", ""), metadata.get("x-api-key", ""))
        for r in self.grpc:
            header = GRPC_PREFIX + r.key.lower()
            if api in r.apis and not hmac.compare_digest(metadata.get(header, "").encode(), r.value.encode()):
                raise ServeError(Status.RESTRICTED, f"This protocol is restricted, expecting header '{header}'")

    def count_grpc(self, method: str, metadata: Mapping[str, str], peer: str) -> None:
        """`peer` as grpc has it, with a port. Raises ServeError RESOURCE_EXHAUSTED for too many requests."""
        authorization, api_key = (metadata.get(n, "") for n in ("authorization", "x-api-key"))
        self._count(_GRPC.get(method, "shared-memory"), authorization, api_key, peer.rpartition(":")[0])

    def _count(self, api: str, authorization: str, api_key: str, address: str) -> None:
        if self.quota is not None and api not in self._open:
            self.quota.admit(_token(authorization, api_key) if self.keys else address)

    def _check_key(self, api: str, authorization: str, api_key: str) -> None:
        if not self.keys or api in self._open:
            return
        given = _token(authorization, api_key)
        if not any(hmac.compare_digest(given.encode(), known.encode()) for known in self.keys):
            raise ServeError(
                Status.UNAUTHENTICATED, "an API key is needed: Authorization: Bearer KEY, or X-API-Key: KEY"
            )


def _token(authorization: str, api_key: str) -> str:
    scheme, _, token = authorization.partition(" ")
    return (token.strip() if scheme.lower() == "bearer" else "") or api_key


def http_api(parts: Sequence[str]) -> str:
    """The API that a path belongs to; "page" is the dashboard's page, which holds no data."""
    if tuple(parts) in (("",), ("dashboard",)):
        return "page"
    if tuple(parts[:2]) == ("v2", "health"):
        return "health"
    second = parts[1] if len(parts) > 1 else ""
    if second == "repository":
        return "model-repository"
    if second in ("systemsharedmemory", "cudasharedmemory"):
        return "shared-memory"
    if second == "logging":
        return "logging"
    return _HTTP_ENDS.get(parts[-1], "metadata")


def parse_restriction(text: str) -> Restriction:
    """API[,API...]:KEY=VALUE. Raises ServeError."""
    apis, _, header = text.partition(":")
    key, _, value = header.partition("=")
    names = frozenset(apis.split(","))
    unknown = sorted(names - set(APIS))
    if unknown or not key or not value:
        raise invalid(f"a restriction must be API[,API...]:KEY=VALUE with APIs of {', '.join(APIS)}, got {text!r}")
    return Restriction(names, key, value)


def read_keys(path: Path) -> tuple[str, ...]:
    """One key a line; empty lines and those that begin with # do not count. Raises ModelError."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as exc:
        raise ModelError(f"cannot read the API keys in {path}: {exc}") from exc
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ModelError(f"{path} holds no API key; expected one a line")
    return keys
