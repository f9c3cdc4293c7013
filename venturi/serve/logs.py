"""The server's log on stderr, or in a file, and its settings, as the logging extension has them."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from venturi.core.errors import ModelError
from venturi.core.log import logger
from venturi.serve.errors import invalid, unsupported

_LETTERS = {logging.DEBUG: "V", logging.INFO: "I", logging.WARNING: "W", logging.ERROR: "E", logging.CRITICAL: "E"}
FORMATS = ("default", "ISO8601", "json")


@dataclass(frozen=True)
class LogSettings:
    """Field names are the protocol's. log_verbose_level above 0 adds debug messages."""

    log_file: str = ""
    log_info: bool = True
    log_warning: bool = True
    log_error: bool = True
    log_verbose_level: int = 0
    log_format: str = "default"

    def admits(self, level: int) -> bool:
        if level >= logging.ERROR:
            return self.log_error
        if level >= logging.WARNING:
            return self.log_warning
        return self.log_info if level >= logging.INFO else self.log_verbose_level > 0


class ServerLog(logging.Handler):
    """Writes what the settings admit. Installed by `start`, taken away by `close`; settings change at any time."""

    def __init__(self, settings: LogSettings = LogSettings()) -> None:
        super().__init__(logging.DEBUG)
        self.settings = settings
        self._level_before = logger.level

    def start(self) -> None:
        """Raises ModelError when the log file cannot be written."""
        try:
            self._write("")
        except OSError as exc:
            raise ModelError(f"the log file cannot be written: {exc}; choose another --log-file") from exc
        logger.addHandler(self)
        logger.setLevel(logging.DEBUG)

    def stop(self) -> None:
        logger.removeHandler(self)
        logger.setLevel(self._level_before)

    def to_json(self) -> dict[str, Any]:
        return asdict(self.settings)

    def update(self, given: dict[str, Any]) -> None:
        """Raises ServeError that names the setting; then nothing has changed."""
        if "log_file" in given:
            raise unsupported("log file location can not be updated through the network protocol")
        kinds = {"log_info": bool, "log_warning": bool, "log_error": bool, "log_verbose_level": int, "log_format": str}
        for name, value in given.items():
            if name not in kinds:
                raise invalid(f"unexpected log setting '{name}', expected one of {', '.join(kinds)}")
            if type(value) is not kinds[name]:
                raise invalid(f"log setting '{name}' must be a {kinds[name].__name__}, got {value!r}")
        if given.get("log_format", "default") not in FORMATS:
            raise invalid(f"log setting 'log_format' must be one of {', '.join(FORMATS)}, got {given['log_format']!r}")
        if given.get("log_verbose_level", 0) < 0:
            raise invalid("log setting 'log_verbose_level' must not be negative")
        self.settings = replace(self.settings, **given)

    def emit(self, record: logging.LogRecord) -> None:
        if self.settings.admits(record.levelno):
            message = record.getMessage()
            failed = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
            if self.settings.log_format == "json":
                line = _json_line(record, message, failed)
            else:
                line = self._prefix(record) + message + (f"\n{failed}" if failed else "")
            try:
                self._write(f"{line}\n")
            except OSError as exc:  # a full disk must not fail what wanted to say something
                print(f"{line}\nthe log file cannot be written: {exc}", file=sys.stderr, flush=True)

    def _write(self, text: str) -> None:
        """A file is opened each time, so that it may be moved away."""
        if self.settings.log_file:
            with Path(self.settings.log_file).open("a", encoding="utf-8") as file:
                file.write(text)
        else:
            print(text, end="", file=sys.stderr, flush=True)

    def _prefix(self, record: logging.LogRecord) -> str:
        letter, place = _LETTERS.get(record.levelno, "I"), f"{record.filename}:{record.lineno}"
        whole, micro = _when(record)
        if self.settings.log_format == "ISO8601":
            return f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', whole)} {letter} {record.process} {place}] "
        return f"{letter}{time.strftime('%m%d %H:%M:%S', whole)}.{micro:06d} {record.process} {place}] "


def _when(record: logging.LogRecord) -> tuple[time.struct_time, int]:
    """UTC, and microseconds."""
    return time.gmtime(record.created), int(record.created % 1 * 1e6)


def _json_line(record: logging.LogRecord, message: str, failed: str) -> str:
    """One object a record, in one line; `exception` is the traceback, where there is one."""
    whole, micro = _when(record)
    found = {
        "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', whole)}.{micro:06d}Z", "level": record.levelname.lower(),
        "process": record.process, "place": f"{record.filename}:{record.lineno}", "message": message,
    }  # fmt: skip
    return orjson.dumps(found | ({"exception": failed} if failed else {})).decode()
