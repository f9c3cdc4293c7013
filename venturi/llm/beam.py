"""Beam search over the scheduler's sequences: keep the likeliest continuations, fork and drop their blocks.

Each step asks for the 2 * width likeliest tokens of every beam. Candidates that end go to the finished list with
score = logprob / length ** length_penalty; the best `width` others become the beams (the scheme of Freitag and
Al-Onaizan, 2017, with twice the width so that endings never starve the beams).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from venturi.llm.kv.cache import BlockTable
from venturi.llm.request import FinishReason, Request, Sequence, TokenLogprobs
from venturi.llm.scheduler.plan import Detail

if TYPE_CHECKING:
    from venturi.llm.scheduler.scheduler import Scheduler


@dataclass(frozen=True)
class Hypothesis:
    """A finished continuation."""

    output: list[int]
    logprob: float
    score: float
    reason: FinishReason
    logprobs: list[TokenLogprobs]


class BeamSearch:
    def __init__(self, request: Request) -> None:
        self.request = request
        self.width = request.width
        self.finished_list: list[Hypothesis] = []
        self.finished = False
        self.reason: FinishReason = "length"
        self._results: dict[int, Detail] = {}
        self._first = True

    def collect(self, seq: Sequence, drawn: Detail) -> bool:
        """Note a beam's candidates; True when every beam has its own."""
        self._results[seq.index] = drawn
        return len(self._results) == len(self.request.sequences)

    def advance(self, scheduler: Scheduler) -> None:
        """Choose the new beams from all candidates and rebuild the sequences."""
        request, params = self.request, self.request.params
        length = request.sequences[0].num_output
        chosen: list[tuple[float, Sequence, int, TokenLogprobs]] = []
        for logprob, seq, token, top in self._candidates():
            if token in request.stop_ids and length >= params.min_tokens:
                self._finish([*seq.output[:-1], token], logprob, "stop", [*seq.logprobs, top])
            elif len(chosen) < self.width:
                chosen.append((logprob, seq, token, top))
        self._results, self._first = {}, False
        if not chosen:
            self.finished, self.reason = True, "stop"
            return
        worst = (float("-inf"), *chosen[-1][1:])
        self._rebuild(scheduler, chosen + [worst] * (self.width - len(chosen)))
        if length >= request.max_output:
            for seq in request.sequences:
                self._finish(seq.output, seq.cumulative_logprob, "length", seq.logprobs)
            self.finished = True
        elif len(self.finished_list) >= self.width and (params.early_stopping or not self._can_improve()):
            self.finished, self.reason = True, "stop"

    def _candidates(self) -> list[tuple[float, Sequence, int, TokenLogprobs]]:
        sequences = self.request.sequences[:1] if self._first else self.request.sequences
        found = []
        for seq in sequences:
            top = self._results[seq.index].top or {}
            for token, entry in top.items():
                if entry.logprob > float("-inf"):
                    found.append((seq.cumulative_logprob + entry.logprob, seq, token, {token: entry}))
        found.sort(key=lambda candidate: (-candidate[0], candidate[1].index, candidate[2]))
        return found[: 2 * self.width]

    def _rebuild(self, scheduler: Scheduler, chosen: list[tuple[float, Sequence, int, TokenLogprobs]]) -> None:
        cache, sequences = scheduler.cache, self.request.sequences
        states = []
        for logprob, parent, token, top in chosen:
            table = BlockTable()
            cache.fork(parent.table, table)
            states.append((table, [*parent.tokens[:-1], token], logprob, [*parent.logprobs, top], parent.num_computed))
        for seq in sequences:
            cache.release(seq.table)
            seq.epoch += 1
        for seq, (table, tokens, logprob, logprobs, computed) in zip(sequences, states):
            seq.table, seq.tokens, seq.cumulative_logprob, seq.logprobs = table, tokens, logprob, logprobs
            seq.num_computed, seq.pending = computed, 0
        scheduler.promise_again(self.request)

    def _finish(self, output: list[int], logprob: float, reason: FinishReason, logprobs: list[TokenLogprobs]) -> None:
        score = logprob / max(1, len(output)) ** self.request.params.length_penalty
        self.finished_list.append(Hypothesis(output, logprob, score, reason, logprobs))
        self.finished_list.sort(key=lambda h: -h.score)
        del self.finished_list[self.width :]

    def _can_improve(self) -> bool:
        best = max(seq.cumulative_logprob for seq in self.request.sequences)
        length = self.request.sequences[0].num_output
        return bool(best / max(1, length) ** self.request.params.length_penalty > self.finished_list[-1].score)
