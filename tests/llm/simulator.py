"""A model that does nothing but remember: it stores tokens where keys would be, and checks every read.

Each step first carries out the block moves, then checks that the blocks of every chunk hold exactly the tokens before it,
then writes the chunk's own. The next token is a hash of all tokens so far, so a wrong cache gives wrong text as well.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from venturi.llm.request import PENDING, Logprob, Sequence
from venturi.llm.scheduler.plan import Detail, StepPlan, StepResult
from venturi.llm.step_inputs import InputBuilder

VOCAB = 50


def next_token(tokens: list[int], salt: int = 0) -> int:
    return zlib.crc32(bytes(t % 256 for t in tokens), salt) % VOCAB


@dataclass
class Launched:
    answer: StepResult | Exception

    def result(self) -> StepResult:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class RememberingRunner:
    """A StepRunner. `fault(plan)` may return an exception, raised at launch ("launch", e) or at result ("result", e)."""

    def __init__(
        self,
        num_blocks: int,
        block_tokens: int,
        host_blocks: int = 0,
        fault: Callable[[StepPlan], tuple[str, Exception] | None] = lambda plan: None,
    ) -> None:
        self.size = block_tokens
        self.device = [[None] * block_tokens for _ in range(num_blocks)]
        self.host = [[None] * block_tokens for _ in range(host_blocks)]
        self.fault = fault
        self.builder = InputBuilder(64, 64, block_tokens)
        self.max_batch = 0
        self.max_tokens = 0
        self.last: dict[int, tuple[Sequence, dict[int, int]]] = {}

    def launch(self, plan: StepPlan) -> Launched:
        for source, target in plan.moves.swap_out:
            self.host[target] = list(self.device[source])
        for source, target in plan.moves.copy:
            self.device[target] = list(self.device[source])
        for source, target in plan.moves.swap_in:
            self.device[target] = list(self.host[source])
        fault = self.fault(plan)
        if fault is not None and fault[0] == "launch":
            raise fault[1]
        self.max_batch = max(self.max_batch, len(plan.chunks))
        self.max_tokens = max(self.max_tokens, plan.num_tokens)
        assert plan.num_tokens == sum(c.end - c.start for c in plan.chunks)
        if plan.chunks:
            inputs = self.builder.build(plan)
            for table, chunk in zip(inputs.tables, plan.chunks):
                assert table[: len(chunk.seq.table.blocks)].tolist() == chunk.seq.table.blocks[: inputs.tables.shape[1]]
            assert len(inputs.tokens) == plan.num_tokens
            assert len(inputs.sample_rows) == len(plan.draw_seqs)
        written: set[tuple[int, int]] = set()
        drawn, details, row = [], {}, 0
        for chunk in plan.chunks:
            tokens = self._values(chunk.seq)[: chunk.end]
            blocks = chunk.seq.table.blocks
            for position in range(chunk.start):
                block, offset = blocks[position // self.size], position % self.size
                assert self.device[block][offset] == tokens[position], (
                    f"position {position} of {chunk.end}: wrong cache content"
                )
            for position in range(chunk.start, chunk.end):
                place = (blocks[position // self.size], position % self.size)
                assert place not in written, "two sequences write one place"
                written.add(place)
                self.device[place[0]][place[1]] = tokens[position]
            for _ in range(chunk.draws):
                token, detail = self._draw(plan.draw_seqs[row], plan.draw_positions[row], tokens)
                drawn.append(token)
                if detail is not None:
                    details[row] = detail
                row += 1
        assert row == len(plan.draw_seqs) == len(plan.draw_positions)
        if fault is not None:
            return Launched(fault[1])
        return Launched(StepResult(drawn, details))

    def prepare(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _draw(self, seq: Sequence, position: int, tokens: list[int]) -> tuple[int, Detail | None]:
        token = next_token(tokens, seq.index if seq.request.beam is None else 0)
        self.last.setdefault(id(seq), (seq, {}))[1][position] = token
        if seq.request.beam is None:
            return token, None
        ranked = [(next_token(tokens, k), -0.1 * (k + 1)) for k in range(2 * seq.request.width)]
        return token, Detail(-1.0, {t: Logprob(p, 1) for t, p in ranked})

    def _values(self, seq: Sequence) -> list[int]:
        known = self.last.get(id(seq), (seq, {}))[1]
        return [known[i] if t == PENDING and i in known else t for i, t in enumerate(seq.tokens)]


def random_prompt(rng: random.Random, shared: list[list[int]], longest: int) -> list[int]:
    """Prompts that share prefixes, at block borders and inside blocks."""
    base = rng.choice(shared)[: rng.randrange(longest)] if rng.random() < 0.7 else []
    return base + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, longest - len(base) + 1))]
