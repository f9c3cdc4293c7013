"""The seam for kinds of models: load a version's folder, describe it, execute batches."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from venturi.serve.config import ModelConfig
from venturi.serve.errors import ServeError
from venturi.serve.request import InferRequest, InferResponse


class Later(enum.Enum):
    """RESCHEDULE: the request shall be run again, as the first of its sequence."""

    RESCHEDULE = enum.auto()


Answer = InferResponse | ServeError | Later | None


class LoadedModel(Protocol):
    """One version of a model, ready to run; used by one thread per instance at once.

    `runs_inline`: a fast model may be run by the thread that has the request, even the event loop's.
    """

    runs_inline: bool

    def execute(self, requests: list[InferRequest]) -> Sequence[Answer]:
        """Runs the requests as one batch and fills in their times; an exception fails all of them.

        None for a request that is answered later, through its `finish`; RESCHEDULE for one that is to run again.
        """

    def inspect(self) -> dict[str, Any]:
        """Its inside as JSON data: an engine's layers, or `reason` why there are none to show."""

    def close(self) -> None:
        """Gives memory back; nothing is executed after it."""


class ModelKind(Protocol):
    """A class of models that a repository can hold."""

    name: str

    def complete(self, config: ModelConfig, folder: Path | None, default_max_batch: int) -> None:
        """Fill in what the configuration leaves out, in place, from the newest version's `folder`."""

    def load(self, config: ModelConfig, folder: Path) -> LoadedModel:
        """Blocking; on a worker thread. Raises VenturiError when the version cannot be served."""
