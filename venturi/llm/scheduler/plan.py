"""What one step computes: chunks of sequences, tokens drawn at their ends, block moves before. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from venturi.llm.kv.cache import Moves
from venturi.llm.request import Sequence, TokenLogprobs


@dataclass(slots=True)
class Chunk:
    """Compute positions start..end-1 of a sequence, whose blocks are `seq.table` at launch.

    `draws` sequences get a token drawn from the logits of its last position: none while tokens are missing, the
    sequence itself, or all continuations of a prompt.
    """

    seq: Sequence
    start: int
    end: int
    epoch: int
    draws: int


@dataclass(slots=True)
class StepPlan:
    """`draw_seqs` and `draw_positions` list, chunk after chunk, who gets a token at which place of its tokens."""

    index: int
    chunks: list[Chunk] = field(default_factory=list)
    moves: Moves = field(default_factory=Moves)
    num_tokens: int = 0
    draw_seqs: list[Sequence] = field(default_factory=list)
    draw_positions: list[int] = field(default_factory=list)

    @property
    def decode_only(self) -> bool:
        return self.num_tokens == len(self.chunks)


@dataclass(slots=True)
class Detail:
    """What is known of a drawn token beyond its id: log probabilities, or the error that this request alone gets."""

    logprob: float = 0.0
    top: TokenLogprobs | None = None
    error: Exception | None = None


@dataclass
class StepResult:
    """`tokens` follows plan.draw_seqs; `details` has entries (by place there) only where something was asked for.

    prompt_logprobs: by place in plan.chunks, where asked for.
    """

    tokens: list[int]
    details: dict[int, Detail] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)


class PendingStep(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """Wait for the step and fetch its tokens."""


class StepRunner(Protocol):
    """Computes steps in the order they are launched. The seam that tests replace."""

    def prepare(self) -> None:
        """Called once, by the thread that will launch."""

    def launch(self, plan: StepPlan) -> PendingStep: ...

    def close(self) -> None:
        """Free what the runner holds."""
