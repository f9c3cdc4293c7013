"""Requests that are submitted together wait for each other, and only for each other."""

from __future__ import annotations

import asyncio
import contextlib

from tests.serve.test_driver import Loop, Slow, request, run
from venturi.serve.instance import Instance
from venturi.serve.schedulers.batcher import BatchingRules, DynamicBatcher, OneByOne
from venturi.serve.statistics import ModelStatistics


def test_requests_submitted_together_are_batches_of_a_model_that_would_have_answered_at_once():
    async def main():
        model, statistics = Slow(), ModelStatistics()
        model.gate.set()
        instance = Instance("i", model)
        instance.is_fast = True
        driver = Loop(DynamicBatcher(BatchingRules(4)), [instance], statistics)
        with driver.together():
            answers = [driver.ask(request(str(i))) for i in range(6)]
            assert not model.batches
            answers[5].cancel()
            await asyncio.sleep(0)
        sizes = [int((await a).outputs["n"].data[0]) for a in answers[:5]]
        assert sizes == [4, 4, 4, 4, 1]
        alone = driver.ask(request("alone"))
        assert alone.done()
        assert (statistics.executions, statistics.pending, driver.num_open) == (3, 0, 0)
        await driver.drain()

    run(main())


def test_together_runs_what_came_before_something_failed():
    async def main():
        model, statistics = Slow(), ModelStatistics()
        model.gate.set()
        driver = Loop(OneByOne(), [Instance("i", model)], statistics)
        with contextlib.suppress(ZeroDivisionError), driver.together():
            answer = driver.ask(request())
            raise ZeroDivisionError
        assert int((await answer).outputs["n"].data[0]) == 1
        await driver.drain()

    run(main())
