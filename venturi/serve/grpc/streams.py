"""The answers of one bidirectional stream: ordered for most models, interleaved for decoupled ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from venturi.core.log import logger
from venturi.serve.errors import ServeError, Status, invalid
from venturi.serve.grpc.messages import Malformed

_MAX_PENDING = 1024  # messages read and not yet passed on; answers that the client has not taken
Answers = Callable[[Any], AsyncIterator[Any]]


class AnswerStream:
    """Iterate for the responses; a ServeError among them carries the request's id in `where`.

    `answers` gives a message's responses, `interleaves` tells whether they may mix with those of other messages.
    """

    def __init__(self, answers: Answers, interleaves: Callable[[Any], bool]) -> None:
        self._answers, self._interleaves = answers, interleaves
        self._out: asyncio.Queue[Any] = asyncio.Queue(_MAX_PENDING)
        self._room = asyncio.Semaphore(_MAX_PENDING)
        self._ordered: asyncio.Queue[asyncio.Task[list[Any]] | None] = asyncio.Queue()
        self._tasks: set[asyncio.Task[Any]] = set()

    @asynccontextmanager
    async def reading(self, messages: AsyncIterator[Any]) -> AsyncIterator[None]:
        """Reads messages inside the block; leaving it cancels what is not answered."""
        reader = self._spawn(self._read(messages))
        try:
            yield
        finally:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (item := await self._out.get()) is not None:
            yield item

    async def _read(self, messages: AsyncIterator[Any]) -> None:
        writer = self._spawn(self._write_ordered())
        mixed: set[asyncio.Task[None]] = set()
        try:
            async for message in messages:
                await self._room.acquire()
                if not isinstance(message, Malformed) and self._interleaves(message):
                    task = self._spawn(self._pass_on(message))
                    mixed.add(task)
                    task.add_done_callback(mixed.discard)
                else:
                    self._ordered.put_nowait(self._spawn(self._collect(message)))
        except Exception as exc:
            logger.info("a client's stream broke off: %r", exc)
        self._ordered.put_nowait(None)
        await asyncio.gather(writer, *mixed)
        await self._out.put(None)

    async def _write_ordered(self) -> None:
        while (task := await self._ordered.get()) is not None:
            for answer in await task:
                await self._out.put(answer)
            self._room.release()

    async def _collect(self, message: Any) -> list[Any]:
        if isinstance(message, Malformed):
            return [invalid(message.reason)]
        try:
            return [answer async for answer in self._answers(message)]
        except Exception as exc:
            return [_failure(exc, message)]

    async def _pass_on(self, message: Any) -> None:
        try:
            async for answer in self._answers(message):
                await self._out.put(answer)
        except Exception as exc:
            await self._out.put(_failure(exc, message))
        finally:
            self._room.release()

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _failure(exc: Exception, message: Any) -> ServeError:
    """What the client reads; what is no ServeError is a mistake of ours, and logged."""
    if not isinstance(exc, ServeError):
        logger.error("a message of a stream failed", exc_info=exc)
        exc = ServeError(Status.INTERNAL, f"{type(exc).__name__}: {exc}")
    return ServeError(exc.status, exc.message, where=message.id)
