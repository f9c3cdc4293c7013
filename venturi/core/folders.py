"""Where the user's cache is. Nothing below it is ever needed: it only saves time."""

from __future__ import annotations

from pathlib import Path

from venturi.core import knobs


def cache_folder() -> Path:
    """$VENTURI_CACHE, else ~/.cache/venturi. It may not exist yet."""
    folder = knobs.CACHE.get()
    return Path(folder) if folder else Path.home() / ".cache" / "venturi"
