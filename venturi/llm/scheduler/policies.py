"""Orders of waiting requests: a policy is a sort key. To add one, add a line to `POLICIES`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from venturi.llm.kv.cache import KvCache
from venturi.llm.request import Request

Key = Callable[[Request, KvCache], Any]

POLICIES: dict[str, Key | None] = {
    "fcfs": None,
    "priority": lambda request, cache: (-request.priority, request.id),
    "longest-prefix": lambda request, cache: (-cache.cached_tokens(request.prompt), request.id),
}
