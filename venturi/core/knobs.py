"""Typed VENTURI_* environment flags. A knob is declared beside the code it steers; `venturi knobs` lists all.

A knob is read when it is used, never cached, and text that does not parse is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from venturi.core.errors import RequestError
from venturi.core.registry import Registry, nearest

T = TypeVar("T")
KNOBS: Registry[Knob[Any]] = Registry("knob", RequestError)


@dataclass(frozen=True)
class Knob(Generic[T]):
    name: str
    default: T
    parse: Callable[[str], T]
    help: str

    def get(self) -> T:
        text = os.environ.get(self.name)
        if text is None or text == "":
            return self.default
        try:
            return self.parse(text)
        except ValueError as exc:
            raise RequestError(
                f"{self.name}={text!r} is not valid: {exc}. {self.help} Default: {self.default!r}."
            ) from exc


def _parse_bool(text: str) -> bool:
    if text.lower() in ("1", "true", "on", "yes"):
        return True
    if text.lower() in ("0", "false", "off", "no"):
        return False
    raise ValueError("expected 0 or 1")


def bool_knob(name: str, default: bool, help: str) -> Knob[bool]:
    return KNOBS.add(name, Knob(name, default, _parse_bool, help))


def int_knob(name: str, default: int, help: str) -> Knob[int]:
    return KNOBS.add(name, Knob(name, default, int, help))


def str_knob(name: str, default: str, help: str) -> Knob[str]:
    return KNOBS.add(name, Knob(name, default, str, help))


def check_environment() -> None:
    """Raise RequestError for a VENTURI_* variable that is no knob, or whose text does not parse."""
    for name in os.environ:
        if not name.startswith("VENTURI_"):
            continue
        knob = KNOBS.find(name)
        if knob is None:
            raise RequestError(f"unknown environment variable {name}.{nearest(name, KNOBS)}")
        knob.get()


DEBUG = int_knob(
    "VENTURI_DEBUG",
    0,
    "0 silent, 1 engine summary, 2 time per Region, 3 tactic table, 5 graph after each pass.",
)
VERIFY = int_knob("VENTURI_VERIFY", 1, "0 none, 1 verify the graph after the pipeline, 2 after every pass.")
FUEL = int_knob("VENTURI_FUEL", -1, "Stop all passes after n rewrites; -1 is no limit.")
DUMP = str_knob("VENTURI_DUMP", "", "Folder that receives the graph after each pass as NN_pass.txt.")
NVTX = bool_knob(
    "VENTURI_NVTX",
    False,
    "Steps on a GPU are launched one by one, each in an NVTX range of its name, for Nsight Systems.",
)
CACHE = str_knob("VENTURI_CACHE", "", "Folder of the timing cache; default ~/.cache/venturi.")
SUPERVISED = bool_knob(
    "VENTURI_SUPERVISED", False, "Set by `venturi build` and `venturi tune` for the process that does their work."
)
CANDIDATE_S = int_knob(
    "VENTURI_CANDIDATE_S", 120, "Seconds after which these commands give up a kernel that is being tried on a GPU."
)
