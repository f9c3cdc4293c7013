"""The response cache as the command line names it."""

from __future__ import annotations

from collections.abc import Sequence

from venturi.core.errors import ModelError
from venturi.serve.redis_cache import open_redis
from venturi.serve.response_cache import Cache, ResponseCache


def parse_cache_config(given: Sequence[str]) -> Cache | None:
    """["local,size=1048576"], or ["redis,host=HOST", "redis,port=6379", ...]; several settings may stand in one item.

    Raises ModelError for anything else, DeviceError for a Redis that does not answer.
    """
    kinds = {item.partition(",")[0] for item in given}
    if not kinds:
        return None
    if len(kinds) > 1 or not kinds <= {"local", "redis"}:
        raise ModelError(f"--cache-config must be local,size=BYTES or redis,host=HOST, got {' '.join(given)!r}")
    settings = {}
    for item in given:
        for setting in item.split(",")[1:]:
            name, _, value = setting.partition("=")
            if not name or not value or name in settings:
                raise ModelError(f"--cache-config {item!r}: expected NAME=VALUE once each, got {setting!r}")
            settings[name] = value
    if kinds == {"redis"}:
        return open_redis(settings)
    size = settings.get("size", "")
    if set(settings) != {"size"} or not (size.isascii() and size.isdigit()) or not int(size):
        raise ModelError(f"--cache-config must be local,size=BYTES, got {' '.join(given)!r}")
    return ResponseCache(int(size))
