"""What callers get: `RequestOutput`, a future, an async iterator and a record, and its `CompletionOutput`s.

The engine's thread calls `on_token` and `on_end`; text is made in the caller's thread when it is asked for.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from venturi.core.errors import RequestError
from venturi.llm.request import FinishReason, Request, Sequence, TokenLogprobs
from venturi.llm.tokenizer import TextTokenizer


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation.

    finish_reason: None while it runs, then "stop", "length" or "cancelled". stop_reason: the token id or text that
    stopped it. logprobs: one record {token id: Logprob} per token, when asked for. text_diff, token_ids_diff: what is
    new since the last look at a streaming output.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    text_diff: str = ""
    token_ids_diff: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        return len(self.token_ids)


class RequestOutput:
    """The answer to one request, now or in the future.

    Wait with `.result(timeout)` or `await`; stream with `for` or `async for`, each step yielding this object with
    `.outputs` as far as they have come. All methods are thread-safe.
    """

    def __init__(
        self, request: Request, tokenizer: TextTokenizer | None, prompt: str | None, abort: Callable[[Request], None]
    ) -> None:
        self._request, self._tokenizer, self._abort = request, tokenizer, abort
        self.prompt = prompt
        self.prompt_token_ids = request.prompt
        self._changed = threading.Condition()
        self._events = 0
        self._ended = False
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._looked: dict[int, tuple[int, str]] = {}
        self._diffs: dict[int, tuple[int, str]] = {}
        self.token_times: list[float] = []

    # ---- the engine's side

    def on_token(self, seq: Sequence, token: int) -> None:
        self.token_times.append(time.monotonic())
        self._notify(False)

    def on_end(self) -> None:
        self._notify(True)

    def _notify(self, ended: bool) -> None:
        with self._changed:
            self._events += 1
            self._ended = self._ended or ended
            self._changed.notify_all()
            waiters = list(self._waiters)
        for loop, event in waiters:
            loop.call_soon_threadsafe(event.set)

    # ---- the caller's side

    @property
    def request_id(self) -> int:
        return self._request.id

    @property
    def finished(self) -> bool:
        return self._ended

    @property
    def error(self) -> Exception | None:
        """Why the request failed, once it has."""
        return self._request.error if self._ended else None

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that were found in the prefix cache."""
        return self._request.num_cached

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """Per prompt token; the first has none. None when not asked for."""
        if self._request.params.prompt_logprobs is None:
            return None
        return [None, *self._request.prompt_logprobs]

    @property
    def outputs(self) -> list[CompletionOutput]:
        """The continuations, the likeliest first where more were computed than are returned.

        Raises the request's error if it failed.
        """
        self._checked()
        request, params = self._request, self._request.params
        if request.beam is not None:
            return self._beam_outputs() if self._ended else []
        sequences = list(request.sequences)
        if request.width > params.n:
            if not self._ended:
                return []
            sequences = sorted(sequences, key=lambda s: -s.cumulative_logprob)[: params.n]
        return [self._output(i, seq) for i, seq in enumerate(sequences)]

    def abort(self) -> None:
        """Stop generating; the request ends as cancelled and its memory is freed."""
        self._abort(self._request)

    def done(self) -> bool:
        return self._ended

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the end. Raises TimeoutError, or the request's own error."""
        if not self.wait(timeout):
            raise TimeoutError(f"request {self._request.id} is not finished after {timeout} s")
        return self._checked()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, whatever it is; False when the time is over before."""
        with self._changed:
            return self._changed.wait_for(lambda: self._ended, timeout)

    async def aresult(self) -> RequestOutput:
        async for _ in self._updates():
            pass
        return self._checked()

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self.aresult().__await__()

    def __iter__(self) -> Iterator[RequestOutput]:
        seen = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda known=seen: self._events > known)  # type: ignore[misc]
                seen, ended = self._events, self._ended
            self._look()
            yield self._checked()
            if ended:
                return

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        async for _ in self._updates():
            self._look()
            yield self._checked()

    async def _updates(self) -> AsyncIterator[None]:
        event, seen = asyncio.Event(), 0
        entry = (asyncio.get_running_loop(), event)
        with self._changed:
            self._waiters.append(entry)
        try:
            while True:
                with self._changed:
                    events, ended = self._events, self._ended
                if events > seen:
                    seen = events
                    yield
                    if ended:
                        return
                else:
                    await event.wait()
                event.clear()
        finally:
            with self._changed:
                self._waiters.remove(entry)

    def _checked(self) -> RequestOutput:
        if self._ended and self._request.error is not None:
            raise self._request.error
        return self

    def _look(self) -> None:
        """Advance what the diffs of `outputs` are relative to."""
        for seq in list(self._request.sequences):
            tokens = len(_known(seq))
            text = self._text(seq)
            before = self._looked.get(seq.index, (0, ""))
            self._diffs[seq.index] = before
            self._looked[seq.index] = (tokens, text)

    def _output(self, index: int, seq: Sequence) -> CompletionOutput:
        tokens, text = _known(seq), self._text(seq)
        token_start, text_start = self._diffs.get(seq.index, (0, ""))
        asked = self._request.params.logprobs is not None
        return CompletionOutput(
            index,
            text,
            tokens,
            seq.cumulative_logprob if asked or self._request.width > self._request.params.n else None,
            list(seq.logprobs) if asked else None,
            seq.finish_reason,
            seq.stop_reason,
            text[len(text_start) :],
            tuple(tokens[token_start:]),
        )

    def _text(self, seq: Sequence) -> str:
        if self._tokenizer is None:
            return ""
        params, tokens = self._request.params, _known(seq)
        if isinstance(seq.stop_reason, int) and not params.include_stop_str_in_output:
            tokens.pop()
        text = self._tokenizer.decode(tokens, skip_special_tokens=params.skip_special_tokens)
        if isinstance(seq.stop_reason, str):
            place = text.find(seq.stop_reason)
            if place >= 0:
                return text[: place + len(seq.stop_reason) * params.include_stop_str_in_output]
        return text if seq.finished else text.rstrip("\ufffd")

    def _beam_outputs(self) -> list[CompletionOutput]:
        assert self._request.beam is not None, "called for beam search only"
        params, found = self._request.params, self._request.beam.finished_list[: self._request.params.n]

        def text(tokens: list[int]) -> str:
            if self._tokenizer is None:
                return ""
            return self._tokenizer.decode(tokens, skip_special_tokens=params.skip_special_tokens)

        asked = params.logprobs is not None
        return [
            CompletionOutput(i, text(h.output), h.output, h.logprob, h.logprobs if asked else None, h.reason)
            for i, h in enumerate(found)
        ]


def _known(seq: Sequence) -> list[int]:
    """The output tokens whose values are on the host."""
    output = seq.output
    while output and output[-1] < 0:
        output.pop()
    return output


def failed(request: Request, error: RequestError, abort: Callable[[Request], None]) -> RequestOutput:
    """The answer to a request that was refused."""
    output = RequestOutput(request, None, None, abort)
    request.done, request.error = True, error
    output.on_end()
    return output
