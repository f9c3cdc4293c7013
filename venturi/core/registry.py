"""A name → thing table whose lookups suggest the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from venturi.core.errors import VenturiError

T = TypeVar("T")


def nearest(name: str, choices: Iterable[str]) -> str:
    """The closest choice to `name`, as text for a message: " Did you mean 'x'?" or ""."""
    folded = {c.lower(): c for c in choices}
    found = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.6)
    return f" Did you mean {folded[found[0]]!r}?" if found else ""


class Registry(Generic[T]):
    """Names are unique; registering one twice is an error."""

    def __init__(self, what: str, error: type[VenturiError]) -> None:
        self._what = what
        self._error = error
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> T:
        if name in self._items:
            raise self._error(f"{self._what} {name!r} is registered twice")
        self._items[name] = item
        return item

    def get(self, name: str) -> T:
        """Raises the registry's error, with the nearest name, when `name` is unknown."""
        try:
            return self._items[name]
        except KeyError:
            raise self._error(f"no {self._what} named {name!r}.{nearest(name, self._items)}") from None

    def find(self, name: str) -> T | None:
        return self._items.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))

    def __len__(self) -> int:
        return len(self._items)
