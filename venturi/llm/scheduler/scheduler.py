"""The scheduler. One rule: computed tokens catch up with known tokens, within a budget of tokens per step.

Decoding, chunked prefill, prefix hits and recomputation after a pause are the same thing here: a sequence has
len(tokens) - num_computed tokens to go. Pure Python over `KvCache`; called by `loop.py` only.
"""

from __future__ import annotations

from venturi.core.errors import RequestError
from venturi.llm.config import SchedulerConfig
from venturi.llm.kv.cache import KvCache
from venturi.llm.request import PENDING, FinishReason, Request, Sequence
from venturi.llm.scheduler.plan import Chunk, StepPlan
from venturi.llm.scheduler.policies import POLICIES


class Scheduler:
    """Owns the queues. `schedule` plans a step and assumes that it will be launched; not thread-safe."""

    def __init__(self, config: SchedulerConfig, cache: KvCache) -> None:
        self.config, self.cache = config, cache
        self.guaranteed = config.capacity_scheduler_policy == "GUARANTEED_NO_EVICT"
        self.waiting: list[Request] = []
        self.running: list[Sequence] = []
        self.paused: list[Sequence] = []
        self.num_pauses = 0
        self._promised = 0
        self._slots_used = 0
        self._free_slots = list(range(config.max_batch_size - 1, -1, -1))
        self._steps = 0
        self._admissions = 0
        self._failed_margin: int | None = None

    def blocks_bound(self, request: Request) -> int:
        """Blocks the request can hold at most: the prompt's full blocks once, the rest per continuation."""
        shared = request.num_prompt // self.cache.block_tokens
        total = self.cache.blocks_for(request.num_prompt + request.max_output)
        return shared + request.width * (total - shared)

    def check_fits(self, request: Request) -> None:
        """Raise RequestError, with the arithmetic, when the request can never run here."""
        need, size = self.blocks_bound(request), self.cache.block_tokens
        have = self.cache.pool.num_blocks
        if need > have:
            raise RequestError(
                f"the request can never fit the KV cache: {request.num_prompt} prompt + {request.max_output} new tokens"
                f" x {request.width} need {need} blocks of {size} tokens, the cache has {have} ({have * size} tokens);"
                " shorten the prompt, lower max_tokens, or raise kv_cache max_tokens"
            )
        if request.width > self.config.max_batch_size:
            raise RequestError(
                f"{request.width} continuations exceed max_batch_size={self.config.max_batch_size}; lower n or best_of"
            )

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        self._failed_margin = None

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can be computed before a launched step's tokens are known."""
        plan = StepPlan(self._steps)
        self._schedule_running(plan)
        if self.paused:
            self._resume(plan)
        elif self.waiting:
            self._admit(plan)
        if not plan.chunks and not self.cache.moves:
            return None
        plan.moves = self.cache.take_moves()
        self._steps += 1
        return plan

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End one sequence and give its blocks back. Unknown tokens at its end are dropped."""
        while seq.tokens[-1] == PENDING:
            seq.tokens.pop()
        seq.finish_reason = reason
        self._give_up_blocks(seq)
        for queue in (self.running, self.paused):
            if seq in queue:
                queue.remove(seq)
        self._slots_used -= 1
        self._free_slots.append(seq.slot)
        self._failed_margin = None

    def end(self, request: Request, reason: FinishReason) -> None:
        """End what is left of a request, wherever it is. Safe to call again."""
        if request in self.waiting:
            self.waiting.remove(request)
            for seq in request.sequences:
                seq.finish_reason = reason
        for seq in request.sequences:
            if not seq.finished:
                self.finish(seq, reason)
        if request.admitted and not request.forked:
            self._slots_used -= request.width - 1
            request.forked = True
        self._promised -= request.blocks_promised
        request.blocks_promised = 0

    def promise_again(self, request: Request) -> None:
        """Beams dropped and shared blocks: what the request may still take follows from what it holds now."""
        if not self.guaranteed:
            return
        held = {block for seq in request.sequences for block in seq.table.blocks}
        promised = self.blocks_bound(request) - len(held)
        self._promised += promised - request.blocks_promised
        request.blocks_promised = promised

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """`child` continues where `parent` is, on shared blocks, and is scheduled from the next step on."""
        self.cache.fork(parent.table, child.table)
        child.num_computed = parent.num_computed
        child.admitted = parent.admitted
        child.slot = self._free_slots.pop()
        self.running.append(child)

    def check_integrity(self) -> None:
        self.cache.check_integrity(seq.table for seq in [*self.running, *self.paused])

    # ---- one step

    def _schedule_running(self, plan: StepPlan) -> None:
        """Decoding sequences first, so that a long prompt delays nobody's next token; then chunks of prompts."""
        budget, prefilling = self.config.max_num_tokens, []
        refs, size = self.cache.pool.refs, self.cache.block_tokens
        chunks, draw_seqs, positions = plan.chunks, plan.draw_seqs, plan.draw_positions
        for seq in list(self.running):
            start, end = seq.num_computed, len(seq.tokens)
            request = seq.request
            if end - start != 1 or (request.width > 1 and not request.forked):
                if end > start:
                    prefilling.append(seq)
                continue
            if end - request.num_prompt >= request.max_output or (request.needs_history and seq.pending) or seq.paused:
                continue
            if plan.num_tokens >= budget:
                return
            blocks, index = seq.table.blocks, start // size
            own = index < len(blocks) and refs[blocks[index]] == 1
            if not own and not self._make_room(seq, end, plan):
                continue
            seq.num_computed = end
            seq.pending += 1
            seq.tokens.append(PENDING)
            plan.num_tokens += 1
            chunks.append(Chunk(seq, start, end, seq.epoch, 1))
            draw_seqs.append(seq)
            positions.append(end)
        for seq in prefilling:
            if plan.num_tokens >= budget:
                return
            if not seq.paused:
                self._plan_first(plan, seq)

    def _ready(self, seq: Sequence) -> bool:
        request = seq.request
        if len(seq.tokens) - request.num_prompt >= request.max_output:
            return False
        return not (request.needs_history and seq.pending)

    def _make_room(self, seq: Sequence, end: int, plan: StepPlan) -> bool:
        if seq.table.host_blocks:
            return False
        request = seq.request
        while True:
            before = self.cache.missing(seq.table, seq.num_computed, end)
            if self.cache.extend(seq.table, seq.num_computed, end):
                if self.guaranteed and before > 0:
                    self._promised -= before
                    request.blocks_promised -= before
                return True
            victim = self._victim(seq, plan)
            if victim is None:
                return False
            self._pause(victim)
            if victim is seq:
                return False

    def _victim(self, seq: Sequence, plan: StepPlan) -> Sequence | None:
        """The newest sequence that this step does not use yet; None when only planned ones are newer."""
        planned = {id(chunk.seq) for chunk in plan.chunks}
        free = [other for other in self.running if id(other) not in planned]
        return max(free, key=lambda other: (other.admitted, other.index), default=None)

    def _pause(self, seq: Sequence) -> None:
        self.num_pauses += 1
        seq.paused = True
        self.running.remove(seq)
        if not seq.pending and seq.request.beam is None and self.cache.swap_out(seq.table):
            seq.epoch += 1
        else:
            self._give_up_blocks(seq)
            seq.num_computed = 0
        self.paused.append(seq)

    def _give_up_blocks(self, seq: Sequence) -> None:
        self.cache.release(seq.table)
        seq.epoch += 1

    def _append(self, plan: StepPlan, seq: Sequence, end: int) -> None:
        request, members = seq.request, []
        start, seq.num_computed = seq.num_computed, end
        plan.num_tokens += end - start
        if end == len(seq.tokens):
            members = [seq]
            if request.width > 1 and not request.forked:
                for sibling in request.fork_siblings():
                    self.fork(seq, sibling)
                    members.append(sibling)
            for member in members:
                member.tokens.append(PENDING)
                member.pending += 1
                plan.draw_positions.append(end)
        plan.draw_seqs += members
        plan.chunks.append(Chunk(seq, start, end, seq.epoch, len(members)))

    # ---- entering the batch

    def _resume(self, plan: StepPlan) -> None:
        """Bring paused sequences back, oldest first, while there is room for all their tokens."""
        for seq in sorted(self.paused, key=lambda seq: (seq.admitted, seq.index)):
            if plan.num_tokens >= self.config.max_num_tokens:
                return
            if seq.tokens[-1] == PENDING:
                continue
            need = len(seq.table.host_blocks) or self.cache.blocks_for(len(seq.tokens)) - len(seq.table.blocks)
            if need + 1 > self.cache.num_available and self.running:
                return
            if seq.table.host_blocks:
                if not self.cache.swap_in(seq.table):
                    return
            elif not seq.table.blocks:
                seq.num_computed = self.cache.start(seq.table, seq.tokens)
            self.paused.remove(seq)
            seq.paused = False
            self.running.append(seq)
            self._plan_first(plan, seq)
            if seq.paused:
                return

    def _admit(self, plan: StepPlan) -> None:
        config = self.config
        margin = self.cache.num_available - self._promised
        if self.running and self._failed_margin is not None and margin <= self._failed_margin:
            return
        key = POLICIES[config.policy]
        if key is not None:
            self.waiting.sort(key=lambda request: key(request, self.cache))
        while self.waiting and plan.num_tokens < config.max_num_tokens:
            request = self.waiting[0]
            if self._slots_used + request.width > config.max_batch_size:
                return
            if not self._start(request):
                self._failed_margin = self.cache.num_available - self._promised
                return
            self.waiting.pop(0)
            self._plan_first(plan, request.sequences[0])

    def _start(self, request: Request) -> bool:
        seq, copies = request.sequences[0], len(self.cache.moves.copy)
        reused = 0
        if request.params.prompt_logprobs is None:
            reused = self.cache.start(seq.table, seq.tokens)
        held = len(seq.table.blocks)
        if self.guaranteed:
            need = self.blocks_bound(request) - held
            enough = need + self._promised <= self.cache.num_available
        else:
            need = 0
            enough = self.cache.blocks_for(len(seq.tokens)) + 1 - held <= self.cache.num_available or not self.running
        if not enough:
            self.cache.release(seq.table)
            del self.cache.moves.copy[copies:]
            return False
        request.blocks_promised = need
        self._promised += need
        request.num_cached = seq.num_computed = reused
        request.admitted = True
        self._slots_used += request.width
        self._admissions += 1
        seq.admitted = self._admissions
        seq.slot = self._free_slots.pop()
        self.running.append(seq)
        return True

    def _plan_first(self, plan: StepPlan, seq: Sequence) -> None:
        end = min(len(seq.tokens), seq.num_computed + self.config.max_num_tokens - plan.num_tokens)
        if self._ready(seq) and self._make_room(seq, end, plan):
            self._append(plan, seq, end)
