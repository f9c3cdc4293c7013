"""How many requests a second one client may make: a bucket of tokens each, which one second fills."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from venturi.serve.errors import ServeError, Status

_MOST_CLIENTS = 10_000  # whoever has been silent for longest is forgotten, and starts with a full bucket


class OverQuota(ServeError):
    """`retry_s`: when there will be room again."""

    def __init__(self, per_s: float, retry_s: float) -> None:
        super().__init__(
            Status.LIMITED,
            f"this client makes more than {per_s:g} requests a second; try again in {retry_s:.3g} s",
        )
        self.retry_s = retry_s


class Quota:
    """Thread-safe. A client may make `per_s` requests at once (at least one), and so many a second on."""

    def __init__(self, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_s, self._clock = per_s, clock
        self._most = max(1.0, per_s)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def admit(self, client: str) -> None:
        """Raises OverQuota."""
        now = self._clock()
        with self._lock:
            tokens, since = self._buckets.pop(client, (self._most, now))
            tokens = min(self._most, tokens + (now - since) * self.per_s)
            admitted = tokens >= 1.0
            self._buckets[client] = (tokens - 1.0 if admitted else tokens, now)
            if len(self._buckets) > _MOST_CLIENTS:
                self._buckets.popitem(last=False)
        if not admitted:
            raise OverQuota(self.per_s, (1.0 - tokens) / self.per_s)
