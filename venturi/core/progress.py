"""Progress of long work, and its cancellation. The builder reports; a CLI or a user's callback shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from venturi.core.errors import TuningError


@dataclass(frozen=True)
class ProgressEvent:
    """`phase` is import, passes, compile, plan, in place, pairs or pack; `step` of `num_steps` is done, the one that
    `detail` names."""

    phase: str
    step: int
    num_steps: int
    detail: str = ""


ProgressCallback = Callable[[ProgressEvent], bool | None]


def report(callback: ProgressCallback | None, phase: str, step: int, num_steps: int, detail: str = "") -> None:
    """Tell the callback; a callback that returns False cancels the work with TuningError."""
    if callback is not None and callback(ProgressEvent(phase, step, num_steps, detail)) is False:
        raise TuningError(f"cancelled by the progress callback in phase {phase!r} at step {step} of {num_steps}")
