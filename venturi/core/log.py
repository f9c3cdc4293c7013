"""Logging goes through the standard `venturi` logger; a caller may add its own callback."""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger("venturi")

LogCallback = Callable[[str, str], None]


class CallbackHandler(logging.Handler):
    """Forwards records to `callback(level_name, message)`. Used by `vt.build(logger=...)`."""

    def __init__(self, callback: LogCallback) -> None:
        super().__init__(logging.DEBUG)
        self._callback = callback

    def emit(self, record: logging.LogRecord) -> None:
        self._callback(record.levelname.lower(), record.getMessage())
