"""A request and its sequences, as the scheduler and the loop see them. No torch, no text.

tokens:   | prompt ............... | output ..... | PENDING |
          0             num_prompt ^              ^ sampled by a launched step, value not yet on the host
          |--- num_computed: keys and values written by launched steps ---|
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from venturi.llm.kv.cache import BlockTable
from venturi.llm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from venturi.llm.beam import BeamSearch

PENDING = -1
FinishReason = Literal["stop", "length", "cancelled", "error"]
_ids = itertools.count()


@dataclass(frozen=True)
class Logprob:
    """Log probability of a token, and its rank among all (1 is the likeliest)."""

    logprob: float
    rank: int


TokenLogprobs = dict[int, Logprob]


@dataclass(eq=False)
class Sequence:
    """One continuation of a request's prompt."""

    request: Request
    index: int
    tokens: list[int]
    table: BlockTable = field(default_factory=BlockTable)
    num_computed: int = 0
    epoch: int = 0  # grows when the blocks are given up: chunks launched before belong to another table
    admitted: int = 0
    pending: int = 0
    slot: int = -1
    paused: bool = False
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    cumulative_logprob: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    guide: Any = None
    text_scan: Any = None

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.request.num_prompt

    @property
    def output(self) -> list[int]:
        return self.tokens[self.request.num_prompt :]

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(eq=False)
class Request:
    """Prompt, parameters and progress. `max_output` is max_tokens cut to what the context allows."""

    prompt: list[int]
    params: SamplingParams
    max_output: int
    stop_ids: frozenset[int] = frozenset()
    bad_words: list[list[int]] = field(default_factory=list)
    priority: int = 0
    seed: int = 0
    listener: Any = None
    streaming: bool = True
    plain: bool = False  # its tokens need no more than to be stored
    id: int = field(default_factory=lambda: next(_ids))
    arrival: float = field(default_factory=time.monotonic)
    first_token: float = 0.0
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    num_cached: int = 0
    blocks_promised: int = 0
    admitted: bool = False
    forked: bool = False
    done: bool = False
    abort_requested: bool = False
    error: Exception | None = None
    beam: BeamSearch | None = None

    def __post_init__(self) -> None:
        self.num_prompt = len(self.prompt)
        self.needs_history = self.params.needs_history
        self.width = self.params.width
        params = self.params
        edits = params.penalizes or params.logit_bias or params.bad_token_ids or params.min_tokens
        self.edits_logits = bool(self.needs_history or edits)
        self.wants_logprobs = params.logprobs is not None or params.use_beam_search or self.width > params.n
        self.plainly_greedy = params.temperature == 0 and not self.edits_logits and not self.wants_logprobs
        if not self.sequences:
            self.sequences = [Sequence(self, 0, list(self.prompt))]

    def fork_siblings(self) -> list[Sequence]:
        """The other continuations, made when the first one's prompt is computed."""
        first = self.sequences[0]
        new = [Sequence(self, i, list(self.prompt), num_computed=first.num_computed) for i in range(1, self.width)]
        for seq in new:
            seq.guide = first.guide and first.guide.copy()
            seq.text_scan = first.text_scan and first.text_scan.fresh()
        self.sequences += new
        self.forked = True
        return new
