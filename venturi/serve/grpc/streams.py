"""The answers of one bidirectional stream: ordered for most models, interleaved for decoupled ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from venturi.core.log import logger
from venturi.serve.errors import ServeError, Status, invalid
from venturi.serve.grpc.messages import Malformed
from venturi.serve.request import InferResponse

_MAX_PENDING = 1024  # messages read and not yet answered
_MAX_READ_AHEAD = 16


@dataclass(frozen=True)
class Pending:
    """An answer to come, and how it becomes a message."""

    future: asyncio.Future[InferResponse]
    encode: Callable[[InferResponse], Any]


class Exchange(Protocol):
    """What a stream needs of the service. Failures are raised as ServeErrors."""

    def is_decoupled(self, message: Any) -> bool:
        """Whether the answers may mix with those to other messages."""

    async def prepare(self, message: Any) -> None:
        """Before anything else is done with the message."""

    def begin(self, message: Any) -> Pending:
        """Submit a request that has one answer."""

    def together(self, messages: list[Any]) -> AbstractContextManager[object]:
        """Requests of these messages that begin meanwhile may become batches. Nothing waits in there."""

    def answers(self, message: Any) -> AsyncIterator[Any]:
        """The answers of a decoupled model."""


class AnswerStream:
    """Reads messages and writes answers; a ServeError among them carries the request's id in `where`.

    Messages that have arrived begin together. One whose answer is there at once, and that has no other in front of it,
    takes no task and no queue.
    """

    def __init__(self, exchange: Exchange, write: Callable[[Any], Awaitable[None]]) -> None:
        self._exchange, self._write_now = exchange, write
        self._writing = asyncio.Lock()
        self._room = asyncio.Semaphore(_MAX_PENDING)
        self._ordered: asyncio.Queue[tuple[Any, Pending | ServeError] | None] = asyncio.Queue()
        self._num_ordered = 0
        self._read_ahead: asyncio.Queue[Any] = asyncio.Queue(_MAX_READ_AHEAD)

    async def run(self, messages: AsyncIterator[Any]) -> ServeError | None:
        """Returns when all is answered, or with what `write` refused. Requests that then still wait are cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._write_ordered())
                group.create_task(self._read(messages))
                while (arrived := await self._arrived())[-1] is not None:
                    await self._take(arrived, group)
                await self._take(arrived[:-1], group)
                self._ordered.put_nowait(None)
        except ExceptionGroup as group:
            if (refused := _refusal(group)) is None:
                raise
            return refused.error
        finally:
            while not self._ordered.empty():
                match self._ordered.get_nowait():
                    case (_, Pending(future)):
                        future.cancel()
        return None

    async def _read(self, messages: AsyncIterator[Any]) -> None:
        """While an answer is being written the next messages are read already."""
        while (message := await _next(messages)) is not None:
            await self._read_ahead.put(message)
        await self._read_ahead.put(None)

    async def _arrived(self) -> list[Any]:
        """All messages that are there, at least one; None, the end, is the last."""
        arrived = [await self._read_ahead.get()]
        while arrived[-1] is not None and not self._read_ahead.empty():
            arrived.append(self._read_ahead.get_nowait())
        return arrived

    async def _take(self, arrived: list[Any], group: asyncio.TaskGroup) -> None:
        messages = [m for m in arrived if not isinstance(m, Malformed)]
        with self._exchange.together(messages) if len(messages) > 1 else nullcontext():
            begun = [(message, await self._begun(message)) for message in arrived]
        for message, given in begun:
            if given is None:
                await self._room.acquire()
                group.create_task(self._pass_on(message))
            elif not self._num_ordered and (isinstance(given, ServeError) or given.future.done()):
                await self._write(await _answer(message, given))
            else:
                self._num_ordered += 1
                self._ordered.put_nowait((message, given))
                await self._room.acquire()

    async def _begun(self, message: Any) -> Pending | ServeError | None:
        """None for a message to a decoupled model."""
        try:
            if isinstance(message, Malformed):
                raise invalid(message.reason)
            await self._exchange.prepare(message)
            return None if self._exchange.is_decoupled(message) else self._exchange.begin(message)
        except Exception as exc:
            return _failure(exc, message)

    async def _write_ordered(self) -> None:
        while (item := await self._ordered.get()) is not None:
            await self._write(await _answer(*item))
            self._num_ordered -= 1
            self._room.release()

    async def _pass_on(self, message: Any) -> None:
        try:
            async for answer in self._exchange.answers(message):
                await self._write(answer)
        except StreamRefused:
            raise
        except Exception as exc:
            await self._write(_failure(exc, message))
        finally:
            self._room.release()

    async def _write(self, answer: Any) -> None:
        async with self._writing:
            await self._write_now(answer)


class StreamRefused(Exception):
    """Raised by `write` to end the stream with the error it holds."""

    def __init__(self, error: ServeError) -> None:
        super().__init__(error.message)
        self.error = error


def _refusal(group: BaseExceptionGroup[Any]) -> StreamRefused | None:
    for found in group.exceptions:
        inner = _refusal(found) if isinstance(found, BaseExceptionGroup) else found
        if isinstance(inner, StreamRefused):
            return inner
    return None


async def _next(messages: AsyncIterator[Any]) -> Any:
    """None at the end, also where the client broke it off."""
    try:
        return await anext(messages, None)
    except Exception as exc:
        logger.info("a client's stream broke off: %r", exc)
        return None


async def _answer(message: Any, given: Pending | ServeError) -> Any:
    if isinstance(given, ServeError):
        return given
    try:
        return given.encode(await given.future)
    except Exception as exc:
        return _failure(exc, message)


def _failure(exc: Exception, message: Any) -> ServeError:
    """What the client reads; what is no ServeError is a mistake of ours, and logged."""
    if not isinstance(exc, ServeError):
        logger.error("a message of a stream failed", exc_info=exc)
        exc = ServeError(Status.INTERNAL, f"{type(exc).__name__}: {exc}")
    return ServeError(exc.status, exc.message, where=getattr(message, "id", ""))
