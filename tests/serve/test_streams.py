"""The order of answers in a stream, without a server: what is there at once, what comes late, what fails, who leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest

from venturi.serve.errors import ServeError, invalid
from venturi.serve.grpc.messages import Malformed
from venturi.serve.grpc.streams import AnswerStream, Pending, StreamRefused
from venturi.serve.request import InferResponse


@dataclass
class Message:
    """`kind`: now, late, fails, breaks, or many (a decoupled model)."""

    id: str
    kind: str


class Service:
    def __init__(self) -> None:
        self.late: list[tuple[Message, asyncio.Future[InferResponse]]] = []
        self.let = asyncio.Event()
        self.groups: list[list[str]] = []

    def is_decoupled(self, message: Message) -> bool:
        return message.kind == "many"

    async def prepare(self, message: Message) -> None:
        return None

    def together(self, messages: list[Message]) -> AbstractContextManager[None]:
        self.groups.append([m.id for m in messages])
        return nullcontext()

    def begin(self, message: Message) -> Pending:
        future: asyncio.Future[InferResponse] = asyncio.get_running_loop().create_future()
        match message.kind:
            case "now":
                future.set_result(InferResponse({}))
            case "late":
                self.late.append((message, future))
            case "fails":
                raise invalid("no")
            case "breaks":
                future.set_exception(ZeroDivisionError("division"))
        return Pending(future, lambda response: message.id)

    async def answers(self, message: Message) -> AsyncIterator[str]:
        for i in range(3):
            yield f"{message.id}.{i}"
            await self.let.wait()


async def say(*messages: Any, gap: float = 0.0) -> AsyncIterator[Any]:
    for message in messages:
        await asyncio.sleep(gap)
        yield message


def stream(service: Service, out: list[Any]) -> AnswerStream:
    async def write(answer: Any) -> None:
        await asyncio.sleep(0)
        out.append(f"{answer.where}: {answer.message}" if isinstance(answer, ServeError) else answer)

    return AnswerStream(service, write)


def test_a_late_answer_holds_back_those_behind_it() -> None:
    async def main() -> list[Any]:
        service, out = Service(), []
        kinds = [("a", "now"), ("b", "late"), ("c", "now"), ("d", "fails"), ("e", "late"), ("f", "breaks")]
        running = asyncio.create_task(stream(service, out).run(say(*(Message(*k) for k in kinds))))
        while len(service.late) < 2:
            await asyncio.sleep(0.001)
        assert out == ["a"]
        for _, future in reversed(service.late):
            future.set_result(InferResponse({}))
        assert await running is None
        return out

    assert asyncio.run(main()) == ["a", "b", "c", "d: no", "e", "f: ZeroDivisionError: division"]


def test_a_decoupled_model_lets_others_pass() -> None:
    async def main() -> list[Any]:
        service, out = Service(), []
        messages = say(Message("a", "many"), Message("b", "now"), Malformed("garbage"), gap=0.01)
        running = asyncio.create_task(stream(service, out).run(messages))
        await asyncio.sleep(0.1)
        assert out == ["a.0", "b", ": garbage"]
        service.let.set()
        await running
        return out

    assert asyncio.run(main())[3:] == ["a.1", "a.2"]


@pytest.mark.parametrize("kind", ["fails", "many"])
def test_a_refusal_ends_the_stream_and_cancels_what_waits(kind: str) -> None:
    async def main() -> None:
        service = Service()
        service.let.set()

        async def write(answer: Any) -> None:
            raise StreamRefused(answer if isinstance(answer, ServeError) else invalid(str(answer)))

        async def endless() -> AsyncIterator[Message]:
            yield Message("a", kind)
            await asyncio.sleep(3600)

        refused = await asyncio.wait_for(AnswerStream(service, write).run(endless()), 5)
        assert refused is not None
        assert refused.message == ("no" if kind == "fails" else "a.0")

    asyncio.run(main())


def test_leaving_cancels_what_waits() -> None:
    async def main() -> None:
        service, out = Service(), []
        running = asyncio.create_task(stream(service, out).run(say(*(Message(n, "late") for n in "abc"))))
        while len(service.late) < 3:
            await asyncio.sleep(0.001)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert all(future.cancelled() for _, future in service.late)
        assert not out

    asyncio.run(main())


def test_a_broken_connection_is_the_end_of_the_messages() -> None:
    async def broken() -> AsyncIterator[Message]:
        yield Message("a", "now")
        raise ConnectionError("gone")

    out: list[Any] = []
    assert asyncio.run(_run(broken(), out)) is None
    assert out == ["a"]


async def _run(messages: AsyncIterator[Message], out: list[Any]) -> ServeError | None:
    return await asyncio.wait_for(stream(Service(), out).run(messages), 5)


def test_messages_are_read_while_an_answer_is_written_but_not_without_end() -> None:
    async def main() -> None:
        service, out, read, let = Service(), [], [], asyncio.Event()

        async def write(answer: Any) -> None:
            await let.wait()
            out.append(answer)

        async def messages() -> AsyncIterator[Message]:
            for i in range(1000):
                read.append(i)
                yield Message(str(i), "now")

        running = asyncio.create_task(AnswerStream(service, write).run(messages()))
        await asyncio.sleep(0.1)
        assert not out
        assert 2 <= len(read) <= 36, "some are answered, as many others are there, most are still the client's"
        let.set()
        assert await running is None
        assert out == [str(i) for i in range(1000)]
        assert max(map(len, service.groups)) > 8, "those that were there began together"
        assert max(map(len, service.groups)) <= 17

    asyncio.run(main())
