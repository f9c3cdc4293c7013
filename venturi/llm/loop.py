"""The engine loop: schedule, launch, collect. One step is launched before the one before it is collected (overlap).

`EngineLoop.step` is the whole engine without threads; `EngineThread` runs it and is what `api.py` talks to.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from venturi.core.errors import InternalError, RequestError, VenturiError
from venturi.core.log import logger
from venturi.llm.request import FinishReason, Request, Sequence
from venturi.llm.scheduler.plan import Detail, PendingStep, StepPlan, StepRunner
from venturi.llm.scheduler.scheduler import Scheduler
from venturi.llm.stats import LoopStats


class EngineLoop:
    """Turns requests into tokens. Not thread-safe.

    Args:
        scheduler, runner: who decides and who computes.
        overlap: steps that may be launched and not yet collected, beyond the newest (0 or 1).
    """

    def __init__(self, scheduler: Scheduler, runner: StepRunner, *, overlap: bool) -> None:
        self.scheduler, self.runner = scheduler, runner
        self.stats = LoopStats()
        self._depth = 1 if overlap else 0
        self._launched: deque[tuple[StepPlan, PendingStep]] = deque()

    def add(self, request: Request) -> None:
        first = request.sequences[0]
        watched = request.streaming and request.listener is not None
        request.plain = not (watched or request.beam or first.guide or first.text_scan)
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        self._end(request, "cancelled", None)

    def give_up(self, request: Request, cause: Exception | None) -> None:
        """The final reply of a request when the engine ends: cancelled, or the engine's failure."""
        if cause is None:
            self.abort(request)
        elif not request.done:
            request.done, request.error = True, InternalError(f"the engine has failed: {cause!r}")
            if request.listener is not None:
                request.listener.on_end()

    def step(self) -> bool:
        """Launch what can be launched, collect what must be; False when there was nothing to do."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self._launch(plan)
        if self._launched and (plan is None or len(self._launched) > self._depth):
            self._collect(*self._launched.popleft())
        elif plan is None:
            return False
        return True

    def _launch(self, plan: StepPlan) -> None:
        self.stats.on_launch(plan)
        try:
            self._launched.append((plan, self.runner.launch(plan)))
        except Exception as exc:
            self._fail_step(plan, exc)

    def _collect(self, plan: StepPlan, pending: PendingStep) -> None:
        try:
            result = pending.result()
        except Exception as exc:
            self._fail_step(plan, exc)
            return
        self.stats.on_collect(plan)
        place, size = 0, self.scheduler.cache.block_tokens
        tokens, details = result.tokens, result.details
        for index, chunk in enumerate(plan.chunks):
            seq = chunk.seq
            if index in result.prompt_logprobs and not seq.request.done:
                seq.request.prompt_logprobs += result.prompt_logprobs[index]
            full = (seq.table.published + 1) * size <= chunk.end
            if full and seq.epoch == chunk.epoch and seq.finish_reason is None:
                self.scheduler.cache.publish(seq.table, seq.tokens, chunk.end)
            for _ in range(chunk.draws):
                seq, position, token = plan.draw_seqs[place], plan.draw_positions[place], tokens[place]
                request = seq.request
                if seq.finish_reason is None and not request.done:
                    more = position + 1 - request.num_prompt < request.max_output and token not in request.stop_ids
                    if more and request.plain and request.first_token and not details:
                        seq.tokens[position] = token
                        seq.pending -= 1
                    else:
                        self._collect_token(seq, position, token, details.get(place))
                place += 1

    def _collect_token(self, seq: Sequence, position: int, token: int, detail: Detail | None) -> None:
        request = seq.request
        if detail is not None and detail.error is not None:
            self._end(request, "error", detail.error)
        elif request.beam is not None:
            self._collect_beam(request, seq, detail or Detail())
        else:
            self._accept(seq, position, token, detail)

    def _accept(self, seq: Sequence, position: int, token: int, detail: Detail | None) -> None:
        request = seq.request
        seq.tokens[position] = token
        seq.pending -= 1
        if detail is not None:
            seq.cumulative_logprob += detail.logprob
            if detail.top is not None:
                seq.logprobs.append(detail.top)
        if not request.first_token:
            request.first_token = time.monotonic()
        try:
            reason = finish_reason(seq, position + 1 - request.num_prompt, token)
        except Exception as exc:
            self._end(request, "error", exc)
            return
        if reason is not None:
            del seq.tokens[position + 1 :]
            self.scheduler.finish(seq, reason)
        if request.streaming and request.listener is not None:
            request.listener.on_token(seq, token)
        if reason is not None and all(s.finished for s in request.sequences):
            self._end(request, reason, None)

    def _collect_beam(self, request: Request, seq: Sequence, drawn: Detail) -> None:
        assert request.beam is not None
        if not request.first_token:
            request.first_token = time.monotonic()
        if not request.beam.collect(seq, drawn):
            return
        request.beam.advance(self.scheduler)
        if request.beam.finished:
            self._end(request, request.beam.reason, None)

    def _end(self, request: Request, reason: FinishReason, error: Exception | None) -> None:
        """The request's one final reply."""
        if request.done:
            return
        request.done, request.error = True, error
        self.scheduler.end(request, reason)
        self.stats.on_end(request, reason)
        if request.listener is not None:
            request.listener.on_end()

    def _fail_step(self, plan: StepPlan, exc: Exception) -> None:
        """Requests of a step that failed end with its error; all others go on."""
        logger.error("step %d failed: %s", plan.index, exc)
        error = exc if isinstance(exc, VenturiError) else InternalError(f"step {plan.index} failed: {exc!r}")
        for chunk in plan.chunks:
            self._end(chunk.seq.request, "error", error)


def finish_reason(seq: Sequence, num_output: int, token: int) -> FinishReason | None:
    """Why the sequence ends with its newest token, or None. Feeds the token to its guide and its stop scan."""
    request = seq.request
    if seq.guide is not None and seq.guide.accept(token):
        return "stop"
    if num_output >= request.params.min_tokens:
        if token in request.stop_ids:
            seq.stop_reason = token
            return "stop"
        if seq.text_scan is not None:
            seq.stop_reason = seq.text_scan.add(token)
            if seq.stop_reason is not None:
                return "stop"
    elif seq.text_scan is not None:
        seq.text_scan.add(token)
    return "length" if num_output >= request.max_output else None


class EngineThread:
    """Runs an EngineLoop in a thread of its own. All methods are thread-safe.

    Args:
        loop: the loop; nobody else may touch it from now on.
        prepare: called in the thread before the first step.
    """

    def __init__(self, loop: EngineLoop, prepare: Callable[[], None] | None = None) -> None:
        self.loop = loop
        self._prepare = prepare
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self.ready = threading.Event()
        self._failure: Exception | None = None
        self._open: set[Request] = set()
        self._thread = threading.Thread(target=self._run, name="venturi-llm", daemon=True)
        self._thread.start()

    def submit(self, requests: list[Request]) -> None:
        def add() -> None:
            for request in requests:
                if request.abort_requested:
                    self.loop.abort(request)
                else:
                    self._open.add(request)
                    self.loop.add(request)

        self._post(add)

    def abort(self, request: Request) -> None:
        request.abort_requested = True
        self._post(lambda: self.loop.abort(request))

    def call(self, function: Callable[[], None]) -> None:
        """Run a function in the engine's thread between two steps, and wait for it."""
        done = threading.Event()

        def run() -> None:
            try:
                function()
            finally:
                done.set()

        self._post(run)
        done.wait()

    def stop(self) -> None:
        """End every request as cancelled, then the thread. Waits for it."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _post(self, work: Callable[[], None]) -> None:
        with self._wake:
            if self._failure is not None:
                raise InternalError(f"the engine has failed: {self._failure!r}; make a new LLM") from self._failure
            if self._stopping:
                raise RequestError("the engine has been shut down; make a new LLM")
            self._inbox.append(work)
            self._wake.notify()

    def _run(self) -> None:
        try:
            if self._prepare is not None:
                self._prepare()
            self.ready.set()
            self._serve()
        except Exception as exc:
            logger.exception("the engine has failed")
            self._failure = exc
        with self._wake:
            self._stopping = True
        self.ready.set()
        while self._inbox:
            self._inbox.popleft()()
        for request in self._open:
            self.loop.give_up(request, self._failure)

    def _serve(self) -> None:
        while not self._stopping:
            while self._inbox:
                self._inbox.popleft()()
            if self.loop.step():
                continue
            self._open = {request for request in self._open if not request.done}
            with self._wake:
                if not self._inbox and not self._stopping:
                    self._wake.wait()
