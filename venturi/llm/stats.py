"""Counters of the engine loop, and what `LLM.stats()` returns."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from venturi.llm.request import FinishReason, Request
from venturi.llm.scheduler.plan import StepPlan


@dataclass
class LoopStats:
    """Totals since the start. Times in seconds."""

    steps: int = 0
    tokens_computed: int = 0
    tokens_generated: int = 0
    prompt_tokens: int = 0
    prompt_tokens_cached: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)

    def on_launch(self, plan: StepPlan) -> None:
        self.steps += 1
        self.tokens_computed += plan.num_tokens

    def on_collect(self, plan: StepPlan) -> None:
        self.tokens_generated += len(plan.draw_seqs)

    def on_end(self, request: Request, reason: FinishReason) -> None:
        self.ended[reason] += 1
        self.prompt_tokens += request.num_prompt
        self.prompt_tokens_cached += request.num_cached

    def as_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        fields["ended"] = dict(self.ended)
        fields["uptime_s"] = time.monotonic() - fields.pop("started")
        return fields
