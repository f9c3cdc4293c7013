"""What one step computes: chunks of sequences, samples at their ends, block moves before. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from venturi.llm.kv.cache import Moves
from venturi.llm.request import Sequence, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Sample:
    """`seq` gets a token at `position`, drawn from the logits of its chunk's last token."""

    seq: Sequence
    position: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute positions start..end-1 of a sequence, whose blocks are `seq.table` at launch."""

    seq: Sequence
    start: int
    end: int
    epoch: int
    samples: list[Sample]


@dataclass(slots=True)
class StepPlan:
    index: int
    chunks: list[Chunk] = field(default_factory=list)
    moves: Moves = field(default_factory=Moves)
    num_tokens: int = 0

    @property
    def samples(self) -> list[Sample]:
        return [sample for chunk in self.chunks for sample in chunk.samples]

    @property
    def decode_only(self) -> bool:
        return all(chunk.end - chunk.start == 1 for chunk in self.chunks)


@dataclass
class Drawn:
    """Result of one sample: the token, log probabilities if asked for, or the error that this request alone gets."""

    token: int
    logprob: float = 0.0
    top: TokenLogprobs | None = None
    error: Exception | None = None


@dataclass
class StepResult:
    """`drawn` follows plan.samples; `prompt_logprobs` follows plan.chunks (None where not asked for)."""

    drawn: list[Drawn]
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
